"""Vision-language models of transformers as judges, and PromptEcho, which only they can answer (arXiv 2604.12652).

PromptEcho: with c the prompt's tokens,   r = 1/|c| Σ_i log p(c_i | image, query, c_<i)
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal
from weakref import WeakValueDictionary

import torch
from PIL import Image
from torch import nn, Tensor
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor, ProcessorMixin

from flowalign import distributed
from flowalign.errors import UserError
from flowalign.flow import PerImage
from flowalign.models.hub import pretrained
from flowalign.rewards.base import traits
from flowalign.rewards.vlm.questions import (
    LogProbs,
    meaning,
    Question,
    RewardDance,
    Rubric,
    VLMJudge,
    VqaScore,
)

Tokens = dict[str, Tensor]
"""What a model is given: input_ids and attention_mask (B, T), pictures in its own form."""


class VisionLanguageModel:
    """A model with its processor, on this process's device; its logits are float32 whatever the weights are."""

    def __init__(self, key: str, path: str, dtype: str) -> None:
        self.processor = pretrained(AutoProcessor, key, path)
        if not isinstance(self.processor, ProcessorMixin) or self.processor.chat_template is None:
            raise UserError(
                f"{key}: {path} has no chat template; take a model tuned to follow instructions."
            )
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.model = pretrained(AutoModelForImageTextToText, key, path, dtype=getattr(torch, dtype))
        self.model.eval().requires_grad_(False).to(distributed.device())
        head = self.model.get_output_embeddings()
        head.weight = nn.Parameter(
            head.weight.float(), requires_grad=False
        )  # in bfloat16, logits near 20 are 0.125 apart
        head.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))

    @cached_property
    def yes_and_no(self) -> dict[str, int]:
        """All spellings in the vocabulary."""
        return {
            token: i
            for token, i in self.tokenizer.get_vocab().items()
            if meaning(token) in ("yes", "no")
        }

    def encode(self, questions: list[Question], padding_side: Literal["left", "right"]) -> Tokens:
        """Questions as chats of one turn, up to where the answer begins."""
        chats = [
            [{"role": "user", "content": [_part(piece) for piece in question]}]
            for question in questions
        ]
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
        """Of the positions from `first` on, (B, T - first, vocabulary)."""
        count = inputs["input_ids"].shape[1] - first
        return self.model(**inputs, logits_to_keep=count, use_cache=False).logits[:, -count:]

    def first_tokens(self, questions: list[Question]) -> Tensor:
        """Log-probabilities of `yes_and_no` after each question, (B, spellings)."""
        inputs = self.encode(
            questions, "right"
        )  # what follows a question cannot change what is answered
        last = inputs["attention_mask"].sum(1) - 1
        first = int(last.min())
        rows = torch.arange(len(last), device=last.device)
        log_probs = self.logits(inputs, first)[rows, last - first].log_softmax(-1)
        return log_probs[:, list(self.yes_and_no.values())]

    def log_likelihood(self, questions: list[Question], answers: list[str]) -> PerImage:
        """Of the answers' tokens, their mean."""
        question = self.encode(questions, "right")
        first = int(question["attention_mask"].sum(1).min()) - 1
        texts = [
            self.tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers
        ]
        inputs, answered = followed_by(question, texts, self.tokenizer.pad_token_id)
        return mean_log_likelihood(
            self.logits(inputs, first), inputs["input_ids"][:, first:], answered[:, first:]
        )

    def write(self, questions: list[Question], max_new_tokens: int) -> list[str]:
        """Answers by greedy decoding."""
        inputs = self.encode(questions, "left")
        written = self.model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,  # a model's own would keep it from giving two axes one score
            max_new_tokens=max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return self.tokenizer.batch_decode(
            written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )


def mean_log_likelihood(logits: Tensor, tokens: Tensor, asked: Tensor) -> PerImage:
    """Mean of log p(token | those before) over the tokens asked for, NaN for none; logits (B, T, words), the others (B, T)."""
    log_prob = -F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    asked = asked[:, 1:]
    return torch.where(asked, log_prob, 0).sum(1) / asked.sum(1)


def followed_by(inputs: Tokens, texts: list[list[int]], pad: int) -> tuple[Tokens, Tensor]:
    """Inputs padded on the right with a text after each row, and where the texts stand, (B, T)."""
    shape, ends = inputs["input_ids"].shape, inputs["attention_mask"].sum(1).tolist()
    room = (0, max(len(text) for text in texts))
    longer = {
        name: F.pad(value, room) if value.shape == shape else value
        for name, value in inputs.items()
    }
    longer["input_ids"] = F.pad(inputs["input_ids"], room, value=pad)
    written = torch.zeros_like(longer["input_ids"], dtype=torch.bool)
    for row, (end, text) in enumerate(zip(ends, texts, strict=True)):
        place = slice(end, end + len(text))
        longer["input_ids"][row, place] = torch.tensor(
            text, dtype=torch.long, device=written.device
        )
        longer["attention_mask"][row, place] = 1
        written[row, place] = True
    return longer, written


