"""The pictures of questions: made by a model while the voter looks, or of a folder."""

import hashlib
import io
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Protocol

from torch import Tensor

from flowalign.data.examples import ImageKey
from flowalign.data.prompts import Metadata, Prompt, prompts_of_step, read_objects
from flowalign.data.votes import VotedPicture
from flowalign.errors import UserError
from flowalign.files import write_file
from flowalign.policy import Policy
from flowalign.reporting.images import to_pil
from flowalign.rollouts.voted import draw

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Asked:
    """A prompt and the pictures that are compared."""

    prompt: Prompt
    pictures: tuple[VotedPicture, ...]


class Album(Protocol):
    """Questions by number. Equal numbers give equal questions in every session."""

    @property
    def questions(self) -> int:
        """The number of questions."""
        ...

    def question(self, number: int) -> Asked:
        """Return a question."""
        ...

    def load(self, number: int) -> list[bytes]:
        """Return the image files of a question, in the order of its pictures."""
        ...


@dataclass(frozen=True, kw_only=True)
class ModelAlbum:
    """Pictures that a model makes while the voter looks."""

    policy: Policy
    prompts: Sequence[Prompt]
    questions: int
    pictures: int
    """Pictures of a question."""
    seed: int
    step: int
    """The step in the keys, which no training and no evaluation uses."""
    folder: Path
    """The folder of the vote file."""
    storage: str | None
    """The folder of stored pictures in it, which differs between weights and samplers; None to
    store none."""

    def question(self, number: int) -> Asked:
        """Return a prompt of the file, shuffled anew for every pass over it, with keys."""
        (index,) = prompts_of_step(len(self.prompts), number, 1, self.seed)
        prompt = self.prompts[index]
        # Another prompt file must not show the pictures that were stored for this number.
        text = hashlib.blake2b(f"{prompt}/{self.pictures}".encode(), digest_size=4).hexdigest()
        start = f"{self.storage}/{self.seed}-{number:06d}-{text}"
        pictures = [
            VotedPicture(
                ImageKey(self.seed, self.step, number, image),
                f"{start}-{image}.png" if self.storage else None,
            )
            for image in range(self.pictures)
        ]
        return Asked(prompt, tuple(pictures))

    def load(self, number: int) -> list[bytes]:
        """Return the stored files, or make the pictures and store them."""
        asked = self.question(number)
        files = [self.folder / picture.file for picture in asked.pictures if picture.file]
        if files and all(file.is_file() for file in files):
            return [file.read_bytes() for file in files]
        keys = [picture.key for picture in asked.pictures if picture.key]
        contents = [_png(image) for image in draw(self.policy, asked.prompt, keys).images]
        for file, content in zip(files, contents, strict=False):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_file(file, content)
        return contents


def _png(image: Tensor) -> bytes:
    content = io.BytesIO()
    to_pil(image).save(content, "PNG")
    return content.getvalue()


class FolderAlbum:
    """Given pictures, of which those of one prompt are compared."""

    def __init__(self, folder: Path, votes: Path, pictures: int, questions: int, seed: int):
        """Choose questions. Raises UserError if no prompt has enough pictures.

        Args:
            folder: The pictures.
            votes: The folder of the vote file, to which the names of pictures are relative.
            pictures: Pictures of a question.
            questions: The most questions.
            seed: Seed of the choice.
        """
        self.folder = votes
        groups = _by_prompt(folder, votes)
        random = Random(f"questions/{seed}")
        sets = [
            Asked(Prompt(text, groups[text][0].metadata), tuple(file.picture for file in chosen))
            for text in groups
            for chosen in _chosen(groups[text], pictures, random)
        ]
        if not sets:
            raise UserError(
                f"{folder} has no prompt with {pictures} pictures. Write a metadata.jsonl with "
                '{"file_name": "a.png", "prompt": "a red circle"}, and the same prompt for '
                "pictures to compare."
            )
        self._asked = random.sample(sets, min(questions, len(sets)))

    @property
    def questions(self) -> int:
        """The number of questions."""
        return len(self._asked)

    def question(self, number: int) -> Asked:
        """Return a question."""
        return self._asked[number]

    def load(self, number: int) -> list[bytes]:
        """Read the files."""
        files = [picture.file for picture in self._asked[number].pictures if picture.file]
        return [(self.folder / file).read_bytes() for file in files]


@dataclass(frozen=True)
class _File:
    picture: VotedPicture
    metadata: Metadata


def _by_prompt(folder: Path, votes: Path) -> dict[str, list[_File]]:
    """Return the pictures of each prompt; all have the prompt "" without a `metadata.jsonl`."""
    groups: dict[str, list[_File]] = defaultdict(list)
    start = os.path.relpath(folder, votes)
    listing = folder / "metadata.jsonl"
    if not listing.is_file():
        names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
        return {"": [_File(VotedPicture(file=_joined(start, name)), {}) for name in names]}
    for entry, where in read_objects(listing, "label"):
        name, prompt = entry.get("file_name"), entry.get("prompt", entry.get("text"))
        if not isinstance(name, str) or not isinstance(prompt, str):
            raise UserError(
                f"{where} does not name a picture and its prompt. Write "
                '{"file_name": "a.png", "prompt": "a red circle"}.'
            )
        if not (folder / name).is_file():
            raise UserError(f"{where}: the image {name} does not exist. Correct its name.")
        metadata = {
            key: value for key, value in entry.items() if key not in ("file_name", "prompt")
        }
        groups[prompt].append(_File(VotedPicture(file=_joined(start, name)), metadata))
    return groups


def _joined(start: str, name: str) -> str:
    return os.path.normpath(os.path.join(start, name))


def _chosen(files: Sequence[_File], count: int, random: Random) -> list[list[_File]]:
    """Return sets of `count` pictures of one prompt, in which each picture occurs about equally."""
    if len(files) < count:
        return []
    shuffled = random.sample(list(files), len(files))
    # Each picture with its neighbours in a ring, so that comparisons connect all of them.
    ring = [*shuffled, *shuffled[: count - 1]]
    sets = len(shuffled) if len(shuffled) > count else 1
    return [ring[start : start + count] for start in range(sets)]
