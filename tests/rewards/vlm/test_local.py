"""Local judges on small random models of real classes, compared with their own logits."""

import math
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import models, pre_tokenizers, Tokenizer
from torch.testing import assert_close
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from flowalign.errors import RunError, UserError
from flowalign.rewards.registry import load_rewards
from flowalign.rewards.vlm.local import (
    LocalRewardDance,
    LocalRubric,
    LocalVqaScore,
    mean_log_likelihood,
    PromptEcho,
)
from flowalign.rewards.vlm.questions import AXES, BETTER, FINAL, SHOWS, SUBJECT

QUERY = "Describe this image in detail"
PROMPTS = [
    "a red circle",
    "a red circle and a blue square",
    "a square",
    "a blue circle on a red square",
]
SPECIAL = (
    "<pad> <eos> <unk> <image> <video> <start> <end> "
    "<fake_token_around_image> <end_of_utterance> <global-img>"
).split()
WORDS = re.findall(
    r"\w+|[^\w\s]+",
    " ".join(
        [SHOWS, BETTER, SUBJECT, FINAL, AXES, QUERY, *PROMPTS, "user assistant image 1 2 4 :"]
    ),
)
VOCABULARY = {
    word: i for i, word in enumerate(dict.fromkeys([*SPECIAL, "▁Yes", "ĠNO", "yes", *WORDS]))
}
IDS = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
TEXT = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    **IDS,
}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
}
VISION |= {"patch_size": 14}


def template(image: str) -> str:
    """A chat template: turns as `role : content <eos>`, and the answer begins after `assistant`."""
    piece = f"{{{{ c['text'] if c['type'] == 'text' else '{image}' }}}}"
    content = f"{{% for c in m['content'] %}}{piece} {{% endfor %}}"
    return f"{{% for m in messages %}}{{{{ m['role'] }}}} : {content}<eos> {{% endfor %}}assistant"


def tokenizer(**image_tokens: str) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(SPECIAL)
    named = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=words, **named, extra_special_tokens=image_tokens
    )


def qwen2_vl():
    """Qwen2-VL: images of any size packed together, positions along three axes."""
    text = {
        **TEXT,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [4, 6, 6],
            "rope_theta": 10000.0,
        },
    }
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 128,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 14,
    }
    ids = {
        "image_token_id": 3,
        "video_token_id": 4,
        "vision_start_token_id": 5,
        "vision_end_token_id": 6,
    }
    words = tokenizer(image_token="<image>", video_token="<video>")
    pictures = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56)
    processor = Qwen2VLProcessor(
        pictures, words, Qwen2VLVideoProcessor(), chat_template=template("<start><image><end>")
    )
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
    ), processor


def llava():
    """LLaVA: images of one size, in the place of their tokens."""
    text, vision = {**TEXT, "model_type": "llama"}, {**VISION, "model_type": "clip_vision_model"}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=3)
    pictures = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    sizes = {
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    processor = LlavaProcessor(pictures, tokenizer(), **sizes, chat_template=template("<image>"))
    return LlavaForConditionalGeneration(config), processor


def idefics3():
    """Idefics3: each image as a list of tiles, padded to the longest list."""
    text = {**TEXT, "model_type": "llama"}
    config = Idefics3Config(
        vision_config=VISION, text_config=text, image_token_id=3, scale_factor=2, pad_token_id=0
    )
    edge = {"longest_edge": 28}
    pictures = Idefics3ImageProcessor(size=edge, max_image_size=edge, do_image_splitting=False)
    processor = Idefics3Processor(
        pictures, tokenizer(), image_seq_len=1, chat_template=template("<image>")
    )
    return Idefics3ForConditionalGeneration(config), processor


def gemma3():
    """Gemma 3: tokens have a type, and those of an image attend to each other."""
    text = {
        **TEXT,
        "head_dim": 32,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    ids = {
        "image_token_index": 3,
        "boi_token_index": 5,
        "eoi_token_index": 6,
        "mm_tokens_per_image": 4,
    }
    words = tokenizer(image_token="<image>", boi_token="<start>", eoi_token="<end>")
    pictures = Gemma3ImageProcessor(size={"height": 28, "width": 28}, do_pan_and_scan=False)
    processor = Gemma3Processor(
        pictures, words, image_seq_length=4, chat_template=template("<start>")
    )
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=VISION, **ids)
    ), processor


