"""Rewards elsewhere: behind `flowalign reward serve`, in another environment or on another machine; JSON with PNG images.

POST {url}/v1/score {"images": [base64 PNG], "prompts": [...], "metadata": [...]} -> {"scores": [number or null]};
GET {url}/health -> {"name", "level", "range"}. A server that has others to answer first says 503 with a header `BUSY`.
"""

import base64
import io
import json
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, KW_ONLY
from typing import Any

import requests
from PIL import Image
from requests.adapters import HTTPAdapter
from torch import Tensor
from urllib3.exceptions import HTTPError, ReadTimeoutError
from urllib3.util import Retry

from flowalign.errors import RunError, UserError
from flowalign.rewards.adapters import to_pil
from flowalign.rewards.base import Traits

TRANSIENT = {408, 429, *range(500, 600)}
BUSY = "x-flowalign-busy"
LONGEST = 2**24
"""Bytes of an answer."""


class Patience(Retry):
    """Tries again, but not where the time was up; while a server says that it is busy, that counts as no try."""

    def increment(
        self,
        method: str | None = None,
        url: str | None = None,
        response: Any = None,
        error: Exception | None = None,
        _pool: Any = None,
        _stacktrace: Any = None,
    ) -> Any:
        if isinstance(error, ReadTimeoutError):
            raise error
        if response is not None and BUSY in response.headers:
            return self
        return super().increment(method, url, response, error, _pool, _stacktrace)


