"""Adv-GRPO: a reward that learns to tell images from references (arXiv 2511.20256).

With e an image's unit feature vector of d numbers in a frozen backbone, the reward is the logit of
a small head,
    h(e) = w₂ · gelu(W₁ √d e + b₁) + b₂.
After every step the head descends the logistic loss, with ς = softplus and means over all
references, the step's new images and a buffer of past ones:
    loss = ½ ⟨ς(-h)⟩_references + ¼ ⟨ς(h)⟩_new + ¼ ⟨ς(h)⟩_past
w₂ and b₂ start at 0: before it has learned anything, the reward has no preference.

Differences from the released code: it has the hinge loss and no buffer, takes features without the
factor √d, scores random patches too, and uses references of the step's prompts. Here one set of
references serves all prompts.
"""

from dataclasses import dataclass

import torch
from torch import nn, Tensor
from torch.nn import functional as F

from flowalign import distributed
from flowalign.data.prompts import Metadata
from flowalign.errors import UserError
from flowalign.files import load_optimizer_tensors, optimizer_tensors
from flowalign.flow import PerImage
from flowalign.rewards.features import Backbone, BUNDLED_CLIP
from flowalign.rewards.reference_pictures import picture_files

HIDDEN = 512
KEY = "rewards.adversarial"


@dataclass
class Adversarial:
    """Logit of being a reference image: any range, 0 if undecided. It learns during training.

    Differentiable. Scores can be compared within a step only, because the head changes after it.
    The prompt is ignored, so combine it with a reward that reads it. The references should have
    the size and file format of the generated images, or the head learns to see the difference.
    The bundled CLIP takes little memory. For images above 128 pixels, and as published, use
    facebook/dinov2-base at 518 pixels: 0.35 GB, Apache-2.0.
    """

    pictures: object
    """The reference images: a folder, or a list of files."""
    path: str = BUNDLED_CLIP
    """The backbone: a local folder or hub repository; by default the bundled CLIP's image side."""
    size: int = 0
    """The side of the square that the backbone sees, in pixels; 0 for the backbone's default."""
    learning_rate: float = 1e-4
    """The step size of Adam."""
    descents: int = 10
    """The number of gradient steps after each training step."""
    buffer: int = 4096
    """The number of past images to keep, as features."""

    def __post_init__(self) -> None:
        self._check_settings()
        files = picture_files(self.pictures, f"{KEY}.pictures")
        self.backbone = Backbone(self.path, f"{KEY}.path", self.size)
        self.references = self.backbone.embed_files(files, f"{KEY}.pictures")
        # Features and not images, so that thousands take a few megabytes.
        self.past = torch.zeros(0, self.backbone.width)
        self.head = _head(self.backbone.width).to(self.backbone.device)
        # Less momentum than by default, as is usual where the data change with the policy.
        self.optimizer = torch.optim.Adam(
            self.head.parameters(), self.learning_rate, betas=(0.5, 0.999)
        )

    def _check_settings(self) -> None:
        if not 0 < self.learning_rate < 1:
            raise UserError(f"{KEY}.learning_rate is {self.learning_rate}. Set it between 0 and 1.")
        for name, least in (("descents", 1), ("buffer", 1), ("size", 0)):
            if getattr(self, name) < least:
                raise UserError(
                    f"{KEY}.{name} is {getattr(self, name)}. Set it to {least} or more."
                )

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[Metadata]) -> PerImage:
        return self.logit(self.backbone(images))

    def logit(self, features: Tensor) -> PerImage:
        """Return h(e) of unit features (B, d)."""
        return self.head(self.backbone.width**0.5 * features).squeeze(1)

    @torch.enable_grad()
    def update(self, images: Tensor) -> dict[str, float]:
        """Let the head learn from the images of a step, gathered from all ranks.

        Returns the loss and the share of correctly separated images, both before the first
        gradient step.
        """
        gathered = distributed.gather(self.backbone.embed(images))
        new = gathered.to(self.backbone.device)
        # In the first step there is no past, and the new images take its place.
        past = self.past.to(self.backbone.device) if len(self.past) else new
        self.past = torch.cat([self.past, gathered])[-self.buffer :]

        self.head.requires_grad_()
        metrics = {}
        for _ in range(self.descents):
            reference, new_logit = self.logit(self.references), self.logit(new)
            past_logit = self.logit(past)
            fake = (F.softplus(new_logit).mean() + F.softplus(past_logit).mean()) / 2
            loss = (F.softplus(-reference).mean() + fake) / 2
            metrics = metrics or {"loss": loss.item(), "accuracy": _accuracy(reference, new_logit)}
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        # Frozen again, so that a gradient through the reward reaches the images only.
        self.head.requires_grad_(False)
        return metrics

    def state(self) -> dict[str, Tensor]:
        """Return the head, its optimizer and the past features, on the CPU."""
        head = {f"head.{name}": value for name, value in self.head.state_dict().items()}
        slots = optimizer_tensors(self.optimizer)
        optimizer = {f"optimizer.{name}": value for name, value in slots.items()}
        tensors = head | optimizer | {"past": self.past}
        return {name: value.detach().cpu().clone() for name, value in tensors.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned. Raises UserError if the backbone was another one."""
        try:
            self.head.load_state_dict(_below("head.", state))
            self.past = state["past"].clone()
        except (KeyError, RuntimeError) as error:
            raise UserError(
                f"{KEY}: the checkpoint was written with another backbone ({error}). "
                "Resume with the same `path`, or start a new run."
            ) from error
        load_optimizer_tensors(self.optimizer, _below("optimizer.", state))


def _below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of the tensors whose names begin with the prefix, without it."""
    names = [name for name in state if name.startswith(prefix)]
    return {name.removeprefix(prefix): state[name].clone() for name in names}


def _head(width: int) -> nn.Module:
    """Return a frozen head, the same every time."""
    # A fork, so that the run's own generator does not notice.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        first, last = nn.Linear(width, HIDDEN), nn.Linear(HIDDEN, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(first, nn.GELU(), last).requires_grad_(False)


def _accuracy(reference: PerImage, new: PerImage) -> float:
    """Return the mean accuracy over both kinds; a logit of 0 counts half."""
    return torch.stack([(logit.sign().mean() + 1) / 2 for logit in (reference, -new)]).mean().item()
