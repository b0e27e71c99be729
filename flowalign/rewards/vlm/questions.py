"""What a vision-language model is asked about a picture, and how its answer becomes a score; who answers is a `Judge`.

vqa_score: is this what the prompt says? P(yes) (VQAScore, arXiv 2404.01291). reward_dance: is it better than a reference?
P(yes) (RewardDance, arXiv 2509.08826). rubric: written scores from 1 to 5 (as UnifiedReward's, arXiv 2503.05236).
"""

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from PIL import Image

from flowalign.errors import UserError
from flowalign.flow import PerImage
from flowalign.rewards.base import traits
from flowalign.rewards.reference_pictures import read_reference, reference_file

Question = list[Image.Image | str]
"""Pictures and texts in the order they are shown."""
LogProbs = list[tuple[str, float]]
"""Tokens, as text or as the tokenizer writes them, with their log-probabilities."""

SHOWS = 'Does this figure show "{prompt}"? Please answer Yes or No.'
BETTER = (
    'Both images were made for the prompt "{prompt}". Looking at how well each follows the prompt and how good a picture it is, '
    "is image 1 better than image 2? Please answer Yes or No."
)
SUBJECT = 'This image was made for the prompt "{prompt}". '
FINAL = (
    "Judge how well it follows the prompt (objects, attributes, relations) and how good a picture it is (clarity, detail, "
    "colour, beauty). Say briefly what you see, then end with one score from 1 to 5, written as\nFinal Score: x"
)
AXES = (
    "Score it from 1 to 5 on three axes: alignment, how well its content matches the prompt; coherence, how free it is of "
    "glitches and distortions; style, how beautiful it is, whatever the prompt. Answer in these three lines:\n"
    "Alignment Score (1-5): x\nCoherence Score (1-5): x\nStyle Score (1-5): x"
)
TAG = "Score it from 1 (nothing the prompt asks for) to 5 (all of it, in a good picture). Answer with\n<Score>x</Score>"

# "4" and "4/5", not "1-5" or "4/10"; what follows on another line is no part of it
NUMBER = r"(\d+(?:\.\d+)?)(?![\d.,]*\d|[ \t]*(?:[-–]|to)[ \t]*\d|[ \t]*(?:/|out of)[ \t]*(?!5\b)\d)"
LABELLED = r"\b{label}\s+score[\s*_\"']*(?:\(1\s*[-–]\s*5\))?[\s*_\"']*:[\s*_\"'(\[]*" + NUMBER
SCORES = {
    **{
        label: LABELLED.replace("{label}", label)
        for label in ("final", "alignment", "coherence", "style")
    },
    "tag": rf"<score>\s*{NUMBER}[^<]*</score>",
}
FORMS = {
    "final": (FINAL, ["final"]),
    "axes": (AXES, ["alignment", "coherence", "style"]),
    "alignment": (AXES, ["alignment"]),
    "coherence": (AXES, ["coherence"]),
    "style": (AXES, ["style"]),
    "tag": (TAG, ["tag"]),
}
"""What is asked, and which scores of the answer are averaged."""


def yes_probability(log_probs: LogProbs) -> float:
    """P(yes) / (P(yes) + P(no)), each summed over its spellings; NaN where neither is among the tokens."""
    if any(math.isnan(value) for _, value in log_probs):
        raise ValueError("the judge gave a log-probability of NaN; run it in bfloat16 or float32")
    yes, no = (
        torch.tensor(
            [value for token, value in log_probs if meaning(token) == answer], dtype=torch.float64
        ).logsumexp(0)
        for answer in ("yes", "no")
    )
    return torch.sigmoid(yes - no).item()


def meaning(token: str) -> str:
    """A token without case and the marks of a leading space."""
    return token.strip(" \n▁Ġ").lower()


def parse_rubric(text: str, scores: list[str]) -> float:
    """The mean of the named scores; NaN where one is missing or not from 1 to 5."""
    found = [_last_score(name, text) for name in scores]
    return sum(found) / len(found) if all(1 <= score <= 5 for score in found) else math.nan


def _last_score(name: str, text: str) -> float:
    """A judge that thinks aloud decides at the end."""
    found = re.findall(SCORES[name], text, re.IGNORECASE)
    return float(found[-1]) if found else math.nan


