"""The policy: a model, named LoRA adapters, and the sampler that makes images with them."""

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, cast, Self

import torch
from peft import get_peft_model_state_dict, LoraConfig, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import Field
from torch import nn, Tensor
from torch.utils.checkpoint import checkpoint

from flowalign.batch import Batch, Cond
from flowalign.dynamics import Dynamics, Gaussian, is_stochastic, ode, Window
from flowalign.errors import UserError
from flowalign.flow import concatenate, Latent, over_latent, PerImage
from flowalign.models.base import FlowModel
from flowalign.settings.types import (
    Count,
    CountOrZero,
    Guidance,
    NonNegative,
    Settings,
    Share,
    WrongSetting,
)


@dataclass
class Sampler(Settings):
    """How images are made."""

    steps: Annotated[int, Field(ge=1, le=1000)] = 10
    dynamics: Any = None
    """(x, v, t, s) -> Gaussian; the ODE when there is none. In a YAML by name, with its fields: {name: flow_sde, eta: 0.7}."""
    guidance: Guidance = 1.0
    """Classifier-free; 1 for none."""
    embedded_guidance: Annotated[float, Field(ge=0, le=100)] = 3.5
    """What Flux-dev is told."""
    window: Window = field(default_factory=Window)
    same_noise: bool = False
    """Whether the rollouts of a group start from one noise and differ by their stochastic steps alone (DanceGRPO)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.dynamics = self.dynamics or ode

    def stochastic_steps(self, step: int, seed: int) -> range:
        """Of a path, in this training step."""
        return (
            self.window.steps(self.steps, step, seed) if is_stochastic(self.dynamics) else range(0)
        )


@dataclass
class Decay(Settings):
    """How a copy follows the policy: copy ← decay · copy + (1 - decay) · policy, `decay` a function of the updates so far.

    decay(n) = value + slope · (n - start), at most `end`; `value` before `start`. 0 copies, 1 never follows.
    """

    start: CountOrZero = 0
    value: Share = 0.0
    slope: NonNegative = 0.0
    end: Share = 1.0
    every: Count = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value > self.end:
            raise WrongSetting(f"value is {self.value}, but end {self.end}; write value <= end.")

    def __call__(self, updates: int) -> float:
        if updates % self.every:
            return 1.0
        return min(self.end, self.value + self.slope * max(0, updates - self.start))


@dataclass
class Path:
    """The latents a sampler visited, and the log-probability of every stochastic step."""

    x: Latent  # (B, K + 1, *latent)
    log_prob: Tensor  # (B, K)  0 where the step is deterministic
    steps: range
    """The stochastic steps."""


class Policy:
    """π_θ: velocities and sampler steps under the weights named `weights`.

    "policy" is the adapter that trains, "reference" the model without adapters, other names are snapshots. The model's
    adapters always stand at "policy" between calls, so that a backward pass finds them there.
    """

    def __init__(
        self,
        model: FlowModel,
        sampler: Sampler,
        snapshots: list[str] | None = None,
        images_per_pass: int | None = None,
    ):
        self.model, self.sampler, self.images_per_pass = model, sampler, images_per_pass
        self.weights, self._gradient = "policy", True
        self.times = model.schedule(sampler.steps)
        self.lora = lora_config(model)
        self.snapshots = list(snapshots or [])
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", UserWarning
            )  # PEFT warns of a second adapter, which is what is meant
            for name in [*self.snapshots, "policy"]:
                model.transformer.add_adapter(self.lora, name)
        self._layers = [
            layer for layer in model.transformer.modules() if isinstance(layer, BaseTunerLayer)
        ]
        for parameter in model.transformer.parameters():
            parameter.requires_grad_(False)
        for name in [*self.snapshots, "policy"]:
            for parameter in self.parameters(name):
                parameter.data = parameter.data.float()
                parameter.requires_grad_(name == "policy")
        for name in self.snapshots:
            self.update_copy(name, 0.0)

    def parameters(self, name: str = "policy") -> list[nn.Parameter]:
        """The adapter's matrices, in a fixed order."""
        found = [p for key, p in self.model.transformer.named_parameters() if f".{name}." in key]
        if len(found) != 2 * len(self._layers):
            raise RuntimeError(
                f"{len(found)} matrices of adapter {name!r} on {len(self._layers)} layers"
            )
        return found

    def at(self, name: str) -> Self:
        """A gradient-free view of the policy under other weights: "reference", a snapshot, or "policy" itself."""
        view = copy.copy(self)
        view.weights, view._gradient = name, False
        return view

    def sampling(self, sampler: Sampler) -> Self:
        """The same weights under another sampler."""
        view = copy.copy(self)
        view.sampler, view.times = sampler, self.model.schedule(sampler.steps)
        return view

    def update_copy(self, name: str, decay: float) -> None:
        """Name ← decay · name + (1 - decay) · policy."""
        if decay == 1:
            return
        with torch.no_grad():
            for snapshot, parameter in zip(self.parameters(name), self.parameters(), strict=True):
                snapshot.lerp_(parameter, 1 - decay) if decay else snapshot.copy_(parameter)

    @contextmanager
    def _active(self) -> Iterator[None]:
        # The public switch walks every module and changes requires_grad, so the layers are set one by one.
        try:
            for layer in self._layers:
                layer._disable_adapters = self.weights == "reference"
                layer._active_adapter = ["policy" if self.weights == "reference" else self.weights]
            with torch.set_grad_enabled(self._gradient and torch.is_grad_enabled()):
                yield
        finally:
            for layer in self._layers:
                layer._disable_adapters, layer._active_adapter = False, ["policy"]

    def loss_scale(self, passes: int) -> float:
        """What a loss is multiplied with before `backward`, so that float16 does not round its gradients to 0: a power of two."""
        if self.model.transformer.dtype != torch.float16:
            return 1.0
        return 2.0 ** round(math.log2(math.prod(self.model.latent_shape) * max(1, passes)))

    def encode(self, prompts: list[str]) -> Cond:
        """Embeddings of the prompts, with the sampler's guidance."""
        cond = self.model.encode(prompts).guided(self.sampler.guidance)
        return replace(cond, embedded_guidance=self.sampler.embedded_guidance)

    def velocity(self, x: Latent, t: PerImage, cond: Cond) -> Latent:
        """v_θ(x, t), guided as `cond` says. A gradient-free view makes it in passes of `images_per_pass`."""
        if not len(x):
            return x
        size = len(x) if self._gradient else self.images_per_pass or len(x)
        with self._active():
            parts = zip(x.split(size), t.split(size), range(0, len(x), size), strict=True)
            return concatenate(
                self.model.velocity(x, t, cond[start : start + size]) for x, t, start in parts
            )

    def step(self, x: Latent, k: int, cond: Cond, stochastic: bool = True) -> Gaussian:
        """π_θ(x_{k+1} | x_k, cond); a deterministic step of the ODE where `stochastic` is False."""
        t, s = self.times[k], self.times[k + 1]
        v = self.velocity(x, x.new_full((len(x),), t), cond)
        dynamics: Dynamics = self.sampler.dynamics if stochastic else ode
        return dynamics(x, v, t, s)

    def generate(self, batch: Batch, purpose: str = "rollout", steps: range = range(0)) -> Path:
        """Sample from noise to x0; the noise of every step comes from the batch's keys."""
        shape, device = self.model.latent_shape, self.model.device
        x = self.start(batch, purpose)
        path, log_probs = [x], []
        for k in range(self.sampler.steps):
            gaussian = self.step(x, k, batch.cond, k in steps)
            if k in steps:
                x = gaussian.sample(batch.noise(purpose, k + 1, shape).to(device))
                log_probs.append(gaussian.log_prob(x))
            else:
                x = gaussian.mean
                log_probs.append(x.new_zeros(len(x)))
            path.append(x)
        return Path(torch.stack(path, 1), torch.stack(log_probs, 1), steps)

    def std(self, k: int) -> float:
        """Of the noise that stochastic step k adds."""
        nothing = torch.zeros(1, 1)
        return self.sampler.dynamics(nothing, nothing, self.times[k], self.times[k + 1]).std

    def start(self, batch: Batch, purpose: str = "rollout") -> Latent:
        """The noise that the batch's images begin with."""
        return batch.noise(purpose, 0, self.model.latent_shape, shared=self.sampler.same_noise).to(
            self.model.device
        )

    def unroll(self, x: Latent, cond: Cond, steps: range) -> Latent:
        """ODE steps that a gradient passes through; of each only its input is kept for the backward pass."""
        for k in steps:
            x = cast(Latent, checkpoint(self._ode_step, x, k, cond, use_reentrant=False))
        return x

    def denoise(self, x: Latent, t: PerImage, cond: Cond) -> Latent:
        """x0 straight from x at t; only x is kept for the backward pass."""
        return cast(Latent, checkpoint(self._denoise, x, t, cond, use_reentrant=False))

    def _denoise(self, x: Latent, t: PerImage, cond: Cond) -> Latent:
        return x - over_latent(t, x) * self.velocity(x, t, cond)

    def _ode_step(self, x: Latent, k: int, cond: Cond) -> Latent:
        return self.step(x, k, cond, stochastic=False).mean

    def decode(self, x0: Latent) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1]."""
        return self.model.decode(x0)

    def decode_checkpointed(self, x0: Latent) -> Tensor:
        """As `decode`; only x0 is kept for the backward pass."""
        return cast(Tensor, checkpoint(self.decode, x0, use_reentrant=False))

    def state(self, name: str = "policy") -> dict[str, Tensor]:
        """The adapter's matrices by the names PEFT gives them, without the adapter's name."""
        return get_peft_model_state_dict(self.model.transformer, adapter_name=name)

    def load_state(self, state: dict[str, Tensor], name: str = "policy") -> None:
        """Put matrices saved by `state` into an adapter. Raises UserError where they do not fit."""
        if set(state) != set(self.state(name)):
            missing = set(self.state(name)) ^ set(state)
            raise UserError(
                f"the adapter does not fit the model: {len(missing)} matrices differ, {sorted(missing)[0]} for one."
            )
        set_peft_model_state_dict(self.model.transformer, state, adapter_name=name)


def lora_config(model: FlowModel) -> LoraConfig:
    """PEFT's configuration of the adapter; UserError when no layer of the model is a target."""
    lora = model.config.lora
    targets = lora.targets or model.lora_targets
    names = [
        name for name, module in model.transformer.named_modules() if isinstance(module, nn.Linear)
    ]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            ends = sorted({".".join(name.split(".")[-2:]) for name in names})
            raise UserError(
                f"model.lora.targets: no layer's name ends with {target!r}; the layers end with {', '.join(ends)}."
            )
    init = {"default": True, "gaussian": "gaussian"}[lora.init]
    return LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, init_lora_weights=init
    )