def _part(piece: Image.Image | str) -> dict[str, Any]:
    return (
        {"type": "text", "text": piece}
        if isinstance(piece, str)
        else {"type": "image", "image": piece}
    )


OPENED: WeakValueDictionary[tuple[str, str], VisionLanguageModel] = WeakValueDictionary()
"""Rewards with one path and dtype share one model."""


@dataclass
class LocalJudge(VLMJudge):
    path: str
    """A local folder or a hub repository that transformers opens for image-text-to-text, with a chat template."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of the weights; the last layer, which gives the logits, is kept in float32."""
    images_per_pass: int = 8
    """How many pictures are judged at once."""

    def open(self) -> None:
        if self.images_per_pass < 1:
            raise UserError(
                f"rewards.{self.name}.images_per_pass is {self.images_per_pass}; use 1 or more."
            )
        shared = OPENED.get((self.path, self.dtype))
        self.model = shared or VisionLanguageModel(
            f"rewards.{self.name}.path", self.path, self.dtype
        )
        OPENED[self.path, self.dtype] = self.model
        if {meaning(token) for token in self.model.yes_and_no} != {"yes", "no"}:
            raise UserError(
                f"rewards.{self.name}.path: the vocabulary of {self.path} has no single token for yes or for no."
            )

    @torch.no_grad()
    def first_tokens(self, questions: list[Question]) -> list[LogProbs]:
        rows = [
            row
            for part in self._passes(questions)
            for row in self.model.first_tokens(part).tolist()
        ]
        return [list(zip(self.model.yes_and_no, row, strict=True)) for row in rows]

    @torch.no_grad()
    def write(self, questions: list[Question], max_new_tokens: int) -> list[str]:
        return [
            text
            for part in self._passes(questions)
            for text in self.model.write(part, max_new_tokens)
        ]

    def _passes(self, rows: list[Any]) -> list[list[Any]]:
        return [
            rows[start : start + self.images_per_pass]
            for start in range(0, len(rows), self.images_per_pass)
        ]


@dataclass
class LocalVqaScore(VqaScore, LocalJudge):
    """Probability of yes, in [0, 1], to whether the picture shows its prompt.

    For example Qwen/Qwen2.5-VL-7B-Instruct (17 GB in bfloat16, Apache-2.0), Qwen/Qwen3-VL-8B-Instruct (18 GB, Apache-2.0); not
    a model that thinks first, whose answer does not begin with yes or no.
    """

    name: ClassVar[str] = "vqa_score"


@dataclass
class LocalRewardDance(RewardDance, LocalJudge):
    """Probability of yes, in [0, 1], to whether the picture is better than its prompt's reference, the file `ref_image` names.

    RewardDance's own weights are not public; for example Qwen/Qwen2.5-VL-7B-Instruct (17 GB in bfloat16, Apache-2.0) or another
    that takes two pictures.
    """

    name: ClassVar[str] = "reward_dance"


@dataclass
class LocalRubric(Rubric, LocalJudge):
    """A written score from 1 to 5, divided by 5, so in [0.2, 1]; not scored where the answer holds none.

    For example CodeGoat24/UnifiedReward-2.0-qwen3vl-8b (18 GB in bfloat16, licence: see its card), or
    Qwen/Qwen2.5-VL-7B-Instruct (17 GB, Apache-2.0).
    """

    name: ClassVar[str] = "rubric"


@traits(range=(-torch.inf, 0), images="pil")
@dataclass
class PromptEcho(LocalJudge):
    """Mean log-likelihood of the prompt's tokens as the answer to a fixed query about the picture, below 0; one forward.

    For example Qwen/Qwen3-VL-32B-Instruct (67 GB in bfloat16, Apache-2.0; the paper's), Qwen/Qwen2.5-VL-7B-Instruct (17 GB,
    Apache-2.0): the larger the better.
    """

    name: ClassVar[str] = "prompt_echo"

    query: str = "Describe this image in detail"
    """What the prompt is taken to answer; it counts for nothing itself."""

    def __post_init__(self) -> None:
        self.open()

    @torch.no_grad()
    def __call__(
        self, images: list[Image.Image], prompts: list[str], metadata: list[dict[str, Any]]
    ) -> PerImage:
        pairs = list(zip(images, prompts, strict=True))
        return torch.cat(
            [
                self.model.log_likelihood(
                    [[image, self.query] for image, _ in part], [p for _, p in part]
                )
                for part in self._passes(pairs)
            ]
        )
