"""The connections of a reward server: how many there are, and how long they may stay silent.

uvicorn waits for the headers of a request without end, and its `limit_concurrency` counts
connections that never sent any. A few hundred of them would therefore keep everyone else out.
"""

import asyncio
from enum import IntEnum

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 128
"""The most connections at a time. Processes may usually have 1024 open files."""
HEADER_SECONDS = 10.0
"""How long the headers of a request may take to arrive."""
ARRIVAL_SECONDS = 60.0
"""How long the body of a request may take to arrive."""
HEADER_BYTES = 2**14
"""The largest headers of a request."""
STOPPING_SECONDS = 10
"""How long requests may take to finish after SIGTERM or Ctrl-C."""


class Phase(IntEnum):
    """How far the present request of a connection has come."""

    WAITING = 0
    RECEIVING = 1
    ANSWERING = 2


class LimitedConnection(H11Protocol):
    """A connection that is closed if it waits for headers too long, or if there are too many.

    Beyond `MAX_CONNECTIONS`, one whose request is incomplete is closed for the new one. The first
    are those without complete headers, whose token is unknown: honest clients send them at once.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore
        """Wait for a request, and close another connection if there are too many."""
        super().connection_made(transport)
        self._wait(HEADER_SECONDS)
        known = [each for each in self.connections if isinstance(each, LimitedConnection)]
        # A closed connection leaves the set only later in the event loop.
        others = [each for each in known if each is not self and not each.transport.is_closing()]
        if len(others) >= MAX_CONNECTIONS:
            first = min(others, key=lambda each: (each.phase, each.since))
            closed = self if first.phase is Phase.ANSWERING else first
            closed.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self.deadline.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read a part of a request, and stop waiting once its headers are complete."""
        super().data_received(data)
        if self.phase is not Phase.WAITING:
            self.deadline.cancel()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        if self.phase is Phase.WAITING:
            # What is left of a rejected request is read and dropped: a client that is cut off
            # while it sends does not read the answer.
            is_sending = self.conn.their_state is h11.SEND_BODY
            self._wait(ARRIVAL_SECONDS if is_sending else HEADER_SECONDS)

    @property
    def phase(self) -> Phase:
        """How far the present request has come."""
        if self.cycle is None or self.cycle.response_complete:
            return Phase.WAITING
        return Phase.RECEIVING if self.cycle.more_body else Phase.ANSWERING

    def _wait(self, seconds: float) -> None:
        self.since = self.loop.time()
        self.deadline = self.loop.call_later(seconds, self.transport.abort)


def make_server(app: FastAPI) -> uvicorn.Server:
    """Make the server of an application, with limits on its connections."""
    config = uvicorn.Config(
        app,
        http=LimitedConnection,
        ws="none",
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_graceful_shutdown=STOPPING_SECONDS,
        log_config=None,
        log_level="warning",
    )
    return uvicorn.Server(config)
