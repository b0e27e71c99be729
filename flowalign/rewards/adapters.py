"""Adapt rewards in the forms that people write to functions (images, prompts, metadata) -> scores.

The names of the parameters decide. Accepted are: our three inputs, in any order; Flow-GRPO's
factories `def aesthetic(device): return score` and results `(scores, extras)`; TRL's
`def score(prompts, completions, **columns)`, also asynchronous; and what `traits` declares.
"""

import asyncio
import copy
import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
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
from flowalign.global_state import hidden_arguments
from flowalign.rewards.base import as_scores, LearnedReward, Reward, RewardFunction, Traits
from flowalign.rewards.journal import Journal
from flowalign.settings.by_name import instance_signature

Function = Callable[..., object]
INPUTS = ("images", "prompts", "metadata")
FROM_TRAINER = ("completion_ids", "trainer_state", "log_extra", "log_metric")
"""Arguments that TRL gives to every reward besides prompts, completions and columns."""
CALL_INPUTS = (*INPUTS, "completions", *FROM_TRAINER)
"""Parameters that a call fills, also if they have a default. Any other default is a setting."""
FORMS = (
    "(images, prompts, metadata), TRL's (prompts, completions, **columns), "
    "or a function of `device` or of nothing that returns one of them"
)
PAIRWISE_FORM = "(first, second, prompts, metadata), which a pairwise reward is called with"


def check_form(name: str, entry: object) -> None:
    """Check that a function or class is a reward or makes one, before anything of it is called.

    Raises UserError if its parameters are not those of a known form.
    """
    is_class = isinstance(entry, type)
    signature = _instance_signature(name, entry) if is_class else _signature(name, entry)
    declared = _declared_traits(entry)
    if not _is_factory(name, signature):
        # An instance may declare its own traits, and four parameters are those of a pairwise one.
        compares = declared is None and is_class and len(_without_default(signature)) == 4
        guessed = Traits(level="pairwise" if compares else "pointwise")
        _check_parameters(name, signature, declared or guessed)
    elif is_class:
        raise UserError(
            f"rewards.{name} is a class whose instances take no images. "
            "Give it a method __call__(self, images, prompts, metadata)."
        )


def make_reward(
    name: str, function: object, weight: float = 1.0, time_limit: float | None = None
) -> Reward:
    """Make a reward from a function, factory, class instance or torch module.

    Settings are bound already. Raises UserError if the parameters are not those of a known form.
    """
    declared = _declared_traits(function)
    function = _strip_call_args(_callable(name, function))
    if _is_factory(name, _signature(name, function)):
        function = _made_by(name, function)
    # What a factory returns may have traits of its own, which are then the more specific ones.
    declared = _declared_traits(function) or declared or Traits()
    signature = _signature(name, function)
    _check_parameters(name, signature, declared)
    score, journal = _normalise_result(function), _journal(signature)
    if declared.level == "pairwise":
        prefers = _with_pil(score, 2) if declared.images == "pil" else score
        score = partial(win_rates, prefers)
    else:
        by_name = _takes_names(signature)
        score = CallByName(score, signature, journal or Journal()) if by_name else score
        score = _with_pil(score, 1) if declared.images == "pil" else score
    return Reward(
        name=name,
        function=score,
        weight=weight,
        traits=declared,
        learner=function if isinstance(function, LearnedReward) else None,
        journal=journal,
        time_limit=time_limit,
    )


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
        first, entries = images[[i] * len(others)], copy.deepcopy([metadata[i]] * len(others))
        better = as_scores(prefers(first, images[others], [prompts[i]] * len(others), entries))
        if better.shape != (len(others),) or ((better < 0) | (better > 1)).any():
            raise ValueError(
                f"the reward returned {better} for {len(others)} pairs. "
                f"Return {len(others)} probabilities from 0 to 1."
            )
        wins[i] += better.sum()
        wins[others] += 1 - better
    return wins / (2 * (count - 1))


def _made_by(name: str, factory: Function) -> Function:
    """Call a factory and return what it makes. Raises UserError if it fails."""
    needs_device = _without_default(_signature(name, factory))
    try:
        with hidden_arguments():
            score = factory(str(distributed.device())) if needs_device else factory()
    except UserError:
        raise
    # It may also end the program, as a script does that finds its weights missing.
    except (Exception, SystemExit) as error:
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


def _is_factory(name: str, signature: inspect.Signature) -> bool:
    """Return True for a function that makes a reward, of nothing or of `device` and settings.

    Raises UserError for a function that is neither that nor a reward.
    """
    parameters, required = signature.parameters, _without_default(signature)
    # Three required parameters are a reward that is called by position, whatever their names.
    if {"images", "completions"} & set(parameters) or len(required) >= 3:
        return False
    # A factory is called with the settings of a file. `device` must show that it is one, because
    # other functions with defaults only could do anything with them.
    if required in ([], ["device"]) and (not parameters or "device" in parameters):
        return True
    raise UserError(f"rewards.{name} takes ({', '.join(parameters)}). Write one of {FORMS}.")


