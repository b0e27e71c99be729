"""What a reward does to a few pictures: its scores, and whether they can be relied on."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from flowalign import distributed
from flowalign.bundled import ASSETS
from flowalign.data.pictures import load_picture
from flowalign.data.preferences import read_examples
from flowalign.data.prompts import Prompt, read_objects
from flowalign.errors import RunError, UserError
from flowalign.flow import PerImage
from flowalign.rewards.base import Reward
from flowalign.rewards.reference_pictures import as_images, read_picture

SAMPLES = ASSETS / "pairs" / "evaluation.parquet"
COUNT = 8
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Samples:
    """Pictures of one size with their prompts."""

    images: Tensor  # (B, 3, H, W) in [0, 1]
    prompts: list[Prompt]
    about: str = ""
    """What was made of the files they are from."""

    @property
    def inputs(self) -> tuple[Tensor, list[str], list[dict[str, Any]]]:
        return (
            self.images,
            [prompt.text for prompt in self.prompts],
            [prompt.metadata for prompt in self.prompts],
        )

    @property
    def groups(self) -> list[list[int]]:
        """The pictures of every prompt."""
        texts = [prompt.text for prompt in self.prompts]
        return [[i for i, text in enumerate(texts) if text == one] for one in dict.fromkeys(texts)]

    def some(self, members: list[int]) -> "Samples":
        return Samples(self.images[members], [self.prompts[i] for i in members])

    def compared(self) -> "Samples":
        """For a reward of groups: as pictures of one prompt, where no prompt has two."""
        alone = len(self.groups) == len(self.prompts)
        return Samples(self.images, self.prompts[:1] * len(self.prompts)) if alone else self


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    subject: str
    text: str
    wrong: bool = False


def bundled_samples() -> Samples:
    """Pictures of the bundled world, by turns the better and the worse one of a pair."""
    examples = read_examples(str(SAMPLES), "samples", paired=True)[: COUNT * 5 : 5]
    sides = [(e.chosen, e.rejected)[i % 2] for i, e in enumerate(examples)]
    images = [load_picture(side(), 64, 64) for side in sides if side]
    return Samples(torch.stack(images), [example.prompt for example in examples])


def samples_from(folder: str) -> Samples:
    """Some pictures of a folder: of its `metadata.jsonl` (file_name, prompt, other fields), or of all, named by prompt."""
    place = Path(folder)
    if not place.is_dir():
        raise UserError(f"--images: there is no folder {folder}.")
    listed = place / "metadata.jsonl"
    entries = (
        [_entry(*found) for found in read_objects(listed, "--images")] if listed.is_file() else []
    )
    files = [place / name for name, _ in entries] or sorted(
        p for p in place.iterdir() if p.suffix.lower() in PICTURES
    )
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(f"--images: there is no picture {missing[0]}.")
    if not files:
        raise UserError(f"--images: {folder} has no pictures ({', '.join(PICTURES)}).")
    prompts = [prompt for _, prompt in entries] or [
        Prompt(file.stem.replace("_", " ")) for file in files
    ]
    count = min(COUNT, len(files))
    chosen = [i * len(files) // count for i in range(count)]
    pictures, about = (
        [read_picture(files[i], "--images") for i in chosen],
        f"{count} of {len(files)}",
    )
    if len({picture.size for picture in pictures}) > 1:
        width, height = pictures[0].size
        about += f", of several sizes, scaled and cut to the first one's {width} x {height}"
        pictures = [
            ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS) for picture in pictures
        ]
    return Samples(
        torch.cat([as_images(picture) for picture in pictures]), [prompts[i] for i in chosen], about
    )


def _entry(found: dict[str, Any], where: str) -> tuple[str, Prompt]:
    """The name of a picture, and its prompt with the other fields."""
    name, prompt = found.get("file_name") or found.get("image"), found.get("prompt")
    if not isinstance(name, str) or not isinstance(prompt, str):
        missing_scores = "prompt" if isinstance(name, str) else "file_name"
        raise UserError(
            f'{where} has no "{missing_scores}"; write for example {{"file_name": "a.png", "prompt": "a red circle"}}.'
        )
    return name, Prompt(
        prompt,
        {key: value for key, value in found.items() if key not in ("file_name", "image", "prompt")},
    )


def noise_samples(prompts: list[Prompt], height: int, width: int, device: torch.device) -> Samples:
    """Noise, the same every time, for a look before anything is loaded."""
    generator = torch.Generator().manual_seed(0)
    return Samples(
        torch.rand(len(prompts), 3, height, width, generator=generator).to(device), prompts
    )


def ask(reward: Reward, samples: Samples) -> PerImage:
    """The scores; a reward of groups is asked about the pictures of one prompt at a time. RunError when one is infinite."""
    scores = torch.zeros(len(samples.prompts))
    for members in samples.groups if reward.of_groups else [list(range(len(scores)))]:
        scores[members] = reward(*samples.some(members).inputs)
    if scores.isinf().any():
        found = scores[scores.isinf()][0].item()
        raise RunError(
            f"rewards.{reward.name} returned {found}; expected numbers, finite or not scored."
        )
    return scores


def examine(reward: Reward, samples: Samples) -> tuple[PerImage, list[Finding]]:
    """The scores, and all that can be said of them. RunError when it raises, or returns what are no scores."""
    scores, findings = look(reward, samples)
    return scores, [*findings, gradient(reward, samples)]


def look(reward: Reward, samples: Samples) -> tuple[PerImage, list[Finding]]:
    """As `examine`, without a gradient: three questions about every picture; of groups the third in another order."""
    began = time.perf_counter()
    scores = ask(reward, samples)
    seconds = time.perf_counter() - began
    again = ask(reward, samples)
    low, high = reward.traits.range
    said = (
        "any range"
        if math.isinf(low) and math.isinf(high)
        else f"declared to lie in [{low:g}, {high:g}]"
    )
    findings = [
        Finding("scores", f"{len(scores)} numbers, one an image, {said}"),
        _spread(scores),
        _same(
            "determinism", "asked twice, the same", "asked twice, scores differ", scores, again, 0.0
        ),
    ]
    if reward.of_groups:
        backwards = ask(reward, samples.some([*range(len(scores))][::-1])).flip(0)
        findings.append(
            _same(
                "order",
                "in any order the same",
                "in another order, scores differ",
                scores,
                backwards,
                1e-4,
            )
        )
    else:
        alone = torch.cat([reward(*samples.some([i]).inputs) for i in range(len(scores))])
        findings.append(
            _same(
                "batch size",
                "one by one as together",
                "one by one, scores differ",
                scores,
                alone,
                1e-4,
            )
        )
    findings.append(
        Finding(
            "speed", f"{1000 * seconds / len(scores):.3g} ms an image, on {samples.images.device}"
        )
    )
    return scores, findings


def gradient(reward: Reward, samples: Samples, needed: bool = False) -> Finding:
    """Whether it could be learned from by backpropagation. RunError where that is needed and cannot be."""
    samples = samples.some(samples.groups[0]) if reward.of_groups else samples
    images = samples.images.clone().requires_grad_()
    try:
        scores = reward.with_gradient(images, *samples.inputs[1:])
    except RunError as error:
        if needed:
            raise
        return Finding(
            "gradient",
            f"none; objectives that backpropagate through the reward cannot use it: {error}",
        )
    uneven = torch.linspace(
        1, 2, len(scores), device=scores.device
    )  # the plain sum of centred scores has no gradient
    (found,) = torch.autograd.grad((uneven * scores).sum(), images, allow_unused=True)
    if found is None or not found.isfinite().all():
        text = "does not reach the pictures, or is not finite"
        if needed:
            raise RunError(
                f"rewards.{reward.name}: the gradient of its scores {text}, and the objective needs it."
            )
        return Finding("gradient", text, wrong=True)
    reached = int((found.flatten(1).abs().sum(1) > 0).sum())
    return Finding("gradient", f"reaches {reached} of {len(images)} pictures", wrong=reached == 0)


def _spread(scores: PerImage) -> Finding:
    scored = scores[~scores.isnan()]
    if not len(scored):
        return Finding(
            "spread",
            "no picture was scored; give pictures it is made for with --images",
            wrong=True,
        )
    text = f"{scored.min():.4g} to {scored.max():.4g}, mean {scored.mean():.4g}, deviation {scored.std(correction=0):.4g}"
    if len(scored) < len(scores):
        text += f"; {len(scores) - len(scored)} not scored"
    if scored.min() == scored.max() and len(scored) > 1:
        return Finding(
            "spread",
            f"constant: every picture gets {scored[0]:g}, so nothing can be learned from it",
            wrong=True,
        )
    return Finding("spread", text)


def _same(
    subject: str, yes: str, no: str, scores: PerImage, others: PerImage, tolerance: float
) -> Finding:
    """Two ways to the same scores."""
    off = (scores - others).abs().nan_to_num(nan=0).max().item()
    apart = bool((scores.isnan() != others.isnan()).any())
    scale = max(1.0, scores.abs().nan_to_num(nan=0).max().item())
    if apart:
        return Finding(subject, f"{no}: a picture is scored one way and not the other", wrong=True)
    wrong = off > tolerance * scale
    return Finding(subject, f"{no} by up to {off:.3g}" if wrong else yes, wrong)


def show(reward: Reward, samples: Samples, say: Callable[[str], None] = print) -> bool:
    """One screen about a reward. Whether nothing is wrong with it. One that learns has learned from the pictures once."""
    about = [Finding("pictures", samples.about)] if samples.about else []
    samples = replace(samples, images=samples.images.to(distributed.device()))
    samples = samples.compared() if reward.of_groups else samples
    if reward.learner:
        reward.learner.update(samples.images)
    scores, findings = examine(reward, samples)
    given = {"tensor": "tensors", "pil": "PIL pictures"}[reward.traits.images]
    say(f"{reward.name}: {reward.traits.level}, of {given}")
    for score, prompt in zip(scores.tolist(), samples.prompts, strict=True):
        value = "not scored" if math.isnan(score) else f"{score:.4f}"
        say(f"  {value:>10}  {prompt.text[:80]}")
    for finding in [*about, *findings]:
        say(f"{'!' if finding.wrong else ' '} {finding.subject + ':':13}{finding.text}")
    wrong = [finding.subject for finding in findings if finding.wrong]
    say(f"Look at: {', '.join(wrong)}." if wrong else "Nothing wrong was found.")
    return not wrong
