"""Vision-language models of transformers as judges, and PromptEcho (arXiv 2604.12652).

PromptEcho needs the likelihood of a given text, so it runs locally only. With the tokens c of the
prompt:
    r = 1/|c| Σ_i log p(c_i | image, query, c_<i)
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, TypeVar
from weakref import WeakValueDictionary

import torch
from PIL import Image
from torch import nn, Tensor
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor, ProcessorMixin

from flowalign import distributed
from flowalign.data.prompts import Metadata
from flowalign.errors import UserError
from flowalign.flow import PerImage
from flowalign.models.hub import pretrained
from flowalign.rewards.base import traits
from flowalign.rewards.vlm.questions import (
    LogProbs,
    normalise_token,
    Question,
    RewardDance,
    Rubric,
    VLMJudge,
    VqaScore,
)

Tokens = dict[str, Tensor]
"""Inputs of a model: input_ids and attention_mask (B, T), and images in the model's own form."""
Row = TypeVar("Row")


class VisionLanguageModel:
    """A model with its processor, on this rank's device. Its logits are float32 for any dtype.

    Raises UserError if the model cannot be opened or has no chat template.
    """

    def __init__(self, key: str, path: str, dtype: str) -> None:
        self.processor = pretrained(AutoProcessor, key, path)
        if not _is_chat_processor(self.processor):
            raise UserError(
                f"{key}: {path} has no chat template. Use a model that was tuned on instructions."
            )
        self.tokenizer = self.processor.tokenizer
        # Some models have no padding token. What it is does not matter: padding is masked.
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.model = pretrained(AutoModelForImageTextToText, key, path, dtype=getattr(torch, dtype))
        self.model.eval().requires_grad_(False).to(distributed.device())
        # In bfloat16, neighbouring logits near 20 are 0.125 apart, so the last layer is float32.
        head = self.model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.float(), requires_grad=False)
        head.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))

    @cached_property
    def yes_and_no(self) -> dict[str, int]:
        """The tokens for yes and no in all their spellings, with their ids."""
        vocabulary = self.tokenizer.get_vocab().items()
        return {token: i for token, i in vocabulary if normalise_token(token) in ("yes", "no")}

    def encode(self, questions: list[Question], padding_side: Literal["left", "right"]) -> Tokens:
        """Encode questions as chats of one turn, up to where the answer begins."""
        chats = [[{"role": "user", "content": _content(question)}] for question in questions]
        settings = {"padding": True, "padding_side": padding_side, "return_tensors": "pt"}
        inputs = self.processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs=settings,
        )
        return dict(inputs.to(self.model.device, self.model.dtype))

    def logits(self, inputs: Tokens, first: int) -> Tensor:
        """Return the logits (B, T - first, vocabulary) of the positions from `first` on."""
        count = inputs["input_ids"].shape[1] - first
        return self.model(**inputs, logits_to_keep=count, use_cache=False).logits[:, -count:]

    def first_tokens(self, questions: list[Question]) -> Tensor:
        """Return the log-probabilities (B, spellings) of `yes_and_no` after each question."""
        # Padding on the right: with causal attention it cannot change what stands before it.
        inputs = self.encode(questions, "right")
        last = inputs["attention_mask"].sum(1) - 1
        first = int(last.min())
        rows = torch.arange(len(last), device=last.device)
        log_probs = self.logits(inputs, first)[rows, last - first].log_softmax(-1)
        return log_probs[:, list(self.yes_and_no.values())]

    def log_likelihood(self, questions: list[Question], answers: list[str]) -> PerImage:
        """Return the mean log-probability of each answer's tokens; NaN for an empty answer."""
        question = self.encode(questions, "right")
        first = int(question["attention_mask"].sum(1).min()) - 1
        tokens = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in answers]
        inputs, is_answer = append_tokens(question, tokens, self.tokenizer.pad_token_id)
        logits = self.logits(inputs, first)
        return mean_log_likelihood(logits, inputs["input_ids"][:, first:], is_answer[:, first:])

    def generate(self, questions: list[Question], max_new_tokens: int) -> list[str]:
        """Return answers by greedy decoding."""
        inputs = self.encode(questions, "left")
        sequences = self.model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,  # a model's own keeps it from giving two axes the same score
            max_new_tokens=max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        answers = sequences[:, inputs["input_ids"].shape[1] :]
        return self.tokenizer.batch_decode(answers, skip_special_tokens=True)


def mean_log_likelihood(logits: Tensor, tokens: Tensor, selected: Tensor) -> PerImage:
    """Return the mean of log p(token | those before) over the selected tokens, NaN for none.

    Shapes: logits (B, T, vocabulary); tokens and selected (B, T). Token 0 is never scored.
    """
    log_prob = -F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    selected = selected[:, 1:]
    return torch.where(selected, log_prob, 0).sum(1) / selected.sum(1)


def append_tokens(inputs: Tokens, texts: list[list[int]], pad: int) -> tuple[Tokens, Tensor]:
    """Append a text to each row of right-padded inputs, directly after its last token.

    Returns the inputs, padded with `pad`, and a mask (B, T) of the appended tokens.
    """
    shape, ends = inputs["input_ids"].shape, inputs["attention_mask"].sum(1).tolist()
    room = (0, max(len(text) for text in texts))
    # Everything of shape (B, T) grows, such as token types; images do not.
    longer = {
        name: F.pad(value, room) if value.shape == shape else value
        for name, value in inputs.items()
    }
    longer["input_ids"] = F.pad(inputs["input_ids"], room, value=pad)
    appended = torch.zeros_like(longer["input_ids"], dtype=torch.bool)
    for row, (end, text) in enumerate(zip(ends, texts, strict=True)):
        span = slice(end, end + len(text))
        tokens = torch.tensor(text, dtype=torch.long, device=appended.device)
        longer["input_ids"][row, span] = tokens
        longer["attention_mask"][row, span] = 1
        appended[row, span] = True
    return longer, appended


