"""Open the voting page for a model, a run, an adapter, a configuration, or a folder of pictures."""

import hashlib
import json
import shlex
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from filelock import FileLock, Timeout
from pydantic import Field

from flowalign import distributed
from flowalign.bundled import locate
from flowalign.config.load import load_config
from flowalign.config.resolved import resolve
from flowalign.data.examples import VoteSource
from flowalign.data.prompts import Prompt, read_prompts
from flowalign.data.votes import read_votes, VoteFile
from flowalign.errors import UserError
from flowalign.labelling.active import ActiveChoice
from flowalign.labelling.agreement import habits
from flowalign.labelling.albums import Album, FolderAlbum, ModelAlbum, SUFFIXES
from flowalign.labelling.questions import PICTURES
from flowalign.labelling.session import Session
from flowalign.models import load_model
from flowalign.models.base import FlowModel
from flowalign.policy import Policy
from flowalign.progress import say
from flowalign.rewards.features import BUNDLED_CLIP
from flowalign.rewards.taste import Taste, TasteFeatures
from flowalign.runs.adapter import ADAPTER_FILE
from flowalign.runs.environment import environment
from flowalign.sampling.sources import (
    evaluation_prompts,
    find_source,
    from_config,
    is_config_file,
    Source,
)
from flowalign.settings.merging import Section
from flowalign.settings.types import Count, Settings

STEP = 10**6
"""The step in the keys of voted pictures, plus the number of merged adapters. No run has as many
steps, so voted pictures have noise of their own."""
VOTES = "votes.jsonl"


@dataclass
class LabelSettings(Settings):
    """The questions, and where votes are stored. Raises WrongSetting for a value out of range."""

    mode: Literal["pair", "group", "thumbs"] = "pair"
    """Two pictures to compare, several of which the best and the worst are chosen, or one."""
    pictures: Annotated[int, Field(ge=2, le=9)] = PICTURES["group"]
    """Pictures of a question in a group."""
    questions: Count = 100
    """Questions for each voter, without repetitions."""
    prompts: str = ""
    """A prompt file; the training prompts of a run if empty."""
    votes: str = ""
    """The vote file; `votes.jsonl` beside the run or the pictures if empty."""
    voter: str = "voter"
    """The name that the page proposes."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seed of pictures, questions and their order."""
    choose: Literal["random", "active"] = "random"
    """The next pair: at random, or the one that would teach `rewards.taste` the most."""
    features: str = ""
    """The backbone of an active choice: a local folder or hub repository; empty for the bundled."""
    stores: bool = True
    """False to store keys alone and no picture files."""

    @property
    def per_question(self) -> int:
        """Pictures of a question."""
        return self.pictures if self.mode == "group" else PICTURES[self.mode]


def open_session(source: str, settings: LabelSettings, model: str | None = None) -> Session:
    """Load what makes the pictures, and the votes that were cast before.

    Raises:
        UserError: The source has no pictures and no model, there are no prompts, or the vote file
            belongs to other pictures.
    """
    folder = Path(locate(source)).expanduser()
    if folder.is_dir() and _holds_pictures(folder):
        file = _open_votes(Path(settings.votes or folder / VOTES), None)
        beside, count = file.path.parent, settings.per_question
        album: Album = FolderAlbum(folder, beside, count, settings.questions, settings.seed)
        return new_session(album, file, settings)
    return _session_of_model(source, settings, model)


def _holds_pictures(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()}
    if names & {"config.yaml", "model_index.json", ADAPTER_FILE, "adapter_config.json"}:
        return False
    return "metadata.jsonl" in names or any(Path(name).suffix.lower() in SUFFIXES for name in names)


def _session_of_model(source: str, settings: LabelSettings, model: str | None) -> Session:
    origin = merged(find_origin(source, model))
    prompts = label_prompts(origin, settings.prompts)
    place = Path(settings.votes).expanduser() if settings.votes else default_file(source)
    loaded = load_model(origin.model, str(distributed.device()))
    file = _open_votes(place, source_of(origin, loaded))
    # Adapters are put on as in training, and switched off: both compute alike to the last bit.
    sampler = origin.config.sampler if origin.config else origin.sampler
    album = ModelAlbum(
        policy=Policy(loaded, sampler).at("reference"),
        prompts=prompts,
        questions=settings.questions,
        pictures=settings.per_question,
        seed=settings.seed,
        step=STEP + len(origin.model.merge),
        folder=place.parent,
        storage=f"pictures/{_digest(file.source)}" if settings.stores else None,
    )
    return new_session(album, file, settings)


def new_session(album: Album, file: VoteFile, settings: LabelSettings) -> Session:
    """Return a session. Raises UserError if only pairs can be chosen actively."""
    choice = None
    if settings.choose == "active":
        if settings.mode != "pair":
            raise UserError("--choose active compares two pictures. Write --mode pair.")
        features = TasteFeatures(settings.features or BUNDLED_CLIP, "--features")
        choice = ActiveChoice(album, features, Taste.dimensions, Taste.deviation)
    return Session(album, file, settings.mode, settings.seed, choice)


