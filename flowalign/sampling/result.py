"""Pictures that were sampled, with prompts and scores, and the files they are saved to."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from torch import Tensor

from flowalign.errors import UserError
from flowalign.files import to_json, write_file
from flowalign.reporting.images import save_before_after, save_picture, save_sheet, to_pil
from flowalign.reporting.summary import Interval

BEFORE_AFTER, SHEET, STRIP = "before-after.png", "pictures.png", "strengths.png"
SCORES, REWARDS = "scores.json", "rewards.json"
FOLDERS = ("before", "after", "pictures", "strengths")
NAMES = (BEFORE_AFTER, SHEET, STRIP, SCORES, REWARDS, *FOLDERS)
"""Everything that `SampleResult.save` may write into its folder."""


@dataclass(frozen=True, kw_only=True)
class SampleResult:
    """Pictures with their prompts and scores; all lists have one entry per picture."""

    images: Tensor
    """(N, 3, H, W) in bytes, prompt by prompt."""
    prompts: list[str]
    """Text of each picture."""
    prompt_numbers: list[int]
    """Position of each picture's prompt in the list of prompts, from 0."""
    image_numbers: list[int]
    """Number of each picture among those of its prompt, from 0."""
    seed: int
    """Seed of all pictures. Noise is drawn from seed, prompt number and image number."""
    scores: dict[str, list[float]]
    """Each reward of each picture; NaN if a reward gave no score."""
    means: dict[str, float]
    """Mean of each reward."""
    adapters: tuple[str, ...] = ()
    """The adapters that were used, each with its strength if that is not 1."""
    before: "SampleResult | None" = None
    """The same prompts and noise without the adapter."""
    strip: Mapping[float, "SampleResult"] = field(default_factory=dict)
    """The same prompts and noise at each strength of a strip; empty without one."""
    difference: dict[str, Interval]
    """Low end, mean and high end of the 95 % interval of each reward's change."""

    @property
    def prompt_count(self) -> int:
        """Number of prompts: what the intervals rest on."""
        return len(set(self.prompt_numbers))

    @property
    def names(self) -> list[str]:
        """File names without ending, such as "003-a-red-circle-image0-seed0"."""
        keys = zip(self.prompt_numbers, self.prompts, self.image_numbers, strict=True)
        return [
            f"{number:03d}-{_slug(prompt)}-image{image}-seed{self.seed}"
            for number, prompt, image in keys
        ]

    def pil(self) -> list[Image.Image]:
        """Return the pictures as PIL images."""
        return [to_pil(image) for image in self.images]

    def save(self, folder: str | Path) -> Path:
        """Save single pictures, a labelled sheet and a JSON file of scores.

        Returns the path of the sheet. Raises UserError if the folder holds such files already.
        """
        # Checked here too: the folder may have been filled while the pictures were made.
        folder = free_folder(Path(folder).expanduser())
        if self.strip:
            return self._save_strip(folder)
        if self.before:
            self.before._save_pictures(folder / "before")
            self._save_pictures(folder / "after")
            sheet = folder / BEFORE_AFTER
            save_before_after(self.before.images, self.images, self.prompts, sheet)
            entries = self.before._entries("before") + self._entries("after")
            write_file(folder / REWARDS, to_json(self._rewards(), indent=2).encode())
        else:
            entries = self._entries("pictures")
            self._save_pictures(folder / "pictures")
            sheet = folder / SHEET
            save_sheet({"": self.images}, self.prompts, sheet)
        write_file(folder / SCORES, to_json(entries, indent=2).encode())
        return sheet

    def _save_strip(self, folder: Path) -> Path:
        """Save a row of pictures for every strength, and the single pictures. Return the sheet."""
        entries = []
        for strength, result in self.strip.items():
            name = f"strengths/{strength:g}"
            result._save_pictures(folder / name)
            entries += [{**entry, "strength": strength} for entry in result._entries(name)]
        rows = {f"{strength:g}": result.images for strength, result in self.strip.items()}
        save_sheet(rows, self.prompts, folder / STRIP)
        write_file(folder / SCORES, to_json(entries, indent=2).encode())
        return folder / STRIP

    def _save_pictures(self, folder: Path) -> None:
        for name, image in zip(self.names, self.images, strict=True):
            save_picture(image, folder / f"{name}.png")

    def _rewards(self) -> dict[str, object]:
        assert self.before is not None
        return {
            "before": self.before.means,
            "after": self.means,
            "difference": self.difference,
            "adapter": " + ".join(self.adapters),
            "prompts": self.prompt_count,
        }

    def _entries(self, folder: str) -> list[dict[str, object]]:
        """Return one entry per picture: its file, what it was made from, and its scores."""
        return [
            {
                "file": f"{folder}/{name}.png",
                "prompt": self.prompts[i],
                "seed": self.seed,
                "image": self.image_numbers[i],
                "scores": {reward: values[i] for reward, values in self.scores.items()},
            }
            for i, name in enumerate(self.names)
        ]


def free_folder(folder: Path) -> Path:
    """Return the folder. Raises UserError if pictures of an earlier call are in it."""
    present = [name for name in NAMES if (folder / name).exists()]
    if present:
        raise UserError(f"{folder} holds {present[0]} already. Choose another folder: --output.")
    return folder


def next_folder(folder: Path) -> Path:
    """Return the folder, or the first of folder-2, folder-3, ... that does not exist."""
    number = 2
    candidate = folder
    while candidate.exists():
        candidate, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    return candidate


def _slug(text: str) -> str:
    """Return the start of a text in characters that every file system takes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:40].strip("-")
