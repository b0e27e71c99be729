"""flowalign check: what could be wrong with a run, measured on its own model before it starts."""

import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn, Tensor

from flowalign import distributed
from flowalign.batch import Batch, Cond, Examples, Pairs, Prompts
from flowalign.config.sections import Config
from flowalign.data.prompts import Prompt
from flowalign.flow import Latent, mean_square, PerImage
from flowalign.models import load_model
from flowalign.models.base import FlowModel
from flowalign.objectives.base import Loss, Objective
from flowalign.objectives.terms import VelocityKL
from flowalign.policy import Policy
from flowalign.rewards.base import Reward
from flowalign.rewards.combine import WeightedSum
from flowalign.rewards.inspection import Finding, inspect_reward, Samples
from flowalign.rollouts.batch_plan import BatchPlan, largest_divisor
from flowalign.rollouts.collect import collect
from flowalign.rollouts.sources import source_of
from flowalign.runs.adapter import save_adapter
from flowalign.runs.advice import advise_on_out_of_memory
from flowalign.training.gradient import compute_gradient, Meter, split
from flowalign.training.preflight import before_start, IMAGES, keyed_prompts, PROMPTS
from flowalign.training.setup import assemble, Assembly, Inputs, read_inputs


def check(config: Config, say: Callable[[str], None] = print) -> bool:
    """Everything, said by the first process as it is found. Whether nothing is wrong. UserError where it cannot work at all."""
    wrong, say = [], say if distributed.is_main() else lambda _: None
    with advise_on_out_of_memory(config):
        for finding in findings(config):
            say(f"{'!' if finding.wrong else ' '} {finding.subject + ':':14}{finding.text}")
            wrong += [finding.subject] * finding.wrong
    wrong = [subject for subjects in distributed.gather_objects(wrong) for subject in subjects]
    say(f"Wrong: {', '.join(dict.fromkeys(wrong))}." if wrong else "Nothing wrong was found.")
    return not wrong


def findings(config: Config) -> Iterator[Finding]:
    inputs = read_inputs(config)
    yield from arithmetic(inputs)
    model = load_model(config.model, str(distributed.device()))
    x, t, cond = questions(model, inputs)
    with torch.no_grad():
        bare = one_by_one(model, x, t, cond)
    assembly = assemble(inputs, model)
    policy, objective = assembly.policy, config.objective
    yield from before_start(assembly)
    if model.scheduler(config.sampler.steps):
        yield pipeline_s_own_steps(policy, x, cond)
    batch = small_batch(assembly)
    yield from at_the_start(policy, objective, batch)
    yield from look_at_rewards(assembly)
    stir(policy)
    yield adapters_off(policy, bare, x, t, cond)
    yield from gradients(policy, objective, batch)
    yield moved_by_optimizer(policy, assembly.state.optimizer)
    yield saved_adapter(policy, x, t, cond)


