"""Checks of adapters: switched off they change nothing, and saved they are what was trained."""

import math
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer

from flowalign.diagnostics.check.probes import matrix_names, Probe, row_by_row
from flowalign.flow import Latent, mean_square
from flowalign.models.given_adapters import find_file
from flowalign.models.lora import ADAPTER_FILE
from flowalign.policy import Policy
from flowalign.rewards.inspection import Finding
from flowalign.runs.adapter import save_adapter

MAX_ERROR = 0.05
"""Error of a saved adapter, as a share of its effect, above which float32 rounding is ruled out."""


@torch.no_grad()
def compare_reference(policy: Policy, bare: Latent, start: Latent, probe: Probe) -> Finding:
    """Check that the reference is the loaded model bit for bit, and snapshots the policy's start.

    `bare` holds the model's velocities from before the adapters were added, and `start` those of
    the policy as it begins. The adapter that trains was perturbed since and must differ.
    """
    equal = {"reference": bare, **dict.fromkeys(policy.snapshots, start)}
    velocities = {name: row_by_row(policy.at(name), probe) for name in [*equal, "policy"]}
    wrong = [name for name in equal if not torch.equal(velocities[name], equal[name])]
    if wrong:
        text = f"the velocities of {', '.join(wrong)} differ from those that a run begins with"
        return Finding("reference", text, wrong=True)
    if torch.equal(velocities["policy"], start):
        return Finding("reference", "the adapter that trains has no effect", wrong=True)
    text = f"equal to what a run begins with bit for bit: {', '.join(equal)}"
    return Finding("reference", f"{text}; the adapter that trains changes it")


@torch.no_grad()
def compare_start(policy: Policy, start: Latent, bare: Latent, probe: Probe) -> Iterator[Finding]:
    """Check that the policy begins as the model, or as diffusers loads `model.adapter`.

    `start` holds the policy's velocities, and `bare` those of the model.
    """
    path = policy.model.config.adapter
    if not path:
        if not torch.equal(start, bare):
            yield Finding("start", "a new adapter already changes the velocities", wrong=True)
        return
    text = f"the policy begins as {path}"
    if not load_given_adapter(policy, path):
        yield Finding("start", f"{text}, which the tools of the model's family do not read")
        return
    v = row_by_row(policy.at("given"), probe)
    policy.model.delete_adapter("given")
    effect = mean_square(v - bare).clamp(min=torch.finfo(v.dtype).tiny)
    error = (mean_square(v - start) / effect).sqrt().max().item()
    wrong = not error <= MAX_ERROR
    yield Finding(
        "start", f"{text} in diffusers, with an error of {error:.1g} of its effect", wrong
    )


def load_given_adapter(policy: Policy, path: str) -> bool:
    """Load a file as the adapter "given", by the tools of the family. False if they cannot."""
    file = find_file(path, "model.adapter")
    with warnings.catch_warnings():
        # PEFT warns that the model already has an adapter, which is intended here.
        warnings.simplefilter("ignore", UserWarning)
        try:
            place = file.parent if file.name == ADAPTER_FILE else file
            policy.model.load_adapter(place, "given")
        except (OSError, ValueError, KeyError, TypeError):
            return False
    # diffusers ignores a file with other names.
    return any("given" in layer.scaling for layer in adapted_layers(policy))


@torch.no_grad()
def compare_saved_adapter(policy: Policy, probe: Probe) -> Finding:
    """Check that diffusers loads the saved adapter with the same matrices and scale.

    The comparison is in the model's dtype, which the saved file has.
    """
    load_saved_adapter(policy)
    dtype = policy.model.dtype
    lost, count = lost_matrices(policy), len(policy.parameters())
    scales = differing_scales(policy)
    v, v_ref, v_saved = (
        policy.at(name).velocity(probe.x, probe.t, probe.cond)
        for name in ("policy", "reference", "saved")
    )
    policy.model.delete_adapter("saved")
    error = (mean_square(v_saved - v) / mean_square(v - v_ref)).sqrt().max().item()
    name = str(dtype).removeprefix("torch.")
    text = (
        f"diffusers loads the saved adapter, in {name}, with an error of {error:.1g} of its effect"
    )
    if lost:
        text += f": {lost} of {count} matrices were lost"
    elif scales:
        text += f": its scale is {scales[0][1]} instead of {scales[0][0]}"
    # Half precision rounds a small adapter to something else, which is no loss.
    precise = error < (MAX_ERROR if dtype == torch.float32 else math.inf)
    return Finding("adapter", text, wrong=bool(lost or scales or not precise))


def load_saved_adapter(policy: Policy) -> None:
    """Save the adapter as a run does, and load the file as the adapter "saved"."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        save_adapter(policy, Path(folder))
        # PEFT warns that the model already has an adapter, which is intended here.
        warnings.simplefilter("ignore", UserWarning)
        policy.model.load_adapter(Path(folder), "saved")


def adapted_layers(policy: Policy) -> list[LoraLayer]:
    """Return the layers that have adapters."""
    modules = policy.model.transformer.modules()
    return [module for module in modules if isinstance(module, LoraLayer)]


def lost_matrices(policy: Policy) -> int:
    """Return how many matrices of the saved adapter are missing or have other values."""
    named, dtype = dict(policy.model.transformer.named_parameters()), policy.model.dtype
    lost = 0
    for name in matrix_names(policy):
        saved = named.get(name.replace(".policy.", ".saved."))
        lost += saved is None or not torch.equal(saved.to(dtype), named[name].to(dtype))
    return lost


def differing_scales(policy: Policy) -> list[tuple[float, float | None]]:
    """Return the trained and the saved scale of every layer where they differ."""
    layers = adapted_layers(policy)
    scales = [(layer.scaling["policy"], layer.scaling.get("saved")) for layer in layers]
    return [(trained, saved) for trained, saved in scales if trained != saved]