def _without_default(signature: inspect.Signature) -> list[str]:
    return [p.name for p in signature.parameters.values() if p.default is p.empty]


def _callable(name: str, function: object) -> Function:
    if not callable(function):
        raise UserError(f"rewards.{name} is not a function. Write one of {FORMS}.")
    return function


def _signature(name: str, function: object) -> inspect.Signature:
    """Return the parameters of a call. Raises UserError if there are none to read."""
    function = _callable(name, function)
    # A module's own `__call__` takes anything, so its `forward` says more.
    if isinstance(function, nn.Module) and type(function).__call__ is nn.Module.__call__:
        function = function.forward
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        raise UserError(
            f"rewards.{name} has no readable parameters. Write one of {FORMS}."
        ) from None


def _instance_signature(name: str, cls: type) -> inspect.Signature:
    """Return the parameters of a call of a class's instances. Raises UserError without any."""
    forwards = issubclass(cls, nn.Module) and cls.__call__ is nn.Module.__call__
    signature = instance_signature(cls, "forward" if forwards else "__call__")
    if signature is None:
        raise UserError(
            f"rewards.{name} is a class whose instances cannot be called. "
            "Give it a method __call__(self, images, prompts, metadata)."
        )
    return signature


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


def _strip_call_args(function: Function) -> Function:
    """Unbind the inputs of a call: settings are bound for every argument that has a default."""
    if not isinstance(function, partial):
        return function
    keywords = function.keywords.items()
    settings = {name: value for name, value in keywords if name not in CALL_INPUTS}
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
        and (p.default is p.empty or p.name in CALL_INPUTS)
    ]


def _takes_columns(signature: inspect.Signature) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())


def _takes_names(signature: inspect.Signature) -> bool:
    """True if a call is by name: TRL's form, or our inputs in any order or without metadata."""
    names, columns = {*_required(signature)}, _takes_columns(signature)
    if "completions" in names:
        return "prompts" in names or columns
    return {"images", "prompts"} <= names and (columns or names <= {*CALL_INPUTS})


def _journal(signature: inspect.Signature) -> Journal | None:
    """Return a journal for a function that is given something to log with, or the step."""
    names = {*_required(signature)}
    from_trl = "completions" in names and _takes_columns(signature)
    return Journal() if from_trl or names & {*FROM_TRAINER} else None


@dataclass(frozen=True)
class CallByName:
    """Calls a reward with the parameters that it names, and each metadata field as one list."""

    function: Function
    signature: inspect.Signature
    journal: Journal

    def __call__(
        self,
        images: Tensor | list[Image.Image],
        prompts: list[str],
        metadata: list[Metadata],
    ) -> object:
        # Functions, so that images are converted to PIL only if the reward takes completions.
        inputs: dict[str, Callable[[], object]] = {
            "images": lambda: images,
            "prompts": lambda: prompts,
            "metadata": lambda: metadata,
            "completions": lambda: to_pil(images) if isinstance(images, Tensor) else images,
            "completion_ids": lambda: [None] * len(prompts),
            "trainer_state": lambda: self.journal.state,
            "log_extra": lambda: self.journal.log_extra,
            "log_metric": lambda: self.journal.log_metric,
        }
        fields = {field for entry in metadata for field in entry}
        names = self._names(fields - set(inputs))
        arguments = {name: make() for name, make in inputs.items() if name in names}
        for column in sorted(names - set(inputs)):
            arguments[column] = [entry.get(column) for entry in metadata]
        return self.function(*self._take_positional(arguments), **arguments)

    def _names(self, fields: set[str]) -> set[str]:
        """Return the names of all arguments: TRL passes every column to a function with **columns.

        It passes what comes from the trainer to such a function as well.
        """
        names = {*_required(self.signature)}
        if not _takes_columns(self.signature) or "metadata" in names:
            return names
        return names | fields | ({*FROM_TRAINER} if "completions" in names else set())

    def _take_positional(self, arguments: dict[str, object]) -> list[object]:
        """Remove and return the arguments that can only be given by position."""
        parameters = self.signature.parameters.values()
        return [arguments.pop(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_ONLY]


def _with_pil(function: Function, count: int) -> RewardFunction:
    """Convert the first `count` arguments to PIL images."""

    def score(*inputs: object) -> object:
        pictures = [to_pil(images) for images in inputs[:count] if isinstance(images, Tensor)]
        return function(*pictures, *inputs[count:])

    return score
