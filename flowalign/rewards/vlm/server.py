"""The same judges behind a server that speaks OpenAI's /v1/chat/completions, such as vLLM or SGLang.

PromptEcho has no such form: it needs the log-probabilities of a given prompt, and chat servers give those of their answer only.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, KW_ONLY
from typing import Any, ClassVar, TypeVar

from PIL import Image

from flowalign.errors import RunError
from flowalign.rewards.remote.client import Server, to_base64
from flowalign.rewards.vlm.questions import (
    LogProbs,
    Question,
    RewardDance,
    Rubric,
    VLMJudge,
    VqaScore,
)

Answer = TypeVar("Answer")


@dataclass
class ServerJudge(Server, VLMJudge):
    """`url` is where the server's API begins, such as http://127.0.0.1:8000/v1."""

    model: str
    """What the server calls the model."""
    _: KW_ONLY
    token_variable: str = "OPENAI_API_KEY"
    concurrency: int = 8

    @property
    def key(self) -> str:
        return f"rewards.{self.name}"

    def open(self) -> None:
        self.connect()

    def first_tokens(self, questions: list[Question]) -> list[LogProbs]:
        # At temperature 1 every server's log-probabilities are the model's.
        return self._ask(
            questions,
            {"max_tokens": 1, "logprobs": True, "top_logprobs": 20, "temperature": 1},
            self._top_tokens,
        )

    def write(self, questions: list[Question], max_new_tokens: int) -> list[str]:
        return self._ask(questions, {"max_tokens": max_new_tokens, "temperature": 0}, _written)

    def _ask(
        self, questions: list[Question], settings: dict[str, Any], read: Callable[[Any], Answer]
    ) -> list[Answer]:
        """What `read` finds in the answer to each question. RunError with the address when one cannot be had."""

        def answer(question: Question) -> Answer:
            chat = [{"role": "user", "content": [_part(piece) for piece in question]}]
            text = self.ask(
                "/chat/completions", {"model": self.model, "messages": chat, **settings}
            )
            try:
                return read(json.loads(text)["choices"][0])
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise RunError(
                    f"{self._source} answered what is no chat completion: {text[:300]}"
                ) from error

        return self.together(answer, questions)

    @property
    def _source(self) -> str:
        return self.source("/chat/completions")

    def _top_tokens(self, choice: dict[str, Any]) -> LogProbs:
        tokens = (choice.get("logprobs") or {}).get("content")
        if tokens is None:
            raise RunError(
                f"{self._source} gave no log-probabilities; "
                "use a server that knows top_logprobs, as vLLM and SGLang do, or rubric_server, which needs none."
            )
        return [
            (top["token"], float(top["logprob"]))
            for first in tokens[:1]
            for top in first["top_logprobs"]
        ]


def _written(choice: dict[str, Any]) -> str:
    """The answer; null stands for none."""
    return "" + (choice["message"]["content"] or "")  # TypeError for anything but a text


def _part(piece: Image.Image | str) -> dict[str, Any]:
    if isinstance(piece, str):
        return {"type": "text", "text": piece}
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{to_base64(piece)}"}}


@dataclass
class ServerVqaScore(VqaScore, ServerJudge):
    """As vqa_score, in [0, 1], of the same models; not scored where neither yes nor no is among the 20 likeliest tokens."""

    name: ClassVar[str] = "vqa_score_server"


@dataclass
class ServerRewardDance(RewardDance, ServerJudge):
    """As reward_dance, in [0, 1], of the same models; not scored where neither yes nor no is among the 20 likeliest tokens."""

    name: ClassVar[str] = "reward_dance_server"


@dataclass
class ServerRubric(Rubric, ServerJudge):
    """As rubric, in [0.2, 1], of the same models: a written score from 1 to 5, divided by 5.

    vLLM applies the model's own repetition penalty, which keeps it from repeating a score, unless it is started with
    `--generation-config vllm`.
    """

    name: ClassVar[str] = "rubric_server"
