"""The same judges behind a server with OpenAI's /v1/chat/completions, such as vLLM or SGLang.

PromptEcho is missing: it needs the log-probabilities of a given prompt, and chat servers return
those of their own answer only.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, KW_ONLY
from typing import Any, ClassVar, TypeVar

from PIL import Image

from flowalign.errors import RunError
from flowalign.rewards.remote.client import Endpoint, to_base64
from flowalign.rewards.vlm.questions import (
    LogProbs,
    Question,
    RewardDance,
    Rubric,
    VLMJudge,
    VqaScore,
)

PATH = "/chat/completions"
Answer = TypeVar("Answer")
Choice = dict[str, Any]
"""A choice of a chat completion, as JSON. Its content is checked where it is read."""


@dataclass
class ServerJudge(Endpoint, VLMJudge):
    """A judge on a server. `url` ends where the API begins, such as http://127.0.0.1:8000/v1."""

    model: str
    """The server's name of the model."""
    _: KW_ONLY
    token_variable: str = "OPENAI_API_KEY"
    """The environment variable with the token; without it, no token is sent."""
    concurrency: int = 8
    """How many requests are sent at once."""

    @property
    def key(self) -> str:
        """The name in messages."""
        return f"rewards.{self.name}"

    def open(self) -> None:
        """Open the session. The server is first contacted by the first question."""
        self.connect()

    def first_tokens(self, questions: list[Question]) -> list[LogProbs]:
        """Return the 20 likeliest first tokens of each answer."""
        # At temperature 1, every server's log-probabilities are the model's own.
        settings = {"max_tokens": 1, "logprobs": True, "top_logprobs": 20, "temperature": 1}
        return self._complete(questions, settings, self._top_tokens)

    def generate(self, questions: list[Question], max_new_tokens: int) -> list[str]:
        """Return the answers, decoded greedily."""
        settings = {"max_tokens": max_new_tokens, "temperature": 0}
        return self._complete(questions, settings, _text)

    def _complete(
        self,
        questions: list[Question],
        settings: Mapping[str, object],
        read: Callable[[Choice], Answer],
    ) -> list[Answer]:
        """Ask the questions, and return what `read` finds in each answer.

        Raises RunError with the address if an answer is missing or malformed.
        """

        def ask(question: Question) -> Answer:
            chat = [{"role": "user", "content": [_part(piece) for piece in question]}]
            text = self.request(PATH, {"model": self.model, "messages": chat, **settings})
            try:
                return read(json.loads(text)["choices"][0])
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise RunError(
                    f"{self.source(PATH)} answered something other than a chat completion: "
                    f"{text[:300]}"
                ) from error

        return self.ask_all(ask, questions)

    def _top_tokens(self, choice: Choice) -> LogProbs:
        tokens = (choice.get("logprobs") or {}).get("content")
        if tokens is None:
            raise RunError(
                f"{self.source(PATH)} gave no log-probabilities. Use a server that supports "
                "top_logprobs, as vLLM and SGLang do, or rubric_server, which needs none."
            )
        likeliest = tokens[0]["top_logprobs"] if tokens else []
        return [(top["token"], float(top["logprob"])) for top in likeliest]


def _text(choice: Choice) -> str:
    content = choice["message"]["content"]
    if content is not None and not isinstance(content, str):
        raise TypeError(f"the content is a {type(content).__name__}")
    return content or ""


def _part(piece: Image.Image | str) -> dict[str, object]:
    if isinstance(piece, str):
        return {"type": "text", "text": piece}
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{to_base64(piece)}"}}


@dataclass
class ServerVqaScore(VqaScore, ServerJudge):
    """Probability of yes, in [0, 1], to whether the image shows its prompt: vqa_score by a server.

    Not scored if neither yes nor no is among the 20 likeliest tokens. For models see vqa_score.
    """

    name: ClassVar[str] = "vqa_score_server"


@dataclass
class ServerRewardDance(RewardDance, ServerJudge):
    """Probability of yes, in [0, 1], to whether the image beats its reference: by a server.

    Not scored if neither yes nor no is among the 20 likeliest tokens. For models see reward_dance.
    """

    name: ClassVar[str] = "reward_dance_server"


@dataclass
class ServerRubric(Rubric, ServerJudge):
    """A written score from 1 to 5, divided by 5, in [0.2, 1]: rubric by a server.

    vLLM applies the model's own repetition penalty, which keeps it from repeating a score. Start
    it with `--generation-config vllm` to prevent that. For models see rubric.
    """

    name: ClassVar[str] = "rubric_server"
