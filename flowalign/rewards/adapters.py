"""Rewards as people write them, made into functions (images, prompts, metadata) -> scores.

Understood, by the names of the parameters: ours, in any order; Flow-GRPO's factories, `def aesthetic(device): return score`,
and results `(scores, extras)`; TRL's `def score(prompts, completions, **columns)`, also asynchronous; and what `traits` says.
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
from torch import nn, Tensor

from flowalign import distributed
from flowalign.errors import UserError
from flowalign.rewards.base import LearnedReward, numbers, Reward, RewardFunction, Traits

OURS = "images", "prompts", "metadata"
FORMS = "(images, prompts, metadata), TRL's (prompts, completions, **columns), or a function that returns one of them"
PAIRS = "(first, second, prompts, metadata), which a pairwise reward is given"


def make_reward(name: str, written: Any, weight: float = 1.0) -> Reward:
    """A reward from a function or an instance, its settings already bound. UserError where its parameters are not understood."""
    said = _traits(written)
    written = _made(name, _free(written))
    said = _traits(written) or said or Traits()
    signature = _signature(written)
    _check_inputs(name, signature, said)
    function = _answered(written)
    if said.level == "pairwise":
        function = partial(win_rates, _pil(function, 2) if said.images == "pil" else function)
    else:
        function = partial(_by_name, function, signature) if _goes_by_names(signature) else function
        function = _pil(function, 1) if said.images == "pil" else function
    return Reward(
        name, function, weight, said, written if isinstance(written, LearnedReward) else None
    )


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1], rounded to 8 bits."""
    pixels = rearrange(
        (images.detach() * 255).round().clamp(0, 255).byte().cpu(), "b c h w -> b h w c"
    ).numpy()
    return [Image.fromarray(image) for image in pixels]


def win_rates(
    prefers: Callable[..., Any], images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
) -> Tensor:
    """Of every image of one prompt, the mean probability of being better than another; each two are shown both ways round.

    One image is shown beside all the others at a time, so that memory grows with the images and not with the pairs.
    """
    count = len(images)
    if count == 1:
        return torch.full((1,), 0.5)
    won = torch.zeros(count)
    for i in range(count):
        others = [j for j in range(count) if j != i]
        same = [i] * len(others)
        better = numbers(
            prefers(
                images[same],
                images[others],
                [prompts[i]] * len(others),
                [metadata[i]] * len(others),
            )
        )
        if better.shape != (len(others),) or ((better < 0) | (better > 1)).any():
            raise ValueError(
                f"{len(others)} pairs were shown, so {len(others)} numbers from 0 to 1 were expected, not {better}"
            )
        won[i] += better.sum()
        won[others] += 1 - better
    return won / (2 * (count - 1))


def _made(name: str, written: Any) -> Any:
    """What a factory returns, or the function itself. A device that has a default is a setting of the factory."""
    try:
        parameters = _signature(written).parameters
    except (TypeError, ValueError):
        raise UserError(f"rewards.{name} is no function; write one of {FORMS}.") from None
    asked = [p.name for p in parameters.values() if p.default is p.empty]
    if {"images", "completions"} & set(parameters) or len(asked) >= 3:
        return written
    if asked not in ([], ["device"]):
        raise UserError(f"rewards.{name} takes ({', '.join(asked)}); write one of {FORMS}.")
    try:
        made = written(str(distributed.device())) if asked else written()
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"rewards.{name} cannot be made: {type(error).__name__}: {error}"
        ) from error
    if not callable(made):
        raise UserError(
            f"rewards.{name} returned a {type(made).__name__} when it was called; write one of {FORMS}."
        )
    return made


def _signature(written: Any) -> inspect.Signature:
    """Of a module of torch, what its `forward` takes."""
    return inspect.signature(
        written.forward if type(written).__call__ is nn.Module.__call__ else written
    )


