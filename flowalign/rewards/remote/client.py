"""Score images with a reward behind `flowalign reward serve`, in another process or machine.

The protocol is JSON with PNG images:
    GET  {url}/health    -> {"name", "level", "range": [low or null, high or null]}
    POST {url}/v1/score  {"images": [base64 PNG], "prompts": [...], "metadata": [...]}
                         -> {"scores": [number or null]}
A server that is busy with other requests answers 503 with the header `BUSY`.
"""

import base64
import io
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, KW_ONLY
from typing import TypeVar

import requests
from PIL import Image
from requests.adapters import HTTPAdapter
from torch import Tensor
from urllib3.exceptions import HTTPError, ProtocolError

from flowalign.data.prompts import Metadata
from flowalign.errors import RunError, UserError
from flowalign.rewards.adapters import to_pil
from flowalign.rewards.base import Traits
from flowalign.rewards.worker import has_ended, in_background

TRANSIENT = {408, 429, *range(500, 600)}
REDIRECTS = range(300, 400)
BUSY = "x-flowalign-busy"
BUSY_PAUSE = 1.0
"""How long to wait before a request that found the server busy is sent again, in seconds."""
BUSY_SECONDS = 1800.0
"""How long a busy server is awaited."""
LONGEST_PAUSE = 8.0
"""The longest wait before a failed request is repeated, in seconds."""
MAX_BYTES = 2**24
"""The largest answer that is read, in bytes."""

Body = dict[str, Sequence[object]]
Question = TypeVar("Question")
Answer = TypeVar("Answer")


class Transient(RunError):
    """A failure that another attempt may not have, such as a lost connection."""


class Busy(RunError):
    """The server is busy with other requests."""


class Redirected(RunError):
    """The server names another address, which never gets the images."""