def find_origin(source: str, model: str | None) -> Source:
    """Return the source of a YAML file, a run, an adapter or a model."""
    is_file = is_config_file(source)
    origin = from_config(load_config(source)) if is_file else find_source(source, model)
    # Pictures of `evaluation.model` are not what training could make again.
    return replace(origin, model=origin.config.model) if origin.config else origin


def merged(origin: Source) -> Source:
    """Return the same source with its adapter merged into the model.

    A run that begins with these weights by `model.merge` computes the same pictures.
    """
    # A run holds what it began with by `model.adapter`; a configuration begins with that adapter.
    adapter = str(origin.adapter) if origin.adapter else origin.model.adapter
    adapters = [*origin.model.merge, *([adapter] if adapter else [])]
    return replace(origin, model=replace(origin.model, merge=adapters, adapter="", compile=False))


def label_prompts(origin: Source, path: str) -> list[Prompt]:
    """Return the prompts of the questions. Raises UserError if there are none."""
    if path:
        return read_prompts(locate(path), "--prompts")
    if origin.config is None:
        raise UserError("There are no prompts. Give a prompt file: --prompts FILE.")
    if origin.config.data.prompts:
        return read_prompts(origin.config.data.prompts)
    return evaluation_prompts(origin.config)


def default_file(source: str) -> Path:
    """Return the vote file of a run, or one in `outputs/votes` for other models."""
    folder = Path(locate(source)).expanduser()
    if (folder / "config.yaml").is_file():
        return folder / "votes" / VOTES
    return Path("outputs") / "votes" / folder.stem / VOTES


def source_of(origin: Source, model: FlowModel) -> VoteSource:
    """Describe how the pictures are made."""
    about = environment(model.device, 1)
    return VoteSource(
        model=origin.model.path,
        merge=list(origin.model.merge),
        weights=model.weights_fingerprint(),
        height=origin.model.height,
        width=origin.model.width,
        sampler=sampler_section(origin),
        environment={"versions": about["versions"], "device": about["device"]},
    )


def sampler_section(origin: Source) -> Section:
    """Return the `sampler` section of the pictures, with every default."""
    if origin.config:
        section = resolve(origin.config)["sampler"]
        assert isinstance(section, dict)
        return section
    section = asdict(replace(origin.sampler, dynamics=None))
    section["window"]["range"] = list(section["window"]["range"])
    return {**section, "dynamics": {"name": "ode"}}


def _digest(source: VoteSource | None) -> str:
    """Return a short hash of how pictures are made."""
    assert source is not None
    made = f"{source.weights}/{source.height}x{source.width}/{json.dumps(source.sampler)}"
    return hashlib.blake2b(made.encode(), digest_size=4).hexdigest()


def _open_votes(path: Path, source: VoteSource | None) -> VoteFile:
    """Return the votes of a file, or a new file. Raises UserError if it is of other pictures."""
    path = path.expanduser()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return VoteFile(path, source, [])
    file = read_votes(path, "--votes")
    for name in ("weights", "height", "width", "sampler"):
        if getattr(file.source, name, None) != getattr(source, name, None):
            raise UserError(
                f"{path} holds votes on pictures that were made in another way, because {name} "
                "differs: a model that was trained further, or another sampler. Choose another "
                "file: --votes FILE."
            )
    return file


def serve(session: Session, voter: str, port: int, opens: bool) -> None:
    """Serve the voting page until the process is interrupted.

    Args:
        session: The votes.
        voter: The name that the page proposes.
        port: The port on 127.0.0.1; 0 for a free one.
        opens: True to open the page in a browser.
    """
    from flowalign.labelling.server import make_app, new_token
    from flowalign.rewards.remote.connections import make_server
    from flowalign.rewards.remote.server import listen

    token = new_token()
    with _only_page_of(session.file.path), listen("127.0.0.1", port) as incoming:
        address = f"http://127.0.0.1:{incoming.getsockname()[1]}/{token}/"
        say(f"Vote at {address}")
        say("Press Ctrl-C here when you have finished. Every vote is stored at once.")
        if opens:
            webbrowser.open(address)
        with suppress(KeyboardInterrupt):
            make_server(make_app(session, token, voter)).run(sockets=[incoming])
    session.close()
    report(session, say)


@contextmanager
def _only_page_of(votes: Path) -> Iterator[None]:
    """Hold the vote file while the block runs. Raises UserError if another page writes it."""
    lock = FileLock(f"{votes}.lock", timeout=0)
    try:
        with lock:
            yield
    except Timeout:
        raise UserError(
            f"Another page writes {votes}. Several voters use one page, by their names; or choose "
            "another file: --votes FILE."
        ) from None


def report(session: Session, tell: Callable[[str], None]) -> None:
    """Say what the votes are, and how to train on them."""
    for line in habits(session.file.votes).lines():
        tell(line)
    file = session.file
    if not file.votes:
        return
    tell(f"Votes: {file.path}")
    settings = [f"data.pairs={file.path}", 'evaluation.pairs=""', "train.images_per_prompt=1"]
    if file.source and file.source.merge:
        settings.append(f"model.merge=[{','.join(file.source.merge)}]")
    tell(f"Train on them: python train.py CONFIG {' '.join(map(shlex.quote, settings))}")
