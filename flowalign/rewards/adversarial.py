"""Adv-GRPO: a reward that learns to tell the policy's pictures from reference pictures (arXiv 2511.20256).

With e a picture's unit feature vector of d numbers in a frozen backbone, the reward is the logit of a small head,
    h(e) = w₂ · gelu(W₁ √d e + b₁) + b₂,
and after every step the head descends the logistic loss, ς = softplus, means over all references, the step's new pictures
and a buffer of past ones:
    loss = ½ ⟨ς(-h)⟩_references + ¼ ⟨ς(h)⟩_new + ¼ ⟨ς(h)⟩_past.
w₂ and b₂ start at 0: before it has learned anything, it prefers nothing.

Differences from the released code: it has the hinge loss and no buffer, takes features as they are, scores random patches
too, and shows references of the step's prompts; here the references are one set for all prompts.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn, Tensor
from torch.nn import functional as F

from flowalign import distributed
from flowalign.errors import UserError
from flowalign.flow import PerImage
from flowalign.rewards.features import TINY, Tower
from flowalign.rewards.reference_pictures import picture_files

HIDDEN = 512


@dataclass
class Adversarial:
    """Logit of being a reference picture; any range, 0 where undecided, and of meaning only within a step: the head moves.

    Differentiable. Prompts play no part, so combine it with a reward that reads them. The references should have the size and
    the file format of what is generated, or the head learns to see those. The bundled CLIP takes little memory; for pictures
    above 128 pixels, and as published: facebook/dinov2-base at 518 pixels, 0.35 GB, Apache-2.0.
    """

    pictures: Any
    """The reference pictures: a folder, or a list of files."""
    path: str = TINY
    """The backbone: a local folder or a hub repository; the image side of the bundled CLIP for the bundled world."""
    size: int = 0
    """Pixels of the square that the backbone sees; 0 for what it says itself."""
    learning_rate: float = 1e-4
    descents: int = 10
    """Gradient steps an update."""
    buffer: int = 4096
    """Past pictures that are remembered, by their features."""
    head: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < 1 or self.descents < 1 or self.buffer < 1 or self.size < 0:
            found = f"learning_rate {self.learning_rate}, descents {self.descents}, buffer {self.buffer} and size {self.size}"
            wanted = "learning_rate must be between 0 and 1, descents and buffer 1 or more, size 0 or more"
            raise UserError(f"rewards.adversarial has {found}; {wanted}.")
        files = picture_files(self.pictures, "rewards.adversarial.pictures")
        self.tower = Tower(self.path, "rewards.adversarial.path", self.size)
        self.references = self.tower.embed_files(files, "rewards.adversarial.pictures")
        self.past = torch.zeros(0, self.tower.width)
        self.head = _head(self.tower.width).to(self.tower.device)
        self.optimizer = torch.optim.Adam(
            self.head.parameters(), self.learning_rate, betas=(0.5, 0.999)
        )

    def __call__(
        self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> PerImage:
        return self.logit(self.tower(images))

    def logit(self, features: Tensor) -> PerImage:
        return self.head(self.tower.width**0.5 * features).squeeze(1)

    @torch.enable_grad()
    def update(self, images: Tensor) -> dict[str, float]:
        """As `Learns.update`. Logs the loss and the share of pictures told apart rightly before it learned from them."""
        made = distributed.gather(self.tower.embed(images))
        new = made.to(self.tower.device)
        past = self.past.to(self.tower.device) if len(self.past) else new
        self.past = torch.cat([self.past, made])[-self.buffer :]

        self.head.requires_grad_()
        figures = {}
        for _ in range(self.descents):
            reference, new_logit, past_logit = (
                self.logit(self.references),
                self.logit(new),
                self.logit(past),
            )
            fake = (F.softplus(new_logit).mean() + F.softplus(past_logit).mean()) / 2
            loss = (F.softplus(-reference).mean() + fake) / 2
            figures = figures or {"loss": loss.item(), "accuracy": _accuracy(reference, new_logit)}
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self.head.requires_grad_(False)
        return figures

    def state(self) -> dict[str, Tensor]:
        slots = self.optimizer.state_dict()["state"]
        kept = {f"head.{name}": value for name, value in self.head.state_dict().items()}
        kept |= {
            f"optimizer.{index}.{name}": value
            for index, slot in slots.items()
            for name, value in slot.items()
        }
        return {
            name: value.detach().cpu().clone()
            for name, value in (kept | {"past": self.past}).items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        slots: dict[int, dict[str, Tensor]] = {}
        for key in (key for key in state if key.startswith("optimizer.")):
            _, index, name = key.split(".")
            slots.setdefault(int(index), {})[name] = state[key].clone()
        try:
            self.head.load_state_dict(
                {key.removeprefix("head."): state[key] for key in state if key.startswith("head.")}
            )
            self.past = state["past"].clone()
        except (KeyError, RuntimeError) as error:
            raise UserError(
                f"rewards.adversarial: the checkpoint holds another head, of another backbone? {error}"
            ) from error
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": slots})


def _head(width: int) -> nn.Module:
    """Frozen, the same every time, and no draw from the run's generator."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        first, last = nn.Linear(width, HIDDEN), nn.Linear(HIDDEN, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(first, nn.GELU(), last).requires_grad_(False)


def _accuracy(reference: PerImage, new: PerImage) -> float:
    """Mean over both kinds; a logit of 0 counts half."""
    return torch.stack([(logit.sign().mean() + 1) / 2 for logit in (reference, -new)]).mean().item()