@dataclass
class Endpoint:
    """A server that answers JSON with JSON, and how long to wait for it."""

    url: str
    """The address, with scheme and port."""
    _: KW_ONLY
    token_variable: str = "FLOWALIGN_TOKEN"
    """The environment variable with the token; without it, no token is sent."""
    seconds: float = 60.0
    """How long an attempt may take, from the connection to the last byte of the answer."""
    concurrency: int = 2
    """How many requests are sent at once."""
    retries: int = 8
    """How often a request is repeated after a failed connection, 408, 429 or 5xx; 8 take 30 s."""

    @property
    def key(self) -> str:
        """The name in messages."""
        return f"rewards.{self.url}"

    def connect(self) -> None:
        """Open the session. Raises UserError if the settings cannot work."""
        if not self.url.startswith(("http://", "https://")):
            raise UserError(
                f"{self.key}.url is {self.url!r}. Write an address, such as http://127.0.0.1:8000."
            )
        if self.seconds <= 0 or self.concurrency < 1 or self.retries < 0:
            raise UserError(
                f"{self.key}: a limit is out of range. "
                "Set seconds above 0, concurrency to 1 or more, and retries to 0 or more."
            )
        self.session = requests.Session()
        self.session.auth = _bearer(token_in(self.token_variable))
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(pool_maxsize=self.concurrency))

    def address(self, path: str) -> str:
        """Return the full address of a path."""
        return f"{self.url.rstrip('/')}{path}"

    def source(self, path: str) -> str:
        """Return the name of a path in messages."""
        return f"{self.key}: {self.address(path)}"

    def request(self, path: str, body: Mapping[str, object]) -> str:
        """Send a POST, again after transient failures, and return the answer's text.

        Raises RunError with the address if there is no answer or its status is an error.
        """
        data = self._encode(path, body)
        # A server's own Retry-After is ignored: it could name an hour.
        pauses = [min(0.25 * 2**n, LONGEST_PAUSE) for n in range(self.retries)]
        patience = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                return self.attempt(path, data)
            except Busy:
                if time.monotonic() > patience:
                    raise
                time.sleep(BUSY_PAUSE)
            # Scoring has no side effects, so a POST can be repeated.
            except Transient:
                if not pauses:
                    raise
                time.sleep(pauses.pop(0))

    def attempt(self, path: str, data: bytes | None = None) -> str:
        """Send a POST, or a GET without data, once, and return the answer's text.

        Raises RunError with the address if there is no answer in time or its status is an error.
        """
        # The timeouts of sockets limit only the gaps between bytes, and a server could send one
        # byte of its headers at a time. So the exchange runs in a thread that can be abandoned.
        task = in_background(self._exchange, path, data)
        if not has_ended(task, self.seconds):
            # Final: the server may still be at work, and a retry would double the load.
            raise RunError(
                f"{self.source(path)} did not answer: the request timed out after "
                f"{self.seconds:g} seconds. Look at the server, or set a larger `seconds`."
            )
        return task.result()

    def _encode(self, path: str, body: Mapping[str, object]) -> bytes:
        try:
            return json.dumps(body, allow_nan=False).encode()
        except (ValueError, TypeError, RecursionError) as error:
            raise RunError(
                f"{self.source(path)} cannot be called: a prompt's metadata cannot be written as "
                f"JSON ({error}). Correct the prompt file."
            ) from error

    def _exchange(self, path: str, data: bytes | None) -> str:
        try:
            with self.session.request(
                "GET" if data is None else "POST",
                self.address(path),
                data=data,
                headers={"Content-Type": "application/json"},
                # Half, so that a machine that is being restarted counts as a failed connection.
                timeout=(self.seconds / 2, self.seconds),
                allow_redirects=False,
                stream=True,
            ) as reply:
                text = self._read(path, reply)
        except (requests.ConnectionError, ProtocolError) as error:
            raise Transient(f"{self.source(path)} did not answer: {error}") from error
        except (requests.RequestException, HTTPError) as error:
            raise RunError(f"{self.source(path)} did not answer: {error}") from error
        self._check(path, reply, text)
        return text

    def _read(self, path: str, reply: requests.Response) -> str:
        body = bytearray()
        while piece := reply.raw.read1(2**16, decode_content=True):
            body += piece
            if len(body) > MAX_BYTES:
                raise RunError(
                    f"{self.source(path)} sent more than {MAX_BYTES} bytes. Correct the address."
                )
        return body.decode(errors="replace")

    def _check(self, path: str, reply: requests.Response, text: str) -> None:
        """Raise RunError, or the kind of it that says what to do, for an answer with an error."""
        if reply.status_code in REDIRECTS:
            target = reply.headers.get("location", "")[:300]
            raise Redirected(
                f"{self.source(path)} answered {reply.status_code} and redirects to {target!r}, "
                "but images are sent to no other address. If it is right, write it instead."
            )
        if reply.ok:
            return
        problem = f"{self.source(path)} answered {reply.status_code}: {text[:300]}"
        if BUSY in reply.headers:
            raise Busy(problem)
        raise (Transient if reply.status_code in TRANSIENT else RunError)(problem)

    def ask_all(self, ask: Callable[[Question], Answer], questions: list[Question]) -> list[Answer]:
        """Ask several questions at once, and return the answers in their order."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(ask, questions))


@dataclass
class RemoteReward(Endpoint):
    """A reward behind `flowalign reward serve`, with the level and range of the served reward."""

    batch: int = 32
    """Images per request."""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise UserError(f"{self.key}.batch is {self.batch}. Set it to 1 or more.")
        self.connect()
        # Without retries: a server that is absent when a run starts is an error, not a delay.
        try:
            self.traits = _traits(json.loads(self.attempt("/health")))
        except Redirected as error:
            raise UserError(str(error)) from error
        except RunError as error:
            raise UserError(
                f"{error}\nStart one there: flowalign reward serve NAME --port PORT."
            ) from error
        except (ValueError, LookupError, TypeError, UserError) as error:
            raise UserError(
                f"{self.key} is not a server of `flowalign reward serve` ({error}). "
                "Correct the address."
            ) from error

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> list[float]:
        encoded = [to_base64(picture) for picture in to_pil(images)]
        # A reward of groups needs all images in one request.
        size = self.batch if self.traits.level == "pointwise" else len(encoded)
        parts = [slice(start, start + size) for start in range(0, len(encoded), size)]
        bodies: list[Body] = [
            {"images": encoded[part], "prompts": prompts[part], "metadata": metadata[part]}
            for part in parts
        ]
        scores: list[float] = []
        for part_scores in self.ask_all(self._score, bodies):
            scores += part_scores
        return scores

    def _score(self, body: Body) -> list[float]:
        text, count = self.request("/v1/score", body), len(body["images"])
        try:
            scores = [_finite_or_missing(score) for score in json.loads(text)["scores"]]
        except (ValueError, LookupError, TypeError) as error:
            raise RunError(
                f"{self.key} answered something other than a list of finite numbers and null "
                f"({error}): {text[:300]}"
            ) from None
        if len(scores) != count:
            raise RunError(
                f"{self.key} answered {len(scores)} scores for {count} images. "
                "It must return one number per image."
            )
        return scores


def _finite_or_missing(score: object) -> float:
    if score is None:
        return math.nan
    if not isinstance(score, int | float) or not math.isfinite(score):
        raise ValueError(f"{score!r} is not a finite number")
    return float(score)


def _traits(health: dict[str, object]) -> Traits:
    """Read the level and range of a served reward. Raises ValueError, LookupError or TypeError."""
    level, ends = health["level"], health["range"]
    if level not in ("pointwise", "group") or not isinstance(ends, list):
        raise ValueError(f"level is {level!r} and range {ends!r}")
    low, high = ends
    # JSON has no infinity, so an open end is null.
    low, high = -math.inf if low is None else float(low), math.inf if high is None else float(high)
    return Traits(level=level, range=(low, high))  # pyright: ignore[reportArgumentType]


def to_base64(picture: Image.Image) -> str:
    """Encode a picture as a PNG, which keeps every bit, in base64."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def token_in(variable: str) -> str:
    """Return the token in an environment variable, or an empty string.

    Raises UserError if HTTP cannot carry it. The message never shows the token.
    """
    token = os.environ.get(variable, "").strip()
    if not token.isascii() or not token.isprintable():
        raise UserError(
            f"The token in the environment variable {variable} has characters that cannot be sent. "
            "Use printable ASCII."
        )
    return token


def _bearer(token: str) -> Callable[[requests.PreparedRequest], requests.PreparedRequest]:
    """Sign requests with the token. Without an `auth`, requests would send what ~/.netrc holds."""

    def sign(request: requests.PreparedRequest) -> requests.PreparedRequest:
        if token:
            request.headers["Authorization"] = f"Bearer {token}"
        return request

    return sign