def _check_inputs(name: str, signature: inspect.Signature, said: Traits) -> None:
    """UserError where it cannot be called with what it will be given."""
    parameters, pairwise = signature.parameters, said.level == "pairwise"
    try:
        if pairwise:
            signature.bind(*range(4))
        elif not _goes_by_names(signature):
            signature.bind(*range(3))
            if any(
                asked in OURS and asked != ours
                for asked, ours in zip(_asked(signature), OURS, strict=False)
            ):
                raise TypeError("what has a known name stands in the place of another")
    except TypeError:
        wanted = PAIRS if pairwise else f"one of {FORMS}"
        raise UserError(
            f"rewards.{name} takes ({', '.join(parameters)}); write {wanted}."
        ) from None


def _free(written: Any) -> Any:
    """Without the defaults of what every call gives: settings were bound for all arguments that have one."""
    if not isinstance(written, partial):
        return written
    settings = {
        name: value
        for name, value in written.keywords.items()
        if name not in ("images", "prompts", "metadata")
    }
    return partial(written.func, *written.args, **settings)


def _traits(written: Any) -> Traits | None:
    """What was said of a function or class, with settings bound or not."""
    while isinstance(written, partial):
        written = written.func
    said = getattr(written, "traits", None)
    return said if isinstance(said, Traits) else None


def _answered(written: Callable[..., Any]) -> RewardFunction:
    """Scores without extras, waited for where they are promised: in one event loop, which clients may be bound to."""
    runner = asyncio.Runner()

    def function(*inputs: Any, **columns: Any) -> Any:
        scores = written(*inputs, **columns)
        if inspect.isawaitable(scores):
            scores = runner.run(_waited(scores))
        if isinstance(scores, tuple) and len(scores) == 2 and _several(scores[0]):
            scores = scores[0]
        return _of_a_mapping(scores) if isinstance(scores, dict) else scores

    return function


def _several(scores: Any) -> bool:
    """Whether it holds numbers, rather than being one."""
    return isinstance(scores, list | tuple | dict) or np.ndim(scores) > 0


def _of_a_mapping(scores: dict[str, Any]) -> Any:
    """Flow-GRPO's mean of several rewards, or the only ones there are."""
    found = [scores[name] for name in ("avg", "score", "scores") if name in scores]
    if not found:
        raise ValueError(
            f"it returned a mapping of {', '.join(map(str, scores))}; return one number an image"
        )
    return found[0]


async def _waited(promise: Any) -> Any:
    return await promise


def _asked(signature: inspect.Signature) -> list[str]:
    """What is given. Anything else that has a default is a setting."""
    named = [
        p for p in signature.parameters.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    return [p.name for p in named if p.default is p.empty or p.name in OURS]


def _any_more(signature: inspect.Signature) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())


def _goes_by_names(signature: inspect.Signature) -> bool:
    """Whether it is TRL's, or takes what is ours by our names, in any order, or images and prompts alone."""
    asked, any_more = {*_asked(signature)}, _any_more(signature)
    if "completions" in asked:
        return "prompts" in asked or any_more
    return {"images", "prompts"} <= asked and (any_more or asked <= {*OURS})


def _by_name(
    function: RewardFunction,
    signature: inspect.Signature,
    images: Any,
    prompts: list[str],
    metadata: list[dict[str, Any]],
) -> Any:
    """What it asks for, pictures as TRL's completions among it, and the metadata as one list a field."""
    asked, fields = {*_asked(signature)}, {field for entry in metadata for field in entry}
    known: dict[str, Callable[[], Any]] = {
        "images": lambda: images,
        "prompts": lambda: prompts,
        "metadata": lambda: metadata,
        "completions": lambda: to_pil(images) if isinstance(images, Tensor) else images,
        "completion_ids": lambda: [None] * len(prompts),
    }
    more = fields if _any_more(signature) and "metadata" not in asked else set[str]()
    columns = sorted((asked | more) - set(known))
    given = {name: make() for name, make in known.items() if name in asked}
    return function(**given, **{name: [entry.get(name) for entry in metadata] for name in columns})  # type: ignore[call-arg]


def _pil(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """The first `count` arguments as pictures."""
    return lambda *inputs: function(*(to_pil(images) for images in inputs[:count]), *inputs[count:])
