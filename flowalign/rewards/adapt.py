"""Rewards as people write them, made into functions (images, prompts, metadata) -> scores.

Understood, by the names of the parameters: ours; Flow-GRPO's factories, `def aesthetic(device): return score`, and results
`(scores, extras)`; TRL's `def score(prompts, completions, **columns)`, also asynchronous; and what `traits` says.
"""

import asyncio
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from flowalign.errors import UserError
from flowalign.rewards.base import Learns, numbers, Reward, RewardFunction, Traits

FORMS = "(images, prompts, metadata), TRL's (prompts, completions, **columns), or a function that returns one of them"


def make_reward(name: str, written: Any, weight: float = 1.0) -> Reward:
    """A reward from a function or an instance, its settings already bound. UserError where its parameters are not understood."""
    said = _traits(written)
    written = _made(name, _free(written))
    said = _traits(written) or said or Traits()
    parameters = inspect.signature(written).parameters
    function = _answered(written)
    if said.level == "pairwise":
        function = partial(win_rates, _pil(function, 2) if said.images == "pil" else function)
    elif "completions" in parameters:
        function = partial(_as_trl, function, _columns(parameters))
    elif said.images == "pil":
        function = _pil(function, 1)
    return Reward(name, function, weight, said, written if isinstance(written, Learns) else None)


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1], rounded to 8 bits."""
    pixels = rearrange((images.detach() * 255).round().clamp(0, 255).byte().cpu(), "b c h w -> b h w c").numpy()
    return [Image.fromarray(image) for image in pixels]


def win_rates(prefers: Callable[..., Any], images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """Of every image of one prompt, the mean probability of being better than another; each two are shown both ways round."""
    count = len(images)
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    if not pairs:
        return torch.full((count,), 0.5)
    first, second = (torch.tensor(side) for side in zip(*pairs, strict=True))
    texts, entries = [prompts[i] for i, _ in pairs], [metadata[i] for i, _ in pairs]
    better = numbers(prefers(images[first], images[second], texts, entries))
    if better.shape != (len(pairs),) or ((better < 0) | (better > 1)).any():
        raise ValueError(f"{len(pairs)} pairs were shown, so {len(pairs)} numbers from 0 to 1 were expected, not {better}")
    won = torch.zeros(count).index_add_(0, first, better).index_add_(0, second, 1 - better)
    return won / (2 * (count - 1))


def _made(name: str, written: Any) -> Any:
    """What a factory returns, or the function itself. A device that has a default is a setting of the factory."""
    try:
        parameters = inspect.signature(written).parameters
    except (TypeError, ValueError):
        raise UserError(f"rewards.{name} is no function; write one of {FORMS}.") from None
    asked = [p.name for p in parameters.values() if p.default is p.empty]
    if {"images", "completions"} & set(parameters) or len(asked) >= 3:
        return written
    if asked not in ([], ["device"]):
        raise UserError(f"rewards.{name} takes ({', '.join(asked)}); write one of {FORMS}.")
    try:
        made = written("cuda" if torch.cuda.is_available() else "cpu") if asked else written()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"rewards.{name} cannot be made: {type(error).__name__}: {error}") from error
    if not callable(made):
        raise UserError(f"rewards.{name} returned a {type(made).__name__} when it was called; write one of {FORMS}.")
    return made


def _free(written: Any) -> Any:
    """Without the defaults of what every call gives: settings were bound for all arguments that have one."""
    if not isinstance(written, partial):
        return written
    settings = {name: value for name, value in written.keywords.items() if name not in ("images", "prompts", "metadata")}
    return partial(written.func, *written.args, **settings)


def _traits(written: Any) -> Traits | None:
    """What was said of a function or class, with settings bound or not."""
    while isinstance(written, partial):
        written = written.func
    return getattr(written, "traits", None)


def _answered(written: Callable[..., Any]) -> RewardFunction:
    """Scores without extras, waited for where they are promised."""

    def function(*inputs: Any, **columns: Any) -> Any:
        scores = written(*inputs, **columns)
        if inspect.isawaitable(scores):
            scores = asyncio.run(_waited(scores))
        return scores[0] if isinstance(scores, tuple) and len(scores) == 2 and _several(scores[0]) else scores

    return function


def _several(scores: Any) -> bool:
    """Whether it holds numbers, rather than being one."""
    return isinstance(scores, list | tuple) or np.ndim(scores) > 0


async def _waited(promise: Any) -> Any:
    return await promise


def _columns(parameters: Any) -> set[str] | None:
    """The metadata fields that a TRL reward takes; None for all. What has a default is a setting."""
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    return {p.name for p in parameters.values() if p.default is p.empty} - {"prompts", "completions"}


def _as_trl(
    function: RewardFunction, wanted: set[str] | None, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
) -> Any:
    """Pictures as completions, and the metadata as one list a field."""
    names = {name for entry in metadata for name in entry} if wanted is None else wanted
    columns = {name: [entry.get(name) for entry in metadata] for name in sorted(names - {"prompts", "completions"})}
    return function(prompts=prompts, completions=to_pil(images), **columns)  # type: ignore[call-arg]


def _pil(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """The first `count` arguments as pictures."""
    return lambda *inputs: function(*(to_pil(images) for images in inputs[:count]), *inputs[count:])
