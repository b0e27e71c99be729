"""Adapt rewards in the forms that people write to functions (images, prompts, metadata) -> scores.

The names of the parameters decide. Accepted are: our three inputs, in any order; Flow-GRPO's
factories `def aesthetic(device): return score` and results `(scores, extras)`; TRL's
`def score(prompts, completions, **columns)`, also asynchronous; and what `traits` declares.
"""

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from functools import partial

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import nn, Tensor

from flowalign import distributed
from flowalign.data.prompts import Metadata
from flowalign.errors import UserError
from flowalign.flow import PerImage
from flowalign.rewards.base import as_scores, LearnedReward, Reward, RewardFunction, Traits

Function = Callable[..., object]
INPUTS = ("images", "prompts", "metadata")
FORMS = (
    "(images, prompts, metadata), TRL's (prompts, completions, **columns), "
    "or a function that returns one of them"
)
PAIRWISE_FORM = "(first, second, prompts, metadata), which a pairwise reward is called with"


def make_reward(name: str, function: object, weight: float = 1.0) -> Reward:
    """Make a reward from a function, factory, class instance or torch module.

    Settings are bound already. Raises UserError if the parameters are not those of a known form.
    """
    declared = _declared_traits(function)
    function = _unwrap_factory(name, _strip_call_args(function))
    # What a factory returns may have traits of its own, which are then the more specific ones.
    declared = _declared_traits(function) or declared or Traits()
    signature = _signature(function)
    _check_parameters(name, signature, declared)
    score = _normalise_result(function)
    if declared.level == "pairwise":
        prefers = _with_pil(score, 2) if declared.images == "pil" else score
        score = partial(win_rates, prefers)
    else:
        score = partial(_call_by_name, score, signature) if _takes_names(signature) else score
        score = _with_pil(score, 1) if declared.images == "pil" else score
    learner = function if isinstance(function, LearnedReward) else None
    return Reward(name=name, function=score, weight=weight, traits=declared, learner=learner)


def to_pil(images: Tensor) -> list[Image.Image]:
    """Convert images (B, 3, H, W) in [0, 1] to PIL images, rounded to 8 bits."""
    pixels = (images.detach() * 255).round().clamp(0, 255).byte().cpu()
    return [Image.fromarray(image) for image in rearrange(pixels, "b c h w -> b h w c").numpy()]


def win_rates(
    prefers: Function, images: Tensor, prompts: list[str], metadata: list[Metadata]
) -> PerImage:
    """Return each image's mean probability of being better than another image of the prompt.

    Every pair is shown in both orders, so that a preference for the first place cancels.
    Raises ValueError if `prefers` does not return a probability for each pair.
    """
    count = len(images)
    if count == 1:
        return torch.full((1,), 0.5)
    wins = torch.zeros(count)
    # One image against all others per call: memory grows with the images, not with the pairs.
    for i in range(count):
        others = [j for j in range(count) if j != i]
        first, entries = images[[i] * len(others)], [metadata[i]] * len(others)
        better = as_scores(prefers(first, images[others], [prompts[i]] * len(others), entries))
        if better.shape != (len(others),) or ((better < 0) | (better > 1)).any():
            raise ValueError(
                f"the reward returned {better} for {len(others)} pairs. "
                f"Return {len(others)} probabilities from 0 to 1."
            )
        wins[i] += better.sum()
        wins[others] += 1 - better
    return wins / (2 * (count - 1))


def _unwrap_factory(name: str, function: object) -> Function:
    """Call a factory and return what it makes; return any other function unchanged.

    A factory requires nothing or a device. A device with a default is a setting of the factory.
    """
    if not callable(function):
        raise UserError(f"rewards.{name} is not a function. Write one of {FORMS}.")
    try:
        parameters = _signature(function).parameters
    except (TypeError, ValueError):
        raise UserError(
            f"rewards.{name} has no readable parameters. Write one of {FORMS}."
        ) from None
    required = [p.name for p in parameters.values() if p.default is p.empty]
    # Three required parameters are a reward that is called by position, whatever their names.
    if {"images", "completions"} & set(parameters) or len(required) >= 3:
        return function
    if required not in ([], ["device"]):
        raise UserError(f"rewards.{name} takes ({', '.join(required)}). Write one of {FORMS}.")
    try:
        score = function(str(distributed.device())) if required else function()
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"rewards.{name} cannot be made: {type(error).__name__}: {error}. "
            "Correct the function that makes it."
        ) from error
    if not callable(score):
        raise UserError(
            f"rewards.{name} returned a {type(score).__name__} when it was called. "
            f"Write one of {FORMS}."
        )
    return score


def _signature(function: Function) -> inspect.Signature:
    # A module's own `__call__` takes anything, so its `forward` says more.
    if isinstance(function, nn.Module) and type(function).__call__ is nn.Module.__call__:
        return inspect.signature(function.forward)
    return inspect.signature(function)


