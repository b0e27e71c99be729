"""Try a reward out on a few images: its scores, and whether training can rely on them.

`flowalign reward test` prints all of it. A run does the same, on images of noise, before it loads
the model.
"""

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from flowalign import distributed
from flowalign.bundled import ASSETS
from flowalign.data.pictures import load_picture
from flowalign.data.preferences import PAIRS, read_examples
from flowalign.data.prompts import Metadata, Prompt, read_objects
from flowalign.errors import RunError, UserError
from flowalign.flow import PerImage
from flowalign.rewards.base import Reward
from flowalign.rewards.reference_pictures import as_images, read_picture

BUNDLED_PAIRS = ASSETS / "pairs" / "evaluation.parquet"
COUNT = 8
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Images of one size with their prompts."""

    images: Tensor
    """(B, 3, H, W) in [0, 1]."""
    prompts: list[Prompt]
    """One per image."""
    about: str = ""
    """How many of the user's files these are, and how they were resized."""

    @property
    def inputs(self) -> tuple[Tensor, list[str], list[Metadata]]:
        """The three inputs of a reward."""
        texts = [prompt.text for prompt in self.prompts]
        return self.images, texts, [prompt.metadata for prompt in self.prompts]

    @property
    def groups(self) -> list[list[int]]:
        """The rows of each prompt."""
        rows: dict[str, list[int]] = {}
        for row, prompt in enumerate(self.prompts):
            rows.setdefault(prompt.text, []).append(row)
        return list(rows.values())

    def subset(self, rows: list[int]) -> "Samples":
        """Return the samples of these rows, in this order."""
        return Samples(images=self.images[rows], prompts=[self.prompts[row] for row in rows])

    def comparable(self) -> "Samples":
        """Return samples with at least one group of several images.

        If every prompt has one image, all images get the first prompt.
        """
        if len(self.groups) < len(self.prompts):
            return self
        return Samples(images=self.images, prompts=self.prompts[:1] * len(self.prompts))


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    subject: str
    text: str
    wrong: bool = False


def bundled_samples() -> Samples:
    """Return images of the bundled world, alternately the chosen and the rejected one of a pair."""
    # Neighbouring rows are alike, so every fifth pair is taken.
    examples = read_examples(str(BUNDLED_PAIRS), "samples", PAIRS)[: COUNT * 5 : 5]
    readers = [(example.chosen, example.rejected)[i % 2] for i, example in enumerate(examples)]
    images = [load_picture(read(), 64, 64) for read in readers if callable(read)]
    return Samples(images=torch.stack(images), prompts=[example.prompt for example in examples])


def samples_from(folder: str) -> Samples:
    """Read some images of a folder, spread evenly over its files.

    Prompts come from `metadata.jsonl` (file_name, prompt, other fields) or else from file names.
    Raises UserError if the folder has no images or its metadata does not fit.
    """
    location = Path(folder).expanduser()
    if not location.is_dir():
        raise UserError(f"--images: there is no folder {folder}. Correct the path.")
    files, prompts = _list_images(location)
    count = min(COUNT, len(files))
    rows = [i * len(files) // count for i in range(count)]
    pictures = [read_picture(files[row], "--images") for row in rows]
    about = f"{count} of {len(files)}"
    if len({picture.size for picture in pictures}) > 1:
        width, height = pictures[0].size
        about += f", of several sizes, scaled and cropped to the first one's {width} x {height}"
        pictures = [_fit(picture, width, height) for picture in pictures]
    images = torch.cat([as_images(picture) for picture in pictures])
    return Samples(images=images, prompts=[prompts[row] for row in rows], about=about)


def _fit(picture: Image.Image, width: int, height: int) -> Image.Image:
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)


def _list_images(folder: Path) -> tuple[list[Path], list[Prompt]]:
    listing = folder / "metadata.jsonl"
    if listing.is_file():
        objects = read_objects(listing, "--images")
        entries = [_named_prompt(entry, where) for entry, where in objects]
        files, prompts = [folder / name for name, _ in entries], [prompt for _, prompt in entries]
    else:
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
        prompts = [Prompt(file.stem.replace("_", " ")) for file in files]
    for file in files:
        if not file.is_file():
            raise UserError(f"--images: there is no image {file}. Correct metadata.jsonl.")
    if not files:
        raise UserError(
            f"--images: {folder} has no images. Use a folder of {', '.join(SUFFIXES)} files."
        )
    return files, prompts