@dataclass
class Server:
    """Where a program answers JSON with JSON, and how long one waits for it."""

    url: str
    _: KW_ONLY
    token_variable: str = "FLOWALIGN_TOKEN"
    """The environment variable that holds the token; none is sent when it is not set."""
    seconds: float = 60.0
    """How long to wait for an answer to begin, and then for its end."""
    concurrency: int = 2
    """How many questions are asked at once."""
    retries: int = 8
    """How often one is asked again when the connection fails or the server answers 408, 429 or 5xx: 8 are half a minute."""

    @property
    def key(self) -> str:
        """For messages."""
        return f"rewards.{self.url}"

    def connect(self) -> None:
        """UserError where the settings cannot work."""
        if not self.url.startswith(("http://", "https://")):
            raise UserError(
                f"{self.key}.url is {self.url!r}; write an address, such as http://127.0.0.1:8000."
            )
        if self.seconds <= 0 or self.concurrency < 1 or self.retries < 0:
            raise UserError(
                f"{self.key}: seconds must be above 0, concurrency 1 or more, and retries 0 or more."
            )
        self.session = requests.Session()
        self.session.auth = _bearer(token_in(self.token_variable))
        again = Patience(
            self.retries, backoff_factor=0.5, backoff_max=8, status_forcelist=TRANSIENT
        )
        again.allowed_methods, again.raise_on_status, again.respect_retry_after_header = (
            None,
            False,
            False,
        )
        for scheme in ("http://", "https://"):
            self.session.mount(
                scheme, HTTPAdapter(pool_maxsize=self.concurrency, max_retries=again)
            )

    def address(self, path: str) -> str:
        return f"{self.url.rstrip('/')}{path}"

    def source(self, path: str) -> str:
        """For messages."""
        return f"{self.key}: {self.address(path)}"

    def ask(self, path: str, body: dict[str, Any] | None = None) -> str:
        """The answer to a POST, or without a body to a GET. RunError with the address when there is none."""
        method = "GET" if body is None else "POST"
        try:
            with self.session.request(
                method, self.address(path), json=body, timeout=self.seconds, stream=True
            ) as reply:
                text = self._read(reply)
        except requests.exceptions.InvalidJSONError as error:
            raise RunError(
                f"{self.source(path)} cannot be asked: a field of the prompts is no JSON: {error}"
            ) from error
        except (requests.RequestException, HTTPError) as error:
            raise RunError(f"{self.source(path)} did not answer: {error}") from error
        if not reply.ok:
            raise RunError(f"{self.source(path)} answered {reply.status_code}: {text[:300]}")
        return text

    def _read(self, reply: requests.Response) -> str:
        """To its end, as it comes: what drips has no end."""
        until, said = time.monotonic() + self.seconds, bytearray()
        while piece := reply.raw.read1(2**16, decode_content=True):
            said += piece
            if len(said) > LONGEST or time.monotonic() > until:
                raise requests.Timeout(
                    f"{len(said)} bytes in {self.seconds:g} seconds were not all of it"
                )
        return said.decode(errors="replace")

    def together(self, ask: Callable[[Any], Any], questions: list[Any]) -> list[Any]:
        """Answers in the order of the questions."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(ask, questions))


@dataclass
class RemoteReward(Server):
    """A reward behind `flowalign reward serve`; its level and range are those of the reward served."""

    batch: int = 32
    """Images a request."""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise UserError(f"{self.key}.batch is {self.batch}; it must be 1 or more.")
        self.connect()
        self.session.mount(
            self.address("/health"), HTTPAdapter()
        )  # what is not there when a run starts is not waited for
        try:
            self.traits = _traits(json.loads(self.ask("/health")))
        except RunError as error:
            raise UserError(
                f"{error}\nStart one there: flowalign reward serve NAME --port PORT."
            ) from error
        except (ValueError, LookupError, TypeError, UserError) as error:
            raise UserError(
                f"{self.key}: what answers there is no flowalign reward serve ({error})."
            ) from error

    def __call__(
        self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> list[float]:
        pictures = [to_base64(picture) for picture in to_pil(images)]
        size = self.batch if self.traits.level == "pointwise" else len(pictures)
        bodies = [
            {
                "images": pictures[i : i + size],
                "prompts": prompts[i : i + size],
                "metadata": metadata[i : i + size],
            }
            for i in range(0, len(pictures), size)
        ]
        return [score for scores in self.together(self._score, bodies) for score in scores]

    def _score(self, body: dict[str, Any]) -> list[float]:
        text = self.ask("/v1/score", body)
        expected = len(body["prompts"])
        try:
            scores = [
                None if score is None else float(score) for score in json.loads(text)["scores"]
            ]
        except (ValueError, LookupError, TypeError):
            raise RunError(f"{self.key} answered what is no list of scores: {text[:300]}") from None
        if len(scores) != expected:
            raise RunError(
                f"{self.key} answered {len(scores)} scores; expected {expected}, one an image."
            )
        if wrong := [score for score in scores if score is not None and not math.isfinite(score)]:
            raise RunError(
                f"{self.key} answered {wrong[0]}; scores are finite, and null where there is none."
            )
        return [math.nan if score is None else score for score in scores]


def _traits(found: Any) -> Traits:
    """What the server says of its reward. ValueError, LookupError or TypeError where it does not."""
    low, high = found["range"]
    if found["level"] not in ("pointwise", "group"):
        raise ValueError(f"level is {found['level']!r}")
    return Traits(
        found["level"],
        "tensor",
        (-math.inf if low is None else float(low), math.inf if high is None else float(high)),
    )


def to_base64(picture: Image.Image) -> str:
    """As a PNG, which loses nothing."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def token_in(variable: str) -> str:
    """The token that an environment variable holds, or nothing. UserError where it cannot be sent; the token is never shown."""
    token = os.environ.get(variable, "").strip()
    if not token.isascii() or not token.isprintable():
        raise UserError(
            f"the environment variable {variable} holds what no token has: write visible letters of ASCII."
        )
    return token


def _bearer(token: str) -> Callable[[requests.PreparedRequest], requests.PreparedRequest]:
    """Sends the token and nothing else: without this, requests looks for passwords in ~/.netrc."""

    def sign(request: requests.PreparedRequest) -> requests.PreparedRequest:
        if token:
            request.headers["Authorization"] = f"Bearer {token}"
        return request

    return sign
