"""Scores of one evaluation."""

from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from flowalign.errors import UserError
from flowalign.files import read_tensors, write_file
from flowalign.flow import PerImage


@dataclass
class EvaluationResult:
    """Every reward of every evaluation picture, in the order prompt, image, and some of the pictures."""

    prompt: Tensor  # (N,)  index of the prompt
    rewards: dict[str, PerImage]
    images: Tensor  # (n, 3, H, W)  bytes, of prompts spread over all
    shown: Tensor  # (n,)  index of their prompts
    held_out: dict[str, Tensor] = field(default_factory=dict)
    """(M,) each: figures of every entry of evaluation.pairs."""
    figures: dict[str, float] = field(default_factory=dict)
    """What tells of over-optimisation: `diversity`, `velocity_norm` and `velocity_moved`."""

    @property
    def means(self) -> dict[str, float]:
        return {
            name: score.nanmean().item() for name, score in (self.rewards | self.held_out).items()
        }

    @property
    def metrics(self) -> dict[str, float]:
        """The means and figures, by the names that are logged: `eval/NAME`."""
        return {f"eval/{name}": value for name, value in (self.means | self.figures).items()}

    def save(self, path: Path) -> None:
        figures = {"reward": self.rewards, "held_out": self.held_out}
        named = {
            f"{kind}/{name}": score.contiguous()
            for kind, scores in figures.items()
            for name, score in scores.items()
        }
        write_file(
            path, save({"prompt": self.prompt, "images": self.images, "shown": self.shown, **named})
        )

    @classmethod
    def load(cls, path: Path) -> "EvaluationResult":
        """UserError when the file is damaged."""
        try:
            found = read_tensors(path)
            if missing := {"prompt", "images", "shown"} - set(found):
                raise UserError(f"{path} is damaged: it has no {min(missing)}")
        except UserError as error:
            raise UserError(f"{error}. Remove it: the same command makes it again.") from None
        rewards, held_out = (
            {name.removeprefix(kind): found[name] for name in found if name.startswith(kind)}
            for kind in ("reward/", "held_out/")
        )
        return cls(found["prompt"], rewards, found["images"], found["shown"], held_out)
