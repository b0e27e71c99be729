"""The web server of the voting page. It answers this machine alone, and only with its token."""

import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, Field
from starlette.middleware.base import RequestResponseEndpoint

from flowalign.labelling.session import Session

PAGE = Path(__file__).with_name("page.html")
HOSTS = ("127.0.0.1", "localhost")
POLICY = (
    "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
"""The page takes nothing from other places, whatever a prompt contains."""

Voter = Annotated[str, Field(min_length=1, max_length=80)]


class Answer(BaseModel):
    """The body of a vote."""

    voter: Voter
    place: int = Field(ge=0)
    choice: str = Field(max_length=20)
    seconds: float = Field(ge=0, le=86_400)


class Undo(BaseModel):
    """The body of an undo."""

    voter: Voter


def new_token() -> str:
    """Return a random part of the page's address."""
    return secrets.token_urlsafe(16)


def make_app(session: Session, token: str, voter: str) -> FastAPI:
    """Make the server of a session.

    Args:
        session: The votes.
        token: The first part of every address; others are answered with 404.
        voter: The name that the page proposes.
    """
    app = FastAPI(title="flowalign label", docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def admit(request: Request, answer: RequestResponseEndpoint) -> Response:
        # A page of another site could reach this machine under a name of its own (DNS rebinding).
        if request.headers.get("host", "").partition(":")[0] not in HOSTS:
            return Response("This page answers 127.0.0.1 alone.", 403)
        first = request.url.path.strip("/").split("/")[0]
        if not secrets.compare_digest(first.encode(), token.encode()):
            return Response("The address lacks its token. Open the printed one.", 404)
        response = await answer(request)
        response.headers["content-security-policy"] = POLICY
        response.headers["cache-control"] = "no-store"
        response.headers["x-content-type-options"] = "nosniff"
        response.headers["referrer-policy"] = "no-referrer"
        return response

    @app.get(f"/{token}/")
    def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    @app.get(f"/{token}/question")
    def question(voter: str = voter) -> dict[str, object]:
        return _state(session, voter)

    @app.get(f"/{token}/picture/{{place}}/{{position}}")
    def picture(place: int, position: int, voter: str) -> Response:
        try:
            content = session.picture(voter, place, position)
        except IndexError as error:
            raise HTTPException(404, str(error)) from None
        return Response(content, media_type="image/png")

    @app.post(f"/{token}/vote")
    def vote(answer: Answer) -> dict[str, object]:
        try:
            session.vote(answer.voter, answer.place, answer.choice, answer.seconds)
        except (ValueError, IndexError) as error:
            raise HTTPException(422, str(error)) from None
        return _state(session, answer.voter)

    @app.post(f"/{token}/undo")
    def undo(body: Undo) -> dict[str, object]:
        session.undo(body.voter)
        return _state(session, body.voter)

    return app


def _state(session: Session, voter: str) -> dict[str, object]:
    """Return what the page shows a voter."""
    shown, habits = session.next(voter), session.habits(voter)
    return {
        "voter": voter,
        "mode": session.mode,
        "question": shown and asdict(shown),
        "votes": habits.votes,
        "seconds": round(habits.seconds, 1),
        "repeated": habits.repeated,
        "agreed": habits.agreed,
        "summary": habits.lines(),
    }