@pytest.fixture(
    scope="module", params=[qwen2_vl, llava, idefics3, gemma3], ids=lambda family: family.__name__
)
def path(request, tmp_path_factory):
    """A folder with a random model whose answers depend on the whole question."""
    folder = tmp_path_factory.mktemp(request.param.__name__)
    torch.manual_seed(0)
    model, processor = request.param()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=1.5 / weight[0].numel() ** 0.5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def pictures(count: int = len(PROMPTS)) -> list[Image.Image]:
    pixels = torch.rand(count, 40, 52, 3, generator=torch.Generator().manual_seed(1)) * 255
    return [Image.fromarray(picture.byte().numpy()) for picture in pixels]


@cache
def opened(path: str):
    return AutoProcessor.from_pretrained(path), AutoModelForImageTextToText.from_pretrained(
        path
    ).eval()


def by_hand(path: str, image: Image.Image, text: str, answer: str = ""):
    """Log-probabilities of each next token, and the tokens, of one question and a first answer."""
    processor, model = opened(path)
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "image": image}, {"type": "text", "text": text}],
        }
    ]
    text = f"{processor.apply_chat_template(chat, add_generation_prompt=True)} {answer}".strip()
    inputs = processor(text=[text], images=[[image]], return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits[0].log_softmax(-1), inputs["input_ids"][0]


def test_vqa_score_is_yes_against_no_in_the_next_token_logits(path):
    images = pictures()
    scores = LocalVqaScore(path, "float32")(images, PROMPTS, [{}] * 4)
    for image, prompt, score in zip(images, PROMPTS, scores, strict=True):
        last = by_hand(path, image, SHOWS.replace("{prompt}", prompt))[0][-1].exp()
        yes = sum(last[VOCABULARY[token]] for token in ("Yes", "yes", "▁Yes"))
        no = sum(last[VOCABULARY[token]] for token in ("No", "ĠNO"))
        assert_close(score, yes / (yes + no), atol=1e-4, rtol=0)
    assert scores.std() > 1e-2


def test_prompt_echo_is_the_mean_log_probability_of_the_prompt_alone(path):
    images = pictures()
    scores = PromptEcho(path, "float32")(images, PROMPTS, [{}] * 4)
    for image, prompt, score in zip(images, PROMPTS, scores, strict=True):
        log_probs, tokens = by_hand(path, image, QUERY, prompt)
        count = len(prompt.split())
        assert tokens[-count:].tolist() == [VOCABULARY[word] for word in prompt.split()]
        assert_close(
            score,
            sum(log_probs[i - 1, tokens[i]] for i in range(-count, 0)) / count,
            atol=1e-4,
            rtol=0,
        )


def test_prompt_echo_depends_on_the_image_and_the_query(path):
    echo, (one, two) = PromptEcho(path, "float32"), pictures(2)
    assert abs(echo([one], PROMPTS[:1], [{}]) - echo([two], PROMPTS[:1], [{}])) > 1e-3
    other = PromptEcho(path, "float32", query="Describe this image")
    assert abs(echo([one], PROMPTS[:1], [{}]) - other([one], PROMPTS[:1], [{}])) > 1e-3


def test_an_empty_prompt_is_not_scored_and_does_not_affect_others(path):
    echo, images = PromptEcho(path, "float32"), pictures(2)
    scores = echo(images, ["", PROMPTS[1]], [{}] * 2)
    assert scores[0].isnan()
    assert_close(scores[1:], echo(images[1:], PROMPTS[1:2], [{}]), atol=1e-4, rtol=0)


def scores_of(path: str, metadata: list[dict], passes: int) -> dict[str, torch.Tensor]:
    judges = [
        judge(path, "float32", images_per_pass=passes)
        for judge in (LocalVqaScore, LocalRewardDance, PromptEcho)
    ]
    return {judge.name: judge(pictures(), PROMPTS, metadata) for judge in judges}


def references(folder) -> list[dict]:
    sizes = [(28, 28), (64, 40), (40, 90), (56, 56)]
    for i, size in enumerate(sizes):
        pictures()[i].transpose(Image.Transpose.ROTATE_90).resize(size).save(folder / f"{i}.png")
    return [{"ref_image": str(folder / f"{i}.png")} for i in range(len(sizes))]


def test_scores_do_not_depend_on_the_batch_and_repeat_exactly(path, tmp_path):
    metadata = references(tmp_path)
    together, again, alone = (scores_of(path, metadata, passes) for passes in (4, 4, 1))
    for name, scores in together.items():
        assert torch.equal(scores, again[name])
        assert_close(scores, alone[name], atol=1e-4, rtol=0)
        assert scores.std() > 1e-3


def test_reward_dance_compares_the_image_with_its_reference(path, tmp_path):
    images, metadata = pictures(2), references(tmp_path)[:2]
    dance = LocalRewardDance(path, "float32")
    whole = dance(images, PROMPTS[:2], metadata)
    partly = dance(images, PROMPTS[:2], [{"ref_image": None}, metadata[1]])
    assert partly[0].isnan()
    assert_close(partly[1], whole[1], atol=1e-4, rtol=0)
    assert dance(images, PROMPTS[:2], [{"ref_image": ""}] * 2).isnan().all()
    images[0].save(tmp_path / "first.png")
    swapped = dance(
        [Image.open(metadata[0]["ref_image"])],
        PROMPTS[:1],
        [{"ref_image": str(tmp_path / "first.png")}],
    )
    assert abs(swapped[0] - whole[0]) > 1e-3


def test_weights_in_bfloat16_still_give_logits_in_float32(path):
    coarse = LocalVqaScore(path)
    logits = coarse.model.logits(coarse.model.encode([[pictures(1)[0], QUERY]], "right"), 0)
    assert coarse.model.model.dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    assert (logits != logits.bfloat16()).float().mean() > 0.9
    fine = LocalVqaScore(path, "float32")
    assert_close(
        *(judge(pictures(), PROMPTS, [{}] * 4) for judge in (coarse, fine)), atol=0.05, rtol=0
    )


def test_judges_of_one_path_share_their_weights(path):
    vqa, echo = LocalVqaScore(path, "float32"), PromptEcho(path, "float32")
    assert vqa.model is echo.model
    assert LocalVqaScore(path, "float16").model is not vqa.model


def test_a_run_can_use_a_judge_with_tensors(path):
    [reward] = load_rewards(
        {"flowalign.rewards.vlm.local:LocalVqaScore": {"path": path, "dtype": "float32"}}
    )
    pixels = torch.rand(4, 3, 40, 52)
    scores = reward(pixels, PROMPTS, [{}] * 4)
    assert scores.shape == (4,)
    assert reward.traits.range == (0, 1)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A folder with a model in which every word is followed by one other, whatever came before."""

    def make(answer: str) -> str:
        folder = tmp_path_factory.mktemp("chain")
        model, processor = qwen2_vl()
        for name, weight in model.model.language_model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.data.zero_()
        embedding = torch.eye(len(VOCABULARY), TEXT["hidden_size"])
        model.get_input_embeddings().weight.data = embedding
        words = [VOCABULARY[word] for word in ["assistant", *answer.split(), "<eos>"]]
        head = torch.zeros_like(embedding)
        head[words[1:]] = embedding[words[:-1]]
        model.get_output_embeddings().weight.data = head
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return str(folder)

    return make


def test_a_written_answer_becomes_a_score(chain):
    rubric = LocalRubric(chain("Final Score : 4"), "float32", images_per_pass=3)
    questions = [[image, "x"] for image in [*pictures(2), pictures(1)[0]]]
    questions[2][1] = "a longer question"
    assert rubric.generate(questions, 9) == ["Final Score : 4"] * 3
    assert_close(rubric(pictures(), PROMPTS, [{}] * 4), torch.full((4,), 4 / 5))


def test_a_written_answer_without_a_score_is_not_scored(chain):
    folder = chain("Final Score : 4")
    assert (
        LocalRubric(folder, "float32", max_new_tokens=3)(pictures(1), PROMPTS[:1], [{}])
        .isnan()
        .all()
    )
    assert LocalRubric(folder, "float32", form="tag")(pictures(1), PROMPTS[:1], [{}]).isnan().all()


def test_the_mean_log_likelihood_of_known_logits():
    shares = torch.tensor(
        [[0.5, 0.25, 0.25], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1], [1 / 3, 1 / 3, 1 / 3]]
    )
    tokens = torch.tensor([[0, 1, 2, 1]])
    selected = torch.tensor([[False, False, True, True]])
    mean = mean_log_likelihood(shares.log()[None], tokens, selected)
    assert_close(mean, torch.tensor([(math.log(0.6) + math.log(0.8)) / 2]))
    for position in (0, 1):
        other = tokens.clone()
        other[0, position] = 2
        assert torch.equal(mean_log_likelihood(shares.log()[None], other, selected), mean)


def test_settings_that_cannot_work_are_an_error_when_a_judge_is_opened(chain, tmp_path):
    folder = chain("4")
    with pytest.raises(UserError, match=r"rewards.vqa_score.question .* Write \{prompt\}"):
        LocalVqaScore(folder, question="Is this good?")
    with pytest.raises(UserError, match=r"rewards.rubric.max_new_tokens is 0"):
        LocalRubric(folder, max_new_tokens=0)
    with pytest.raises(UserError, match=r"rewards.prompt_echo.images_per_pass is 0"):
        PromptEcho(folder, images_per_pass=0)
    with pytest.raises(UserError, match=r"rewards.vqa_score.path: there is no folder"):
        LocalVqaScore(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"\.path is missing"):
        load_rewards({"flowalign.rewards.vlm.local:LocalVqaScore": 1.0})
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"rewards.vqa_score.path: "):
        LocalVqaScore(str(tmp_path))


def test_a_model_without_a_chat_template_is_an_error(tmp_path):
    model, processor = llava()
    processor.chat_template = None
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no chat template"):
        LocalVqaScore(str(tmp_path))


def test_a_vocabulary_without_a_token_for_yes_is_an_error(chain):
    folder = chain("4")
    words = Path(folder) / "tokenizer.json"
    words.write_text(re.sub(r'(Yes|yes)"', 'ja"', words.read_text()))
    with pytest.raises(
        UserError, match=r"rewards\.vqa_score\.path: .* no single token for yes or for no"
    ):
        LocalVqaScore(folder)


def test_a_missing_reference_is_an_error(chain):
    dance = LocalRewardDance(chain("4"), "float32")
    with pytest.raises(RunError, match=r"'a red circle' has no field 'ref_image'"):
        dance(pictures(1), PROMPTS[:1], [{}])
    with pytest.raises(
        RunError, match=r"rewards\.reward_dance: ref_image nowhere\.png does not exist"
    ):
        dance(pictures(1), PROMPTS[:1], [{"ref_image": "nowhere.png"}])


def test_a_question_keeps_its_own_braces(chain):
    seen = []

    class Listening(LocalVqaScore):
        def first_tokens(self, questions):
            seen.extend(questions)
            return super().first_tokens(questions)

    Listening(chain("4"), question='{"q": "{prompt}"}')(pictures(1), ["a {red} circle"], [{}])
    assert seen[0][1] == '{"q": "a {red} circle"}'