def arithmetic(inputs: Inputs) -> Iterator[Finding]:
    """What a step and the whole run are made of."""
    counts, train, kind = inputs.plan, inputs.config.train, inputs.config.objective.learns_from
    prompts, images = counts.prompts_per_step, counts.images_per_prompt
    what, most = {Pairs: "pairs", Examples: "pictures"}.get(kind, "images"), ""
    if inputs.examples:
        rows_per_prompt, made, met = 1, f"{prompts} {what}", what
        total = f"{prompts * train.steps:,} {what}"
    else:
        rows_per_prompt, made, met = (
            images,
            f"{prompts} prompts × {images} images = {counts.images_per_step} images",
            "prompts",
        )
        total = f"{counts.images_per_step * train.steps:,} images"
    if kind is Pairs and not inputs.examples:
        rows_per_prompt, most = inputs.config.data.ranking.top**2, "at most "  # ties teach nothing
        made += f", of them {prompts * rows_per_prompt} pairs"
    rows = prompts // counts.updates_per_step // counts.processes * rows_per_prompt
    passes = math.ceil(rows / max(1, counts.images_per_pass // kind.images_per_row))
    split = f"{counts.updates_per_step} update(s) of {most}{rows} {what} on each of {counts.processes} process(es)"
    yield Finding("step", f"{made}; {split}, in {most}{passes} pass(es)")
    again = prompts * train.steps / len(inputs.examples or inputs.prompts)
    yield Finding(
        "run", f"{train.steps} steps, {total}; each of the {met} is met {again:.3g} times"
    )


def questions(model: FlowModel, inputs: Inputs) -> tuple[Latent, PerImage, Cond]:
    """Two latents of noise at two times."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *model.latent_shape, generator=generator).to(model.device)
    cond = model.encode([prompt.text for prompt in (inputs.prompts * 2)[:2]])
    return x, torch.tensor([0.9, 0.4], device=model.device), cond


def one_by_one(model: FlowModel | Policy, x: Latent, t: PerImage, cond: Cond) -> Latent:
    """Velocities row by row: batches of other sizes round differently, and passes have any."""
    return torch.cat(
        [model.velocity(x[i : i + 1], t[i : i + 1], cond[i : i + 1]) for i in range(len(x))]
    )


@torch.no_grad()
def pipeline_s_own_steps(policy: Policy, x: Latent, cond: Cond) -> Finding:
    """The policy's ODE steps against those of the pipeline's scheduler."""
    sampler = replace(policy.sampler, dynamics=None)
    view, scheduler = (
        policy.at("reference").sampling(sampler),
        policy.model.scheduler(sampler.steps),
    )
    ours = theirs = x
    for k, t in enumerate(scheduler.timesteps):
        ours = view.step(ours, k, cond).mean
        v = view.velocity(theirs, theirs.new_full((len(x),), float(scheduler.sigmas[k])), cond)
        theirs = scheduler.step(v, t, theirs, return_dict=False)[0]
    off = (mean_square(ours - theirs) / mean_square(theirs)).sqrt().max().item()
    text = f"{sampler.steps} ODE steps as {type(scheduler).__name__} makes them, to {off:.1g}"
    return Finding(
        "sampler",
        text if off < 1e-3 else f"differ from {type(scheduler).__name__}'s by {off:.2g}",
        not off < 1e-3,
    )


def chance(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """In the place of a reward, so that images of a prompt always differ: a number of each picture's own bytes."""
    return (images.double().flatten(1).mean(1) * 1e4) % 1


def small_batch(assembly: Assembly) -> Any:
    """What the objective learns from in a step, but of few images. Scores are by chance where no gradient passes through them."""
    context, given = assembly.context, bool(assembly.context.examples)
    prompts, images = (
        PROMPTS * distributed.count(),
        1 if given else min(IMAGES, context.plan.images_per_prompt),
    )
    plan = BatchPlan(
        prompts_per_step=prompts,
        images_per_prompt=images,
        updates_per_step=1,
        max_images_per_pass=context.plan.images_per_pass,
        processes=distributed.count(),
    )
    scorer = context.scorer
    if assembly.config.objective.learns_from is not Prompts:
        scorer = replace(
            scorer,
            rewards=[Reward("chance", chance)],
            combine=WeightedSum(),
            images_per_pass=PROMPTS * images,
        )
    kind = assembly.config.objective.learns_from
    return source_of(kind, replace(context, plan=plan, scorer=scorer))(0)[0]


def pass_size(policy: Policy, images: int) -> int:
    """The largest that divides so many images and is no larger than the run's own passes."""
    return largest_divisor(images, policy.images_per_pass or images)


def losses(
    policy: Policy, objective: Objective, batch: Batch, images_per_pass: int
) -> Iterator[tuple[Any, Loss]]:
    """Draw by draw, of every pass."""
    for one in split(policy, objective, batch, images_per_pass):
        yield one.number, objective.loss(policy, one.batch, one.draw)


def at_the_start(policy: Policy, objective: Objective, batch: Batch) -> Iterator[Finding]:
    """Before the first update KL is 0, and ratios are 1 but for the rounding of other batch sizes."""
    errors, kls = dict[int, float](), []
    for images_per_pass in {
        pass_size(policy, len(batch) * batch.images_per_row),
        batch.images_per_row,
    }:
        for number, loss in losses(policy, objective, batch, images_per_pass):
            if "ratio/max_log_error" in loss.stats:
                errors[number] = max(
                    errors.get(number, 0.0), loss.stats["ratio/max_log_error"].values.max().item()
                )
            if "kl" in loss.stats:
                kls.append(loss.stats["kl"].values.detach().abs().max().item())
            del loss  # with all that its backward pass would take, before the next is made
    if errors:
        yield ratio(
            list(errors.values()),
            objective.log_ratio_clip,
            str(policy.model.dtype).removeprefix("torch."),
        )
    if kls:
        guided = [anchor.guidance for anchor in anchors(objective) if anchor.guidance is not None]
        why = (
            f"; the reference is asked under guidance {guided[0]:g}"
            if guided
            else "; it should be 0"
            if max(kls)
            else ""
        )
        yield Finding(
            "kl", f"{max(kls):.2g} before the first update{why}", max(kls) > 0 and not guided
        )


def ratio(errors: list[float], log_ratio_clip: float, dtype: str) -> Finding:
    """The noise of log-ratios, step by step, against the range in which they are not clipped."""
    floor = max(errors)
    text = f"log-ratios before the first update, step by step, in {dtype}: {', '.join(f'{error:.1g}' for error in errors)}"
    if math.isfinite(log_ratio_clip):
        text += f"; clipped beyond {log_ratio_clip:g}"
    if floor < log_ratio_clip:
        return Finding("ratio", text, floor > 0.1)
    better = f", which is below their noise: write objective.clip_range: {10 * floor:.0e}"
    return Finding(
        "ratio", text + better + ("" if dtype == "float32" else " or model.dtype: float32"), True
    )


def anchors(objective: Objective) -> list[VelocityKL]:
    """What holds the objective to the model without adapter, on the forward process."""
    return [
        value
        for value in vars(objective).values()
        if isinstance(value, VelocityKL) and value.weight
    ]


def look_at_rewards(assembly: Assembly) -> Iterator[Finding]:
    """What every reward makes of pictures of the model itself. Few may all score the same, so that is only told."""
    policy, needed = (
        assembly.policy.at("reference"),
        assembly.config.objective.learns_from is Prompts,
    )
    batch = keyed_prompts(assembly.context, policy)
    rollout = collect(policy, batch, pass_size(policy, len(batch)), "check")
    prompts = [
        Prompt(text, metadata) for text, metadata in zip(batch.prompts, batch.metadata, strict=True)
    ]
    images = rollout.images.to(distributed.device()).float() / 255
    samples = Samples(images=images, prompts=prompts)
    trained = {reward.name: reward for reward in assembly.context.scorer.rewards}
    others = {reward.name: reward for reward in assembly.evaluator.judge.rewards}
    for name, reward in {**others, **trained}.items():
        found = inspect_reward(reward, samples)[1]
        told = (
            {"scores", "spread"} if needed and name in trained else {"scores", "spread", "gradient"}
        )
        wrong = any(finding.wrong for finding in found if finding.subject not in told)
        yield Finding(
            "reward", f"{name}: {'; '.join(finding.text for finding in found[1:])}", wrong
        )


def stir(policy: Policy) -> None:
    """Move the adapter that trains away from its start, where one of its two matrices is 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator).to(
                parameter.device
            )


@torch.no_grad()
def adapters_off(policy: Policy, bare: Latent, x: Latent, t: PerImage, cond: Cond) -> Finding:
    """The reference, and snapshots as they begin, bit for bit the model that was loaded; the adapter changes it."""
    views = {
        name: one_by_one(policy.at(name), x, t, cond)
        for name in ("reference", *policy.snapshots, "policy")
    }
    apart = [name for name, v in views.items() if name != "policy" and not torch.equal(v, bare)]
    if apart:
        return Finding(
            "reference", f"the velocities of {', '.join(apart)} are not the loaded model's", True
        )
    if torch.equal(views["policy"], bare):
        return Finding("reference", "the adapter that trains changes nothing", True)
    same = ", ".join(["reference", *policy.snapshots])
    return Finding(
        "reference", f"bit for bit the loaded model: {same}; the adapter that trains moves it"
    )


def gradients(policy: Policy, objective: Objective, batch: Batch) -> Iterator[Finding]:
    """Every matrix of the adapter that the velocity depends on receives a gradient, nothing else does, and KL has one."""
    named = dict(zip(names_of(policy), policy.parameters(), strict=True))
    for parameter in policy.parameters():
        parameter.grad = None
    compute_gradient(
        policy,
        objective,
        batch,
        pass_size(policy, len(batch) * batch.images_per_row),
        Meter(),
    )
    without = {name for name, p in named.items() if p.grad is None or not p.grad.any()}
    unused = {name for name in without if not reaches(policy, named[name], batch)}
    modules = policy.model.networks().values()
    mine = set(map(id, named.values()))
    others = [
        name
        for m in modules
        for name, p in m.named_parameters()
        if p.grad is not None and id(p) not in mine
    ]
    bad = [name for name, p in named.items() if p.grad is not None and not p.grad.isfinite().all()]
    text = f"{len(named) - len(without)} of {len(named)} matrices receive one"
    text += (
        f"; the velocity does not depend on {len(unused)}, {min(unused)} for one" if unused else ""
    )
    if silent := sorted(without - unused):
        yield Finding("gradient", f"{text}; none reaches {silent[0]}", True)
    elif others or bad:
        what = f"{others[0]} receives one too" if others else f"that of {bad[0]} is not finite"
        yield Finding("gradient", f"{text}; {what}", True)
    else:
        yield Finding("gradient", f"{text}, and nothing else does")
    yield from kl_gradient(policy, objective, batch)


def kl_gradient(policy: Policy, objective: Objective, batch: Batch) -> Iterator[Finding]:
    """Where there is a KL: whether it pulls."""
    for _, loss in losses(
        policy,
        objective,
        batch,
        pass_size(policy, len(batch) * batch.images_per_row),
    ):
        if "kl" not in loss.stats:
            return
        kl, trained = (
            loss.stats["kl"].values.mean(),
            [p for p in policy.parameters() if p.requires_grad],
        )
        found = torch.autograd.grad(kl, trained, allow_unused=True) if kl.requires_grad else []
        norm = math.sqrt(sum(g.double().square().sum().item() for g in found if g is not None))
        yield Finding(
            "kl gradient",
            f"norm {norm:.2g} where kl is {kl.item():.2g}" if norm else "kl has no gradient",
            not norm,
        )
        return


def names_of(policy: Policy) -> list[str]:
    """Of the adapter's matrices, in the order of `parameters`."""
    return [name for name, _ in policy.model.transformer.named_parameters() if ".policy." in name]


def reaches(policy: Policy, parameter: nn.Parameter, batch: Batch) -> bool:
    """Whether velocities depend on a matrix; it counts as one that they should where it is frozen."""
    if not parameter.requires_grad:
        return True
    x, t = policy.start(batch)[:1], torch.full((1,), 0.5, device=policy.model.device)
    v = policy.velocity(x, t, batch.cond[:1])
    weights = torch.linspace(-1, 2, v.numel(), device=v.device).view_as(v)
    (found,) = torch.autograd.grad((v * weights).sum(), parameter, allow_unused=True)
    return found is not None and bool(found.any())


def moved_by_optimizer(policy: Policy, optimizer: torch.optim.Optimizer) -> Finding:
    """One update moves the adapter that trains, and no snapshot."""
    names = ["policy", *policy.snapshots]
    before = {name: [p.detach().clone() for p in policy.parameters(name)] for name in names}
    optimizer.step()
    moved = {
        n: any(
            not torch.equal(p, old) for p, old in zip(policy.parameters(n), before[n], strict=True)
        )
        for n in names
    }
    wrong = not moved["policy"] or any(moved[name] for name in policy.snapshots)
    text = f"an update moves {', '.join(name for name in names if moved[name]) or 'nothing'}"
    return Finding("update", text + (" instead of policy alone" if wrong else " alone"), wrong)


@torch.no_grad()
def saved_adapter(policy: Policy, x: Latent, t: PerImage, cond: Cond) -> Finding:
    """Whether diffusers loads what is saved as what was trained: the same matrices, in the model's dtype, at the same scale."""
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(policy, Path(folder))
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", UserWarning
            )  # PEFT warns of another adapter, which is what is meant
            policy.model.load_adapter(Path(folder), "saved")
    network = policy.model.transformer
    named, dtype = dict(network.named_parameters()), policy.model.dtype
    pairs = [
        (named[name], named.get(name.replace(".policy.", ".saved."))) for name in names_of(policy)
    ]
    lost = sum(
        saved is None or not torch.equal(saved.to(dtype), trained.to(dtype))
        for trained, saved in pairs
    )
    layers = [layer for layer in network.modules() if isinstance(layer, LoraLayer)]
    scales = [(layer.scaling["policy"], layer.scaling.get("saved")) for layer in layers]
    v, v_ref, v_saved = (
        policy.at(name).velocity(x, t, cond) for name in ("policy", "reference", "saved")
    )
    policy.model.delete_adapter("saved")
    off = (mean_square(v_saved - v) / mean_square(v - v_ref)).sqrt().max().item()
    text = f"diffusers loads what is saved, in {str(dtype).removeprefix('torch.')}, off by {off:.1g} of what it adds"
    if lost:
        return Finding("adapter", f"{text}: {lost} of {len(pairs)} matrices were lost", True)
    if rescaled := [scale for scale in scales if scale[0] != scale[1]]:
        return Finding(
            "adapter", f"{text}: its scale is {rescaled[0][1]} instead of {rescaled[0][0]}", True
        )
    return Finding("adapter", text, not off < (0.05 if dtype == torch.float32 else math.inf))
