"""Questions about an image for a vision-language model, and how its answers become scores.

Who answers is a `VLMJudge`: a local model (vlm/local.py) or a server (vlm/server.py).
    vqa_score:    does the image show its prompt? P(yes) (VQAScore, arXiv 2404.01291)
    reward_dance: is it better than a reference? P(yes) (RewardDance, arXiv 2509.08826)
    rubric:       written scores from 1 to 5 (as UnifiedReward's, arXiv 2503.05236)
"""

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from PIL import Image

from flowalign.data.prompts import Metadata
from flowalign.errors import UserError
from flowalign.flow import PerImage
from flowalign.rewards.base import traits
from flowalign.rewards.reference_pictures import read_reference, reference_file

Question = list[Image.Image | str]
"""Images and texts in the order in which the model sees them."""
LogProbs = list[tuple[str, float]]
"""Tokens, as text or as the tokenizer writes them, with their log-probabilities."""

SHOWS = 'Does this figure show "{prompt}"? Please answer Yes or No.'
BETTER = (
    'Both images were made for the prompt "{prompt}". Looking at how well each follows the prompt '
    "and how good a picture it is, is image 1 better than image 2? Please answer Yes or No."
)
SUBJECT = 'This image was made for the prompt "{prompt}". '
FINAL = (
    "Judge how well it follows the prompt (objects, attributes, relations) and how good a picture "
    "it is (clarity, detail, colour, beauty). Say briefly what you see, then end with one score "
    "from 1 to 5, written as\nFinal Score: x"
)
AXES = (
    "Score it from 1 to 5 on three axes: alignment, how well its content matches the prompt; "
    "coherence, how free it is of glitches and distortions; style, how beautiful it is, whatever "
    "the prompt. Answer in these three lines:\n"
    "Alignment Score (1-5): x\nCoherence Score (1-5): x\nStyle Score (1-5): x"
)
TAG = (
    "Score it from 1 (nothing the prompt asks for) to 5 (all of it, in a good picture). Answer "
    "with\n<Score>x</Score>"
)

# "4" and "4/5" match, "1-5" and "4/10" do not. Only blanks may stand between the number and what
# makes it a range or a fraction, so that the next line has no say.
RANGE = r"[ \t]*(?:[-–]|to)[ \t]*\d"
OTHER_SCALE = r"[ \t]*(?:/|out of)[ \t]*(?!5\b)\d"
NUMBER = rf"(\d+(?:\.\d+)?)(?![\d.,]*\d|{RANGE}|{OTHER_SCALE})"
# Models write labels with Markdown, quotes or brackets around them.
LABELLED = r"\b{label}\s+score[\s*_\"']*(?:\(1\s*[-–]\s*5\))?[\s*_\"']*:[\s*_\"'(\[]*" + NUMBER
LABELS = ("final", "alignment", "coherence", "style")
SCORES = {label: LABELLED.replace("{label}", label) for label in LABELS}
SCORES["tag"] = rf"<score>\s*{NUMBER}[^<]*</score>"
FORMS = {
    "final": (FINAL, ["final"]),
    "axes": (AXES, ["alignment", "coherence", "style"]),
    "alignment": (AXES, ["alignment"]),
    "coherence": (AXES, ["coherence"]),
    "style": (AXES, ["style"]),
    "tag": (TAG, ["tag"]),
}
"""The question of each form, and the scores of the answer that are averaged."""


def yes_probability(log_probs: LogProbs) -> float:
    """Return P(yes) / (P(yes) + P(no)), each summed over its spellings; NaN without either.

    Raises ValueError if a log-probability is NaN.
    """
    if any(math.isnan(value) for _, value in log_probs):
        raise ValueError("the judge gave a log-probability of NaN. Run it in bfloat16 or float32.")
    return torch.sigmoid(_log_sum(log_probs, "yes") - _log_sum(log_probs, "no")).item()


def _log_sum(log_probs: LogProbs, answer: str) -> torch.Tensor:
    values = [value for token, value in log_probs if normalise_token(token) == answer]
    # Without a spelling this is -inf, and -inf - (-inf) is NaN: not scored.
    return torch.tensor(values, dtype=torch.float64).logsumexp(0)


def normalise_token(token: str) -> str:
    """Lower a token's case and strip the marks of a leading space."""
    return token.strip(" \n▁Ġ").lower()


def parse_rubric(text: str, scores: list[str]) -> float:
    """Return the mean of the named scores; NaN if one is missing or not from 1 to 5."""
    values = [_last_score(name, text) for name in scores]
    return sum(values) / len(values) if all(1 <= value <= 5 for value in values) else math.nan


