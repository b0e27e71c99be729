"""Tokenizers of a few hundred tokens, of the classes that published models have.

They stand for the published ones where only shapes matter: in plans, and in models with random
weights for tests.
"""

import json
from inspect import signature

from diffusers import SanaPipeline
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Replace
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.trainers import BpeTrainer
from transformers import (
    CLIPTokenizer,
    GemmaTokenizer,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    T5Tokenizer,
)

LETTERS = [chr(code) for code in range(97, 123)]
CAPTIONS = [
    "a red circle",
    "a circle and a square",
    "a green triangle and two blue squares",
    "user assistant system",
    # Qwen-Image's instruction, whose words are one token each, as in the published tokenizer.
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:",
]
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
MISTRAL_TEMPLATE = (
    "<s>{% for message in messages %}{% for part in message.content %}"
    "{% if message.role == 'system' %}[SYSTEM_PROMPT]{{ part.text }}[/SYSTEM_PROMPT]"
    "{% else %}[INST]{{ part.text }}[/INST]{% endif %}{% endfor %}{% endfor %}"
)


def clip(length: int = 77) -> CLIPTokenizer:
    """Return a tokenizer of letters."""
    ends = [f"{letter}</w>" for letter in LETTERS]
    pieces = [*LETTERS, *ends, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=length)


def t5(length: int = 512) -> T5Tokenizer:
    """Return a tokenizer of letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0)]
    pieces += [(f"▁{letter}", -1.0) for letter in LETTERS]
    pieces += [(letter, -2.0) for letter in LETTERS]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)


def qwen() -> Qwen2Tokenizer:
    """Return a tokenizer with Qwen's special tokens and a chat template."""
    model = json.loads(learned([]).to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=merges)
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    special += ["<|image_pad|>", "<|video_pad|>", "<think>", "</think>"]
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.chat_template = QWEN_TEMPLATE
    return tokenizer


def qwen3_vl() -> Qwen3VLProcessor:
    """Return the processor of Qwen3's models that read pictures."""
    tokenizer = qwen()
    return Qwen3VLProcessor(
        Qwen2VLImageProcessor(patch_size=16),
        tokenizer,
        Qwen3VLVideoProcessor(),
        chat_template=tokenizer.chat_template,
    )


def gemma() -> GemmaTokenizer:
    """Return a tokenizer that knows the words of SANA's instruction."""
    parameters = signature(SanaPipeline.__call__).parameters
    # A model sees spaces as this letter, with which words begin.
    space = "▁"
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    special += [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = Replace(" ", space)
    tokenizer.pre_tokenizer = Split(space, "merged_with_next")
    trainer = BpeTrainer(min_frequency=1, initial_alphabet=LETTERS, special_tokens=special)
    instruction = parameters["complex_human_instruction"].default
    tokenizer.train_from_iterator([*CAPTIONS, *instruction], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return GemmaTokenizer(vocab=model["vocab"], merges=merges, add_bos_token=True)


def pixtral() -> PixtralProcessor:
    """Return the processor of Mistral's models that read pictures."""
    special = ["<s>", "</s>", "<pad>", "<unk>", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    special += ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=learned(special),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=512,
    )
    return PixtralProcessor(
        PixtralImageProcessor(patch_size=14),
        tokenizer,
        patch_size=14,
        spatial_merge_size=2,
        chat_template=MISTRAL_TEMPLATE,
    )


def learned(special: list[str]) -> Tokenizer:
    """Return byte pairs of some captions, after these special tokens."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(min_frequency=1, initial_alphabet=alphabet, special_tokens=special)
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    return tokenizer