def fill(question: str, prompt: str) -> str:
    """The question about one prompt; other braces in either stay as they are."""
    return question.replace("{prompt}", prompt)


class VLMJudge(ABC):
    """Answers questions about pictures."""

    name: ClassVar[str]
    """The reward's, for messages."""

    @abstractmethod
    def open(self) -> None:
        """Loads or reaches what answers. UserError where that cannot be."""

    @abstractmethod
    def first_tokens(self, questions: list[Question]) -> list[LogProbs]:
        """How each answer may begin: the tokens for yes and no, of those that are at all likely."""

    @abstractmethod
    def write(self, questions: list[Question], max_new_tokens: int) -> list[str]:
        """The answers, written with the likeliest token each time."""

    def check_question(self, question: str) -> None:
        """UserError where it does not ask about the prompt."""
        if "{prompt}" not in question:
            raise UserError(
                f"rewards.{self.name}.question is {question!r}; write {{prompt}} where the prompt belongs."
            )


@traits(range=(0, 1), images="pil")
@dataclass
class VqaScore(VLMJudge):
    """P(yes) that the picture shows its prompt."""

    question: str = SHOWS
    """Answered with yes or no; {prompt} stands for the prompt."""

    def __post_init__(self) -> None:
        self.check_question(self.question)
        self.open()

    def __call__(
        self, images: list[Image.Image], prompts: list[str], metadata: list[dict[str, Any]]
    ) -> PerImage:
        questions: list[Question] = [
            [image, fill(self.question, prompt)]
            for image, prompt in zip(images, prompts, strict=True)
        ]
        return torch.tensor(
            [yes_probability(log_probs) for log_probs in self.first_tokens(questions)]
        )


@traits(range=(0, 1), images="pil")
@dataclass
class RewardDance(VLMJudge):
    """P(yes) that the picture is better than its prompt's reference; `ref_image` of the prompt is the path of that."""

    question: str = BETTER
    """Answered with yes or no; image 1 is the one to score, image 2 the reference, {prompt} stands for the prompt."""

    def __post_init__(self) -> None:
        self.check_question(self.question)
        self.open()

    def __call__(
        self, images: list[Image.Image], prompts: list[str], metadata: list[dict[str, Any]]
    ) -> PerImage:
        questions: dict[int, Question] = {}
        for i, (image, prompt, entry) in enumerate(zip(images, prompts, metadata, strict=True)):
            if file := reference_file(self.name, prompt, entry):
                reference = read_reference(self.name, file)
                questions[i] = [
                    "Image 1:",
                    image,
                    "Image 2:",
                    reference,
                    fill(self.question, prompt),
                ]
        scores = torch.full((len(images),), math.nan)
        scores[list(questions)] = torch.tensor(
            [yes_probability(seen) for seen in self.first_tokens([*questions.values()])]
        )
        return scores


@traits(range=(0, 1), images="pil")
@dataclass
class Rubric(VLMJudge):
    """A written score, divided by 5."""

    form: Literal["final", "axes", "alignment", "coherence", "style", "tag"] = "final"
    """What the answer has: "Final Score: x"; UnifiedReward's three axes, averaged or one of them; <Score>x</Score>."""
    question: str = ""
    """Asks for that form, {prompt} standing for the prompt; empty: ours. A model trained to judge wants the words of its card."""
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        asked, self.scores = FORMS[self.form]
        self.question = self.question or SUBJECT + asked
        self.check_question(self.question)
        if self.max_new_tokens < 1:
            raise UserError(
                f"rewards.{self.name}.max_new_tokens is {self.max_new_tokens}; use 1 or more."
            )
        self.open()

    def __call__(
        self, images: list[Image.Image], prompts: list[str], metadata: list[dict[str, Any]]
    ) -> PerImage:
        questions: list[Question] = [
            [image, fill(self.question, prompt)]
            for image, prompt in zip(images, prompts, strict=True)
        ]
        return torch.tensor(
            [
                parse_rubric(text, self.scores) / 5
                for text in self.write(questions, self.max_new_tokens)
            ]
        )
