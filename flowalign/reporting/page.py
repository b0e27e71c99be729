"""The page of one or several runs: one file that needs no network and asks no server."""

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader
from markupsafe import escape, Markup

from flowalign.config.changes import Changes
from flowalign.evaluation.results import EvaluationResult
from flowalign.evaluation.thumbnails import pictured_prompts
from flowalign.reporting import curves, votes
from flowalign.reporting.cards import Card, Picture, picture_of
from flowalign.reporting.curves import Curve, Logged, make_curves
from flowalign.reporting.record import RunRecord, Snippet, Table
from flowalign.reporting.votes import count_votes, Votes

FOLDER = Path(__file__).parent
TEMPLATE, STYLE, SCRIPT = "report.html.jinja", "report.css", "report.js"
GALLERY_PROMPTS = 6
"""The prompts of the gallery through training."""


class Gallery(NamedTuple):
    """Pictures of some prompts after some steps of a run."""

    run: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Picture | None]]]
    """Prompt, and its picture in each column."""


class RunSections(NamedTuple):
    """The parts that a page has once for each run."""

    name: str
    model: str
    objective: str
    snippets: Sequence[Snippet]
    changes: Changes | None
    config: str
    environment: str


@dataclass(frozen=True, kw_only=True)
class Page:
    """Everything that the template shows, in its order."""

    title: str
    subtitle: str
    verdict: Sequence[str]
    """The first sentences."""
    scores: Table
    notes: Sequence[str]
    """Sentences about the columns and intervals."""
    remarks: Sequence[str]
    """Sentences that ask the reader to do something, such as to export a better step."""
    sides: Sequence[str]
    """The labels of what the cards compare."""
    left: int
    """The side that stands left at first; the last one stands right."""
    rewards: Sequence[str]
    cards: Sequence[Card]
    tags: Sequence[Table]
    votes: Sequence[Votes]
    groups: Sequence[tuple[str, Sequence[Curve]]]
    galleries: Sequence[Gallery]
    differing: Table | None
    """Settings in which several runs differ."""
    runs: Sequence[RunSections]

    @property
    def data(self) -> dict[str, object]:
        """The content that the script of the page reads."""
        return {
            "curves": [curve.data for _, group in self.groups for curve in group],
            "width": curves.WIDTH,
        }


def render(page: Page) -> bytes:
    """Return the page as an HTML file.

    Prompts, names of rewards and paths come from the user, and every value is escaped. A browser
    runs the script of this package alone, and loads nothing.
    """
    templates = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters["breakable"] = _breakable
    style, script = ((FOLDER / name).read_text(encoding="utf-8") for name in (STYLE, SCRIPT))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = templates.get_template(TEMPLATE).render(
        page=page,
        style=Markup(style),
        script=Markup(script),
        digest=digest,
        curves=curves,
        votes=votes,
    )
    # Prompts may hold halves of characters, which no encoding has.
    return text.encode("utf-8", "replace")


def _breakable(name: str) -> Markup:
    """Return a name that a browser may break after a dot, a line or a stroke."""
    return Markup(re.sub(r"([._/])", r"\1<wbr>", str(escape(name))))


def sections_of(record: RunRecord) -> RunSections:
    """Return what a page shows of a run beside its pictures and figures."""
    return RunSections(
        name=record.name,
        model=record.model,
        objective=record.objective,
        snippets=record.snippets,
        changes=record.changes,
        config=record.config,
        environment=record.environment,
    )


def curves_of(records: Sequence[RunRecord]) -> list[tuple[str, list[Curve]]]:
    """Return the curves of all metrics of some runs."""
    logged = [
        Logged(label=record.name, entries=record.metrics, before=record.metrics_before)
        for record in records
    ]
    guided = records[0].guided
    return make_curves(logged, guided.metrics if guided else {})


def votes_of(records: Sequence[RunRecord]) -> list[Votes]:
    """Return how each run sides with its held-out votes."""
    counted = [count_votes(record.name, record.before, record.after) for record in records]
    return [entry for entry in counted if entry]


def gallery_of(record: RunRecord) -> Gallery | None:
    """Return the pictures through the training of a run, or None if there are none on the way."""
    columns: Mapping[str, EvaluationResult] = {
        **({"base": record.before} if record.before else {}),
        **{f"step {step}": result for step, result in record.steps.items()},
    }
    if not record.steps:
        return None
    prompts = [
        int(result.prompt[row])
        for result in [next(reversed(columns.values()))]
        for row in result.thumbnails
    ]
    few = [prompts[place] for place in pictured_prompts(len(prompts), GALLERY_PROMPTS)]
    pictures = {label: _by_prompt(result) for label, result in columns.items()}
    rows = [
        (_text(record, prompt), [picture_of(column.get(prompt)) for column in pictures.values()])
        for prompt in few
    ]
    return Gallery(record.name, list(columns), rows) if rows else None


def _by_prompt(result: EvaluationResult) -> dict[int, bytes]:
    return {int(result.prompt[row]): file for row, file in result.thumbnails.items()}


def _text(record: RunRecord, prompt: int) -> str:
    known = prompt < len(record.prompts)
    return record.prompts[prompt].text if known else f"prompt {prompt + 1}"