def _last_score(name: str, text: str) -> float:
    # The last one: a model that reasons in writing decides at the end.
    matches = re.findall(SCORES[name], text, re.IGNORECASE)
    return float(matches[-1]) if matches else math.nan


def fill(question: str, prompt: str) -> str:
    """Insert the prompt. Not `str.format`, because other braces in either must stay."""
    return question.replace("{prompt}", prompt)


class VLMJudge(ABC):
    """Answers questions about images."""

    name: ClassVar[str]
    """The reward's name in messages."""

    @abstractmethod
    def open(self) -> None:
        """Load the model, or connect to its server. Raises UserError if that fails."""

    @abstractmethod
    def first_tokens(self, questions: list[Question]) -> list[LogProbs]:
        """Return the likely first tokens of each answer, among them those for yes and no."""

    @abstractmethod
    def generate(self, questions: list[Question], max_new_tokens: int) -> list[str]:
        """Return the answers, decoded greedily."""

    def check_question(self, question: str) -> None:
        """Raise UserError if the question has no place for the prompt."""
        if "{prompt}" not in question:
            raise UserError(
                f"rewards.{self.name}.question is {question!r}, which does not contain the prompt. "
                "Write {prompt} where the prompt belongs."
            )


@traits(range=(0, 1), images="pil")
@dataclass
class VqaScore(VLMJudge):
    """Probability of yes to whether the image shows its prompt."""

    question: str = SHOWS
    """A question to answer with yes or no, with {prompt} in place of the prompt."""

    def __post_init__(self) -> None:
        self.check_question(self.question)
        self.open()

    def __call__(
        self, images: list[Image.Image], prompts: list[str], metadata: list[Metadata]
    ) -> PerImage:
        questions = _questions(self.question, images, prompts)
        return torch.tensor([yes_probability(tokens) for tokens in self.first_tokens(questions)])


@traits(range=(0, 1), images="pil")
@dataclass
class RewardDance(VLMJudge):
    """Probability of yes to whether the image is better than its prompt's reference."""

    question: str = BETTER
    """A question to answer with yes or no: image 1 is the one to score, image 2 the reference."""

    def __post_init__(self) -> None:
        self.check_question(self.question)
        self.open()

    def __call__(
        self, images: list[Image.Image], prompts: list[str], metadata: list[Metadata]
    ) -> PerImage:
        questions: dict[int, Question] = {}
        for i, (image, prompt, entry) in enumerate(zip(images, prompts, metadata, strict=True)):
            file = reference_file(self.name, prompt, entry)
            if file:
                reference = read_reference(self.name, file)
                text = fill(self.question, prompt)
                questions[i] = ["Image 1:", image, "Image 2:", reference, text]
        answers = self.first_tokens([*questions.values()])
        scores = torch.full((len(images),), math.nan)
        scores[list(questions)] = torch.tensor([yes_probability(tokens) for tokens in answers])
        return scores


@traits(range=(0, 1), images="pil")
@dataclass
class Rubric(VLMJudge):
    """A written score from 1 to 5, divided by 5."""

    form: Literal["final", "axes", "alignment", "coherence", "style", "tag"] = "final"
    """The answer's form: "Final Score: x", UnifiedReward's three axes or one, <Score>x</Score>."""
    question: str = ""
    """A question for that form, with {prompt} in place of the prompt; empty for the default one.

    A model that was trained to judge needs the words of its model card.
    """
    max_new_tokens: int = 256
    """The longest answer, in tokens."""

    def __post_init__(self) -> None:
        default, self.scores = FORMS[self.form]
        self.question = self.question or SUBJECT + default
        self.check_question(self.question)
        if self.max_new_tokens < 1:
            raise UserError(
                f"rewards.{self.name}.max_new_tokens is {self.max_new_tokens}. Set it to 1 or more."
            )
        self.open()

    def __call__(
        self, images: list[Image.Image], prompts: list[str], metadata: list[Metadata]
    ) -> PerImage:
        answers = self.generate(_questions(self.question, images, prompts), self.max_new_tokens)
        return torch.tensor([parse_rubric(answer, self.scores) / 5 for answer in answers])


def _questions(question: str, images: list[Image.Image], prompts: list[str]) -> list[Question]:
    pairs = zip(images, prompts, strict=True)
    return [[image, fill(question, prompt)] for image, prompt in pairs]
