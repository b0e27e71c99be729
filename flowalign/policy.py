"""The policy: a model with named LoRA adapters, and the sampler that makes images with them."""

import copy
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, cast, Self, TYPE_CHECKING

import torch
from pydantic import Field
from torch import nn, Tensor
from torch.utils.checkpoint import checkpoint

from flowalign.batch import Batch, Cond, negative_prompt
from flowalign.dynamics import Dynamics, Gaussian, is_stochastic, ode, Window
from flowalign.errors import UserError
from flowalign.flow import concatenate, Latent, over_latent, PerImage
from flowalign.models.base import FlowModel
from flowalign.models.given_adapters import matches
from flowalign.models.layer_adapter import LayerAdapter
from flowalign.settings.types import (
    Count,
    CountOrZero,
    Guidance,
    NonNegative,
    Settings,
    Share,
    WrongSetting,
)

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer


@dataclass
class Sampler(Settings):
    """How images are made from noise.

    Example:
        >>> flowalign.Sampler(steps=28, guidance=4.5).steps
        28
    """

    steps: Annotated[int, Field(ge=1, le=1000)] = 10
    """Steps from noise to image, each one forward of the transformer."""
    dynamics: Any = None
    """A step (x, v, t, s) -> Gaussian; None is the ODE.

    In a YAML file it is a name with its settings: {name: flow_sde, eta: 0.7}.
    """
    guidance: Guidance = 1.0
    """Scale of classifier-free guidance; 1 means none."""
    embedded_guidance: Annotated[float, Field(ge=0, le=100)] = 3.5
    """Guidance scale that a model with distilled guidance takes as an input."""
    negative_prompt: str = ""
    """Text that guidance leads away from; a prompt's own field `negative_prompt` comes first."""
    window: Window = field(default_factory=Window)
    """Which steps of the path are stochastic."""
    same_noise: bool = False
    """If true, all images of a prompt start from one noise (DanceGRPO, arXiv 2505.07818).

    They then differ by their stochastic steps alone.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.dynamics = self.dynamics or ode

    def stochastic_steps(self, step: int, seed: int) -> range:
        """Return the stochastic steps of a path in this training step."""
        if not is_stochastic(self.dynamics):
            return range(0)
        return self.window.steps(self.steps, step, seed)


@dataclass
class Decay(Settings):
    """How a copy of the adapter follows the one that trains.

        copy ← decay(n) · copy + (1 - decay(n)) · policy,
        decay(n) = min(end, value + slope · max(0, n - start)).
    n counts updates; unless `every` divides n, the copy stays as it is. A decay of 0 copies the
    policy, 1 leaves the copy as it is. Copies follow at the end of a step, whose updates n
    includes, or as `Objective.copies_follow_after` says.

    Example:
        >>> decay = flowalign.Decay(value=0.1, slope=0.1, end=0.5)
        >>> [decay(updates) for updates in (0, 2, 100)]
        [0.1, 0.30000000000000004, 0.5]
    """

    start: CountOrZero = 0
    """Updates before the decay begins to rise."""
    value: Share = 0.0
    """Decay until then."""
    slope: NonNegative = 0.0
    """Rise of the decay per update."""
    end: Share = 1.0
    """Largest decay."""
    every: Count = 1
    """Updates between two changes of the copy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value > self.end:
            raise WrongSetting(f"value is {self.value}, but end is {self.end}. Write value <= end.")

    def __call__(self, updates: int) -> float:
        """Return the decay after this many updates."""
        if updates % self.every:
            return 1.0
        return min(self.end, self.value + self.slope * max(0, updates - self.start))


@dataclass
class Path:
    """The latents that a sampler made of noise, and its S stochastic steps."""

    x0: Latent  # (B, *latent)
    """The latents at the end, (B, *latent)."""
    x: Latent  # (B, S + 1, *latent)
    """Latents before and after each stochastic step, (B, S + 1, *latent); (B, 0, ...) for S = 0."""
    log_prob: Tensor  # (B, S)
    """Log-probability of each stochastic step, (B, S)."""
    steps: range
    """The stochastic steps."""
    states: dict[int, Latent] = field(default_factory=dict)
    """Latents (B, *latent) before the policy's `kept_steps`, by step."""


