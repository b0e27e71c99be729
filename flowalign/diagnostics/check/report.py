"""`flowalign check`: find what is wrong with a run before it trains.

The run is set up as for training. Then a small batch and the model itself answer each check.
"""

from collections.abc import Callable, Iterator
from itertools import chain

import torch

from flowalign import distributed
from flowalign.config.sections import Config
from flowalign.diagnostics.check.adapter import (
    compare_reference,
    compare_saved_adapter,
    compare_start,
)
from flowalign.diagnostics.check.arithmetic import describe_run, describe_step
from flowalign.diagnostics.check.gradients import (
    check_gradients,
    check_kl_gradient,
    check_optimizer_step,
)
from flowalign.diagnostics.check.probes import (
    perturb_adapter,
    probe_inputs,
    row_by_row,
    small_batch,
)
from flowalign.diagnostics.check.quantized import compare_full_model
from flowalign.diagnostics.check.ratios import check_initial_loss
from flowalign.diagnostics.check.rewards import check_rewards
from flowalign.diagnostics.check.sampler import matches_scheduler
from flowalign.models import load_model
from flowalign.models.compiled import uncompiled
from flowalign.rewards.inspection import Finding
from flowalign.runs.advice import advise_on_out_of_memory
from flowalign.tracking.registry import load_trackers
from flowalign.training.preflight import preflight_findings
from flowalign.training.setup import assemble, read_inputs


def check(config: Config, say: Callable[[str], None] = print) -> bool:
    """Print one line for each check, and return True if nothing is wrong.

    All processes must call it together. Only the main process prints.

    Raises:
        UserError: The run cannot be set up at all.
        OutOfMemory: The device has too little memory for a pass of the run.
    """
    wrong: list[str] = []
    say = say if distributed.is_main() else lambda _: None
    with distributed.ending_together(), advise_on_out_of_memory(config):
        for finding in findings(config):
            say(f"{'!' if finding.wrong else ' '} {finding.subject + ':':14}{finding.text}")
            wrong += [finding.subject] * finding.wrong
        everywhere = distributed.gather_objects(wrong)
    # Each subject once, in the order of the checks.
    subjects = dict.fromkeys(chain.from_iterable(everywhere))
    say(f"Wrong: {', '.join(subjects)}." if subjects else "Nothing wrong was found.")
    return not subjects


def findings(config: Config) -> Iterator[Finding]:
    """Yield the findings of all checks, cheapest first."""
    load_trackers(config.tracking)
    inputs = read_inputs(config)
    yield describe_step(inputs)
    yield describe_run(inputs)
    model = load_model(config.model, str(distributed.device()))
    probe = probe_inputs(model, inputs)
    # Measured before the policy adds adapters to the model: this is what they must not change.
    # Without a compiler, because a graph with adapters may round differently from one without.
    with torch.no_grad(), uncompiled():
        bare = row_by_row(model, probe)
    yield from compare_full_model(model, bare, probe)
    assembly = assemble(inputs, model)
    policy, objective = assembly.policy, config.objective
    with torch.no_grad(), uncompiled():
        start = row_by_row(policy.at("policy"), probe)
        yield from compare_start(policy, start, bare, probe)
    yield from preflight_findings(assembly)
    if scheduler := model.scheduler(config.sampler.steps):
        with uncompiled():
            yield matches_scheduler(policy, scheduler, probe)
    batch = small_batch(assembly)
    yield from check_initial_loss(policy, objective, batch, moved=bool(config.model.adapter))
    yield from check_rewards(assembly)
    # From here on the adapter is not 0, so that it has an effect and both its matrices have a
    # gradient.
    perturb_adapter(policy)
    with uncompiled():
        yield compare_reference(policy, bare, start, probe)
    yield check_gradients(policy, objective, batch)
    yield from check_kl_gradient(policy, objective, batch)
    yield check_optimizer_step(policy, assembly.state.optimizer)
    with uncompiled():
        yield compare_saved_adapter(policy, probe)