def _check_parameters(name: str, signature: inspect.Signature, declared: Traits) -> None:
    """Raise UserError if a call with the reward's inputs would fail."""
    pairwise = declared.level == "pairwise"
    try:
        if pairwise:
            signature.bind(*range(4))
        elif not _takes_names(signature):
            signature.bind(*range(3))
            _check_order(signature)
    except TypeError:
        wanted = PAIRWISE_FORM if pairwise else f"one of {FORMS}"
        taken = ", ".join(signature.parameters)
        raise UserError(f"rewards.{name} takes ({taken}). Write {wanted}.") from None


def _check_order(signature: inspect.Signature) -> None:
    """Raise TypeError if, say, the first of three positional inputs is named `prompts`."""
    for parameter, expected in zip(_required(signature), INPUTS, strict=False):
        if parameter in INPUTS and parameter != expected:
            raise TypeError(f"{parameter} stands where {expected} is given")


def _strip_call_args(function: object) -> object:
    """Unbind the inputs of a call: settings are bound for every argument that has a default."""
    if not isinstance(function, partial):
        return function
    settings = {name: value for name, value in function.keywords.items() if name not in INPUTS}
    return partial(function.func, *function.args, **settings)


def _declared_traits(function: object) -> Traits | None:
    """Return the traits of a function or class, whether settings are bound or not."""
    while isinstance(function, partial):
        function = function.func
    declared = getattr(function, "traits", None)
    return declared if isinstance(declared, Traits) else None


def _normalise_result(function: Function) -> Function:
    """Return scores without extras, awaited if the function is asynchronous."""
    # One event loop for all calls, because clients of servers are bound to the loop they began in.
    runner = asyncio.Runner()

    def score(*inputs: object, **columns: object) -> object:
        scores = function(*inputs, **columns)
        if inspect.isawaitable(scores):
            scores = runner.run(_awaited(scores))
        # Two scores of two images are a tuple of two as well, but of numbers.
        if isinstance(scores, tuple) and len(scores) == 2 and _is_collection(scores[0]):
            scores = scores[0]
        return _scores_of_mapping(scores) if isinstance(scores, dict) else scores

    return score


def _is_collection(value: object) -> bool:
    if isinstance(value, list | tuple | dict):
        return True
    return np.ndim(value) > 0  # pyright: ignore[reportArgumentType]


def _scores_of_mapping(scores: dict[str, object]) -> object:
    """Return Flow-GRPO's mean of several rewards, or the only scores."""
    for name in ("avg", "score", "scores"):
        if name in scores:
            return scores[name]
    raise ValueError(
        f"the result is a mapping of {', '.join(map(str, scores))}. Return one number per image."
    )


async def _awaited(promise: Awaitable[object]) -> object:
    return await promise


def _required(signature: inspect.Signature) -> list[str]:
    """Return the parameters that a call fills. Others with a default are settings."""
    return [
        p.name
        for p in signature.parameters.values()
        if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        and (p.default is p.empty or p.name in INPUTS)
    ]


def _takes_columns(signature: inspect.Signature) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())


def _takes_names(signature: inspect.Signature) -> bool:
    """True if a call is by name: TRL's form, or our inputs in any order or without metadata."""
    names, columns = {*_required(signature)}, _takes_columns(signature)
    if "completions" in names:
        return "prompts" in names or columns
    return {"images", "prompts"} <= names and (columns or names <= {*INPUTS})


def _call_by_name(
    function: Function,
    signature: inspect.Signature,
    images: Tensor | list[Image.Image],
    prompts: list[str],
    metadata: list[Metadata],
) -> object:
    """Call with the parameters that the function names, and each metadata field as one list."""
    names = {*_required(signature)}
    fields = {field for entry in metadata for field in entry}
    # Functions, so that images are converted to PIL only if the reward takes completions.
    inputs: dict[str, Callable[[], object]] = {
        "images": lambda: images,
        "prompts": lambda: prompts,
        "metadata": lambda: metadata,
        "completions": lambda: to_pil(images) if isinstance(images, Tensor) else images,
        "completion_ids": lambda: [None] * len(prompts),
    }
    # TRL passes every column of the data set to a function with **columns.
    if _takes_columns(signature) and "metadata" not in names:
        columns = (names | fields) - set(inputs)
    else:
        columns = names - set(inputs)
    arguments = {name: make() for name, make in inputs.items() if name in names}
    lists = {name: [entry.get(name) for entry in metadata] for name in sorted(columns)}
    return function(**arguments, **lists)


def _with_pil(function: Function, count: int) -> RewardFunction:
    """Convert the first `count` arguments to PIL images."""

    def score(*inputs: object) -> object:
        pictures = [to_pil(images) for images in inputs[:count] if isinstance(images, Tensor)]
        return function(*pictures, *inputs[count:])

    return score