class Policy:
    """π_θ: velocities and sampler steps under the weights that `weights` names.

    "policy" is the adapter that trains and "reference" the model without adapters; other names are
    snapshots. Between calls the active adapter is always "policy", so that `backward` finds it.

    Example:
        >>> model = flowalign.load_model("assets/tiny-sd3")
        >>> policy = flowalign.Policy(model, flowalign.Sampler(steps=4))
        >>> cond = policy.encode(["a red circle"])
        >>> x = torch.zeros(1, *model.latent_shape)
        >>> step = policy.at("reference").step(x, 0, cond)
        >>> step.mean.shape, step.std
        (torch.Size([1, 8, 8, 8]), 0.0)
    """

    def __init__(
        self,
        model: FlowModel,
        sampler: Sampler,
        snapshots: Sequence[str] | None = None,
        images_per_pass: int | None = None,
    ):
        self.model, self.sampler, self.images_per_pass = model, sampler, images_per_pass
        self.weights, self._gradient = "policy", True
        self.kept_steps: Sequence[int] = ()
        self.times = model.schedule(sampler.steps)
        self.lora = lora_config(model)
        self.snapshots = list(snapshots or [])
        given = model.config.adapter
        start = model.read_adapter(given, "model.adapter") if given else {}
        self._layers = self._add_adapters()
        self._train_policy_only()
        self.begin_as(start)
        for name in self.snapshots:
            self.update_copy(name, 0.0)

    def _add_adapters(self) -> list["BaseTunerLayer"]:
        """Put all adapters on the model and return the layers that hold them."""
        from peft.tuners.tuners_utils import BaseTunerLayer  # takes seconds to import

        with warnings.catch_warnings():
            # PEFT warns about a second adapter, which is intended here.
            warnings.simplefilter("ignore", UserWarning)
            # The last adapter that is added is the active one, so the policy comes last.
            for name in [*self.snapshots, "policy"]:
                self.model.add_adapter(self.lora, name)
        modules = self.model.transformer.modules()
        # Listed once: searching all modules takes 2 ms, as long as a small forward.
        return [module for module in modules if isinstance(module, BaseTunerLayer)]

    def _train_policy_only(self) -> None:
        """Make the policy's matrices the only trainable ones, and all adapters float32."""
        for parameter in self.model.transformer.parameters():
            parameter.requires_grad_(False)
        for name in [*self.snapshots, "policy"]:
            for parameter in self.parameters(name):
                # Updates are smaller than half precision resolves, so the masters are float32.
                parameter.data = parameter.data.float()
                parameter.requires_grad_(name == "policy")

    @torch.no_grad()
    def begin_as(self, start: Mapping[str, LayerAdapter]) -> None:
        """Give the policy the adapters of some layers. Raises UserError if they do not fit."""
        lora = self.model.config.lora
        modules = dict(self.model.transformer.named_modules())
        own = {id(layer) for layer in self._layers}
        others = [name for name in start if id(modules[name]) not in own]
        if others:
            # Without the list of blocks, so that one ending stands for the layers of all blocks.
            endings = [re.sub(r"^\w+\.\d+\.", "", name) for name in others]
            targets = dict.fromkeys([*(lora.targets or self.model.lora_targets), *endings])
            raise UserError(
                f"model.adapter adapts {others[0]}, which model.lora.targets leaves out. Set "
                f"model.lora.targets to [{', '.join(targets)}]."
            )
        for name, given in start.items():
            layer: Any = modules[name]
            rank = layer.r["policy"]
            if given.rank > rank:
                raise UserError(
                    f"model.adapter has the rank {given.rank}, but model.lora.rank is {rank}. "
                    f"Set model.lora.rank to {given.rank} or more."
                )
            a, b = layer.lora_A["policy"].weight, layer.lora_B["policy"].weight
            padded = given.padded(a.cpu())
            a.copy_(padded.a)
            b.copy_(padded.b * (padded.scale / layer.scaling["policy"]))
        self._renew_magnitudes("policy")

    @torch.no_grad()
    def _renew_magnitudes(self, name: str) -> None:
        """Set DoRA's lengths of rows to those of the weight with the change of the adapter.

        PEFT computes them in the dtype of the model. Only in float32, as in a forward, do they
        leave the weight as it is.
        """
        layers: list[Any] = [*self._layers] if self.lora.use_dora else []
        for layer in layers:
            dora, a, b = (
                part[name] for part in (layer.lora_magnitude_vector, layer.lora_A, layer.lora_B)
            )
            weight = layer.get_base_layer().weight.to(a.weight.dtype)
            change = dora.get_lora_weight(lora_A=a, lora_B=b)
            dora.weight.copy_(dora.get_weight_norm(weight, change, layer.scaling[name]))

    def parameters(self, name: str = "policy") -> list[nn.Parameter]:
        """Return the matrices of an adapter, in a fixed order."""
        parameters = self.model.transformer.named_parameters()
        matrices = [parameter for key, parameter in parameters if f".{name}." in key]
        if len(matrices) != (3 if self.lora.use_dora else 2) * len(self._layers):
            raise RuntimeError(
                f"{len(matrices)} matrices of adapter {name!r} on {len(self._layers)} layers"
            )
        return matrices

    def at(self, name: str) -> Self:
        """Return a gradient-free view under other weights: "reference", a snapshot or "policy"."""
        # A shallow copy: the view shares model and adapters, and only remembers which is active.
        view = copy.copy(self)
        view.weights, view._gradient = name, False
        return view

    @torch.no_grad()
    def with_adapter_of(self, other: "Policy") -> Self:
        """Return a gradient-free view with the sampler and a copy of the adapter of a policy.

        Its model may be another one, with layers of the same sizes. A policy under "reference" is
        seen under the "reference" of this model.
        """
        if other.weights == "reference":
            return self.at("reference").sampling(other.sampler)
        matrices = zip(self.parameters(), other.parameters(other.weights), strict=True)
        for own, given in matrices:
            own.copy_(given)
        return self.at("policy").sampling(other.sampler)

    def sampling(self, sampler: Sampler) -> Self:
        """Return a view with the same weights under another sampler."""
        view = copy.copy(self)
        view.sampler, view.times = sampler, self.model.schedule(sampler.steps)
        return view

    def keeping(self, steps: Sequence[int]) -> Self:
        """Return a view whose paths keep the latents before these steps."""
        view = copy.copy(self)
        view.kept_steps = steps
        return view

    def update_copy(self, name: str, decay: float) -> None:
        """Move a snapshot towards the policy: copy ← decay · copy + (1 - decay) · policy."""
        if decay == 1:
            return
        with torch.no_grad():
            for snapshot, parameter in zip(self.parameters(name), self.parameters(), strict=True):
                if decay:
                    snapshot.lerp_(parameter, 1 - decay)
                else:
                    snapshot.copy_(parameter)  # exact, which lerp with a weight of 1 need not be

    @contextmanager
    def _active(self) -> Iterator[None]:
        # PEFT's public switch walks every module and changes requires_grad, so the layers are set
        # one by one. They are set back even after an error: a backward pass under other weights
        # would give the policy no gradient, without a word.
        reference = self.weights == "reference"
        try:
            for layer in self._layers:
                layer._disable_adapters = reference
                layer._active_adapter = ["policy" if reference else self.weights]
            with torch.set_grad_enabled(self._gradient and torch.is_grad_enabled()):
                yield
        finally:
            for layer in self._layers:
                layer._disable_adapters, layer._active_adapter = False, ["policy"]

    @contextmanager
    def at_strength(self, factor: float) -> Iterator[None]:
        """Multiply the effect of the policy's adapter while the block runs; 0 is the reference.

        Raises UserError for DoRA, whose effect does not grow in proportion to a factor.
        """
        if self.lora.use_dora and factor != 1:
            raise UserError(
                "The adapter is a DoRA, which has no strengths but 1. Leave out --strength."
            )
        layers: list[Any] = [*self._layers]
        scales = [layer.scaling["policy"] for layer in layers]
        try:
            for layer, scale in zip(layers, scales, strict=True):
                layer.scaling["policy"] = factor * scale
            yield
        finally:
            for layer, scale in zip(layers, scales, strict=True):
                layer.scaling["policy"] = scale

    def loss_scale(self, passes: int) -> float:
        """Return the power of two that a loss is multiplied by before `backward`.

        It keeps gradients in float16 from rounding to zero; other dtypes need none. A loss is a
        mean over latent elements and passes, which makes its gradients smaller by both numbers.
        """
        if self.model.dtype != torch.float16:
            return 1.0
        return 2.0 ** round(math.log2(math.prod(self.model.latent_shape) * max(1, passes)))

    def encode(
        self,
        prompts: list[str],
        upcoming: Iterable[str] = (),
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> Cond:
        """Return the inputs of the prompts under the sampler's guidance, one row per prompt.

        Args:
            prompts: One prompt per image.
            upcoming: The prompts that come next. Text encoders that are needed encode them too.
            metadata: The metadata of each prompt, which may hold its `negative_prompt`.
        """
        sampler, rows = self.sampler, metadata or [{}] * len(prompts)
        negative = [negative_prompt(row, sampler.negative_prompt) for row in rows]
        cond = self.model.encode(prompts, sampler.embedded_guidance, upcoming, negative)
        return cond.guided(sampler.guidance)

    def velocity(self, x: Latent, t: PerImage, cond: Cond) -> Latent:
        """Return v_θ(x, t), guided as `cond` says.

        A gradient-free view computes it in passes of `images_per_pass`. With a gradient the caller
        chooses the size of the pass, because that decides what is kept for the backward pass.
        """
        if not len(x):
            return x
        size = len(x) if self._gradient else self.images_per_pass or len(x)
        with self._active():
            parts = zip(x.split(size), t.split(size), range(0, len(x), size), strict=True)
            return concatenate(
                self.model.velocity(x, t, cond[start : start + size]) for x, t, start in parts
            )

    def step(self, x: Latent, k: int, cond: Cond, stochastic: bool = True) -> Gaussian:
        """Return π_θ(x_{k+1} | x_k, cond); a step of the ODE if `stochastic` is False."""
        gaussian, _v = self._step(x, k, cond, stochastic)
        return gaussian

    def _step(self, x: Latent, k: int, cond: Cond, stochastic: bool) -> tuple[Gaussian, Latent]:
        t, s = self.times[k], self.times[k + 1]
        v = self.velocity(x, x.new_full((len(x),), t), cond)
        dynamics: Dynamics = self.sampler.dynamics if stochastic else ode
        return dynamics(x, v, t, s), v

    def _mean_and_velocity(
        self, x: Latent, k: int, cond: Cond, stochastic: bool
    ) -> tuple[Latent, Latent]:
        gaussian, v = self._step(x, k, cond, stochastic)
        return gaussian.mean, v

    def generate(
        self,
        batch: Batch,
        purpose: str = "rollout",
        steps: range = range(0),
        first: int = 0,
        x: Latent | None = None,
    ) -> Path:
        """Sample from noise to x0. The noise of every step comes from the keys of the batch.

        Args:
            batch: One row per image.
            purpose: Names the stream of noise, so that evaluations differ from rollouts.
            steps: The stochastic steps; the others are steps of the ODE.
            first: The first step to take. Those before it must be steps of the ODE.
            x: The latents (B, *latent) before that step; by default the initial noise.
        """
        shape, device = self.model.latent_shape, self.model.device
        if x is None:
            x = self.initial_noise(batch, purpose)
        latents, log_probs, states = [], [], dict[int, Latent]()
        for k in range(first, self.sampler.steps):
            if k in self.kept_steps:
                states[k] = x
            gaussian = self.step(x, k, batch.cond, k in steps)
            if k in steps:
                latents.append(x)
                # Draw 0 is the initial noise, so step k takes draw k + 1.
                x = gaussian.sample(batch.noise(purpose, k + 1, shape).to(device))
                log_probs.append(gaussian.log_prob(x))
            else:
                x = gaussian.mean
            if k + 1 == steps.stop:
                latents.append(x)
        if not log_probs:
            return Path(x, x.new_zeros(len(x), 0, *shape), x.new_zeros(len(x), 0), steps, states)
        return Path(x, torch.stack(latents, 1), torch.stack(log_probs, 1), steps, states)

    def beginning(self, batch: Batch, purpose: str, count: int) -> Latent:
        """Return the latents (B, *latent) after the first `count` ODE steps from noise."""
        x = self.initial_noise(batch, purpose)
        for k in range(count):
            x = self.step(x, k, batch.cond, stochastic=False).mean
        return x

    def std(self, k: int) -> float:
        """Return the standard deviation of the noise that stochastic step k adds."""
        nothing = torch.zeros(1, 1)
        return self.sampler.dynamics(nothing, nothing, self.times[k], self.times[k + 1]).std

    def initial_noise(self, batch: Batch, purpose: str = "rollout") -> Latent:
        """Return the noise that the images of the batch begin with."""
        shape, shared = self.model.latent_shape, self.sampler.same_noise
        return batch.noise(purpose, 0, shape, shared=shared).to(self.model.device)

    def unroll(self, x: Latent, batch: Batch, steps: range) -> Latent:
        """Take some of the sampler's steps; a gradient passes through them if it is enabled.

        From `initial_noise(batch)` through all steps, x is the x0 that `generate` samples.
        """
        for k in steps:
            x, _v = self.unroll_step(x, batch, k)
        return x

    def unroll_step(self, x: Latent, batch: Batch, k: int) -> tuple[Latent, Latent]:
        """Return x_{k+1} and the velocity v_θ(x_k, t_k) that led to it, both with a gradient.

        Only x_k is kept for the backward pass, which recomputes the rest. The noise of a stochastic
        step comes from the keys of the batch, as in `generate`, and takes no gradient.
        """
        seed, step = batch.keys.of_step
        stochastic = k in self.sampler.stochastic_steps(step, seed)
        mean, v = cast(
            tuple[Latent, Latent],
            checkpoint(self._mean_and_velocity, x, k, batch.cond, stochastic, use_reentrant=False),
        )
        if not stochastic:
            return mean, v
        noise = batch.noise("rollout", k + 1, self.model.latent_shape).to(mean.device)
        return Gaussian(mean, self.std(k)).sample(noise), v

    def denoise(self, x: Latent, t: PerImage, cond: Cond) -> Latent:
        """Return x0 in one step from x at t; only x is kept for the backward pass."""
        return cast(Latent, checkpoint(self._denoise, x, t, cond, use_reentrant=False))

    def _denoise(self, x: Latent, t: PerImage, cond: Cond) -> Latent:
        return x - over_latent(t, x) * self.velocity(x, t, cond)

    def decode(self, x0: Latent) -> Tensor:
        """Return pictures (B, 3, H, W) in [0, 1]."""
        return self.model.decode(x0)

    def decode_checkpointed(self, x0: Latent) -> Tensor:
        """Return pictures like `decode`; only x0 is kept for the backward pass."""
        return cast(Tensor, checkpoint(self.decode, x0, use_reentrant=False))

    def state(self, name: str = "policy") -> dict[str, Tensor]:
        """Return the matrices of an adapter by PEFT's names, which leave out the adapter's name."""
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(self.model.transformer, adapter_name=name)

    def load_state(self, state: dict[str, Tensor], name: str = "policy") -> None:
        """Put matrices saved by `state` into an adapter. Raises UserError if they do not fit."""
        from peft import set_peft_model_state_dict

        different = set(self.state(name)) ^ set(state)
        if different:
            raise UserError(
                f"the adapter does not fit the model: {len(different)} matrices differ, "
                f"for example {min(different)}. Use an adapter of the same model and model.lora."
            )
        set_peft_model_state_dict(self.model.transformer, state, adapter_name=name)


def lora_config(model: FlowModel) -> "LoraConfig":
    """Return PEFT's settings of the adapter. Raises UserError if a target matches no layer."""
    from peft import LoraConfig

    from flowalign.models.adapted_linear import AdaptedLinear

    lora = model.config.lora
    targets = lora.targets or list(model.lora_targets)
    modules = model.transformer.named_modules()
    names = [name for name, module in modules if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            endings = sorted({".".join(name.split(".")[-2:]) for name in names})
            raise UserError(
                f"model.lora.targets: no layer's name ends with {target!r}; "
                f"the layers end with {', '.join(endings)}."
            )
    adapted = [name for name in names if any(name == t or name.endswith(f".{t}") for t in targets)]
    for key in ("rank_pattern", "alpha_pattern"):
        _check_pattern(f"model.lora.{key}", getattr(lora, key), adapted)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        # Whole names: an ending may also be that of a module that is no linear layer.
        target_modules=adapted,
        init_lora_weights=True if lora.init == "default" else "gaussian",
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
    )
    # The only way PEFT has to choose the class of a layer; its documentation describes it.
    config._register_custom_module({nn.Linear: AdaptedLinear})
    return config


def _check_pattern(key: str, pattern: Mapping[str, int], layers: Sequence[str]) -> None:
    """Raise UserError if an entry of a pattern stands for no adapted layer."""
    for name in pattern:
        try:
            if any(matches(name, layer) for layer in layers):
                continue
        except re.error as error:
            raise UserError(f"{key}: {name!r} is not a regular expression: {error}.") from None
        endings = sorted({".".join(layer.split(".")[-2:]) for layer in layers})
        raise UserError(
            f"{key}: no adapted layer's name ends with {name!r}; they end with "
            f"{', '.join(endings)}. Correct the name, or add it to model.lora.targets."
        )