def _named_prompt(entry: Metadata, where: str) -> tuple[str, Prompt]:
    """Return the file name of a line of metadata, and its prompt with the other fields."""
    name, text = entry.get("file_name") or entry.get("image"), entry.get("prompt")
    if not isinstance(name, str) or not isinstance(text, str):
        missing = "prompt" if isinstance(name, str) else "file_name"
        raise UserError(
            f'{where} has no "{missing}". '
            'Write for example {"file_name": "a.png", "prompt": "a red circle"}.'
        )
    used = ("file_name", "image", "prompt")
    return name, Prompt(text, {key: value for key, value in entry.items() if key not in used})


def noise_samples(prompts: list[Prompt], height: int, width: int, device: torch.device) -> Samples:
    """Return uniform noise as images, always the same, for a check before a model is loaded."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(len(prompts), 3, height, width, generator=generator)
    return Samples(images=images.to(device), prompts=prompts)


def score(reward: Reward, samples: Samples) -> PerImage:
    """Return the scores (B,). A reward of groups sees the images of one prompt at a time.

    Raises RunError if a score is infinite.
    """
    scores = torch.zeros(len(samples.prompts))
    for rows in samples.groups if reward.of_groups else [list(range(len(scores)))]:
        scores[rows] = reward(*samples.subset(rows).inputs)
    # NaN is allowed here: it is an image without score. Infinity would reach the advantages.
    if scores.isinf().any():
        infinite = scores[scores.isinf()][0].item()
        raise RunError(
            f"rewards.{reward.name} returned {infinite}. "
            "Return finite numbers, or NaN for an image that cannot be scored."
        )
    return scores


def inspect_reward(reward: Reward, samples: Samples) -> tuple[PerImage, list[Finding]]:
    """Return the scores and the findings of all checks.

    Raises RunError if the reward raises, or returns something other than scores.
    """
    scores, findings = inspect_scores(reward, samples)
    return scores, [*findings, inspect_gradient(reward, samples)]


def inspect_scores(reward: Reward, samples: Samples) -> tuple[PerImage, list[Finding]]:
    """Return the scores and the findings of all checks that need no gradient.

    Every image is scored three times: twice the same way, and once in another order or alone.
    """
    began = time.perf_counter()
    scores = score(reward, samples)
    milliseconds = 1000 * (time.perf_counter() - began) / len(scores)
    # A reward that draws from the global generators must show it, and each call restores them.
    _advance_generators()
    again = score(reward, samples)
    if reward.of_groups:
        backwards = score(reward, samples.subset([*range(len(scores))][::-1])).flip(0)
        other_way = _compare("order", "in reverse order", scores, backwards)
    else:
        rows = range(len(scores))
        alone = torch.cat([reward(*samples.subset([row]).inputs) for row in rows])
        # Matrix products of other sizes round differently, hence the tolerance.
        other_way = _compare("batch size", "one image at a time", scores, alone)
    return scores, [
        Finding("scores", f"{len(scores)} numbers, one per image, {_declared_range(reward)}"),
        _spread(scores),
        _compare("determinism", "in a second call", scores, again, tolerance=0.0),
        other_way,
        Finding("speed", f"{milliseconds:.3g} ms per image, on {samples.images.device}"),
        *_side_effects(reward),
    ]


def _side_effects(reward: Reward) -> list[Finding]:
    """Return a finding about a reward whose calls change what other threads see, or nothing."""
    if not reward.changed:
        return []
    names = ", ".join(sorted(reward.changed))
    text = f"calls change {names}; it is restored, but sampling meanwhile may see it"
    return [Finding("global state", text, wrong=True)]


def _advance_generators() -> None:
    """Draw a number from each global generator."""
    torch.rand(1)
    np.random.rand()
    random.random()


def _declared_range(reward: Reward) -> str:
    low, high = reward.traits.range
    if math.isinf(low) and math.isinf(high):
        return "no declared range"
    return f"declared range [{low:g}, {high:g}]"


def inspect_gradient(reward: Reward, samples: Samples, needed: bool = False) -> Finding:
    """Check that a gradient reaches the images. Raises RunError if it does not but is needed."""
    samples = samples.subset(samples.groups[0]) if reward.of_groups else samples
    images = samples.images.clone().requires_grad_()
    try:
        scores = reward.with_gradient(images, *samples.inputs[1:])
    except RunError:
        if needed:
            raise
        return Finding(
            "gradient", "none; only objectives that backpropagate through rewards need one"
        )
    # Uneven weights, because the plain sum of scores that are centred in a batch has no gradient.
    weights = torch.linspace(1, 2, len(scores), device=scores.device)
    (gradient,) = torch.autograd.grad((weights * scores).sum(), images, allow_unused=True)
    if gradient is None or not gradient.isfinite().all():
        text = "does not reach the images, or is not finite"
        if needed:
            raise RunError(
                f"rewards.{reward.name}: the gradient of its scores {text}, but the objective "
                "needs it. Correct the reward or choose another objective."
            )
        return Finding("gradient", text, wrong=True)
    reached = int((gradient.flatten(1).abs().sum(1) > 0).sum())
    return Finding("gradient", f"reaches {reached} of {len(images)} images", wrong=reached == 0)


def _spread(scores: PerImage) -> Finding:
    scored = scores[~scores.isnan()]
    if not len(scored):
        text = "no image was scored; use --images with images made for the reward"
        return Finding("spread", text, wrong=True)
    if scored.min() == scored.max() and len(scored) > 1:
        text = f"constant: every image gets {scored[0]:g}, so there is nothing to learn from it"
        return Finding("spread", text, wrong=True)
    mean, deviation = scored.mean(), scored.std(correction=0)
    text = f"{scored.min():.4g} to {scored.max():.4g}, mean {mean:.4g}, deviation {deviation:.4g}"
    unscored = len(scores) - len(scored)
    return Finding("spread", f"{text}; {unscored} not scored" if unscored else text)


def _compare(
    subject: str, way: str, scores: PerImage, others: PerImage, tolerance: float = 1e-4
) -> Finding:
    """Compare the scores with those of another way to call the reward."""
    if (scores.isnan() != others.isnan()).any():
        return Finding(subject, f"{way}, other images are scored", wrong=True)
    difference = (scores - others).abs().nan_to_num(nan=0).max().item()
    scale = max(1.0, scores.abs().nan_to_num(nan=0).max().item())
    if difference > tolerance * scale:
        return Finding(subject, f"{way}, scores differ by up to {difference:.3g}", wrong=True)
    return Finding(subject, f"equal {way}")


def print_inspection(reward: Reward, samples: Samples, say: Callable[[str], None] = print) -> bool:
    """Print one screen about a reward, and return True if nothing is wrong with it.

    A reward that learns is updated once with the images first, because it starts without opinion.
    """
    about = [Finding("images", samples.about)] if samples.about else []
    samples = replace(samples, images=samples.images.to(distributed.device()))
    samples = samples.comparable() if reward.of_groups else samples
    if reward.learner:
        reward.learn(samples.images)
    scores, findings = inspect_reward(reward, samples)
    images = {"tensor": "tensors", "pil": "PIL images"}[reward.traits.images]
    say(f"{reward.name}: {reward.traits.level}, takes {images}")
    for value, prompt in zip(scores.tolist(), samples.prompts, strict=True):
        text = "not scored" if math.isnan(value) else f"{value:.4f}"
        say(f"  {text:>10}  {prompt.text[:80]}")
    for finding in [*about, *findings]:
        say(f"{'!' if finding.wrong else ' '} {finding.subject + ':':13}{finding.text}")
    wrong = [finding.subject for finding in findings if finding.wrong]
    say(f"Problems found: {', '.join(wrong)}." if wrong else "No problem found.")
    return not wrong