def _is_chat_processor(processor: object) -> bool:
    # For a text-only model, AutoProcessor returns a tokenizer.
    return isinstance(processor, ProcessorMixin) and processor.chat_template is not None


def _content(question: Question) -> list[dict[str, object]]:
    return [
        {"type": "text", "text": piece}
        if isinstance(piece, str)
        else {"type": "image", "image": piece}
        for piece in question
    ]


OPENED: WeakValueDictionary[tuple[str, str], VisionLanguageModel] = WeakValueDictionary()
"""Models by path and dtype, shared by rewards. Weak, so that a model goes with its last reward."""


@dataclass
class LocalJudge(VLMJudge):
    """A judge that runs on this rank's device."""

    path: str
    """A local folder or hub repository of an image-text-to-text model with a chat template."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """The dtype of the weights, except the last layer, which is float32."""
    images_per_pass: int = 8
    """How many images are judged at once."""

    def open(self) -> None:
        """Load the model, unless another reward has loaded it."""
        if self.images_per_pass < 1:
            raise UserError(
                f"rewards.{self.name}.images_per_pass is {self.images_per_pass}. "
                "Set it to 1 or more."
            )
        # A model of 7 billion weights takes 17 GB, so rewards of one path share it.
        shared = OPENED.get((self.path, self.dtype))
        self.model = shared or VisionLanguageModel(
            f"rewards.{self.name}.path", self.path, self.dtype
        )
        OPENED[self.path, self.dtype] = self.model
        if {normalise_token(token) for token in self.model.yes_and_no} != {"yes", "no"}:
            raise UserError(
                f"rewards.{self.name}.path: the vocabulary of {self.path} has no single token for "
                "yes or for no. Use another model."
            )

    @torch.no_grad()
    def first_tokens(self, questions: list[Question]) -> list[LogProbs]:
        """Return the log-probabilities of every spelling of yes and no."""
        rows = []
        for part in self._passes(questions):
            rows += self.model.first_tokens(part).tolist()
        return [list(zip(self.model.yes_and_no, row, strict=True)) for row in rows]

    @torch.no_grad()
    def generate(self, questions: list[Question], max_new_tokens: int) -> list[str]:
        """Return the answers, decoded greedily."""
        answers = []
        for part in self._passes(questions):
            answers += self.model.generate(part, max_new_tokens)
        return answers

    def _passes(self, rows: list[Row]) -> list[list[Row]]:
        size = self.images_per_pass
        return [rows[start : start + size] for start in range(0, len(rows), size)]


@dataclass
class LocalVqaScore(VqaScore, LocalJudge):
    """Probability of yes, in [0, 1], to whether the image shows its prompt.

    For example Qwen/Qwen2.5-VL-7B-Instruct (17 GB in bfloat16, Apache-2.0) or
    Qwen/Qwen3-VL-8B-Instruct (18 GB, Apache-2.0). A model that reasons before it answers does not
    begin with yes or no, so it cannot be used.
    """

    name: ClassVar[str] = "vqa_score"


@dataclass
class LocalRewardDance(RewardDance, LocalJudge):
    """Probability of yes, in [0, 1], to whether the image is better than its prompt's `ref_image`.

    RewardDance's own weights are not public. Use for example Qwen/Qwen2.5-VL-7B-Instruct (17 GB
    in bfloat16, Apache-2.0) or another model that takes two images.
    """

    name: ClassVar[str] = "reward_dance"


@dataclass
class LocalRubric(Rubric, LocalJudge):
    """A written score from 1 to 5, divided by 5: in [0.2, 1], not scored if the answer has none.

    For example CodeGoat24/UnifiedReward-2.0-qwen3vl-8b (18 GB in bfloat16, licence: see its card)
    or Qwen/Qwen2.5-VL-7B-Instruct (17 GB, Apache-2.0).
    """

    name: ClassVar[str] = "rubric"


@traits(range=(-torch.inf, 0), images="pil")
@dataclass
class PromptEcho(LocalJudge):
    """Mean log-likelihood, below 0, of the prompt as the answer to a query about the image.

    It takes one forward per image. For example Qwen/Qwen3-VL-32B-Instruct (67 GB in bfloat16,
    Apache-2.0; the paper's) or Qwen/Qwen2.5-VL-7B-Instruct (17 GB, Apache-2.0). The larger the
    model, the better the reward.
    """

    name: ClassVar[str] = "prompt_echo"

    query: str = "Describe this image in detail"
    """The question that the prompt is taken to answer; its own tokens are not scored."""

    def __post_init__(self) -> None:
        self.open()

    @torch.no_grad()
    def __call__(
        self, images: list[Image.Image], prompts: list[str], metadata: list[Metadata]
    ) -> PerImage:
        scores = []
        for part in self._passes(list(zip(images, prompts, strict=True))):
            questions: list[Question] = [[image, self.query] for image, _ in part]
            answers = [prompt for _, prompt in part]
            scores.append(self.model.log_likelihood(questions, answers))
        return torch.cat(scores)
