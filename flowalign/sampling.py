"""Pictures of a model, or of a run: the same prompts from the same noise with and without its adapter."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from flowalign import distributed
from flowalign.config.load import load_config
from flowalign.data.prompts import Prompt, read_prompts
from flowalign.errors import UserError
from flowalign.evaluation.evaluator import Evaluator
from flowalign.evaluation.statistics import paired_difference
from flowalign.files import to_json
from flowalign.models import load_model
from flowalign.models.loading import describe
from flowalign.policy import Policy, Sampler
from flowalign.reporting.console import print_differences
from flowalign.reporting.images import save_before_after, save_sheet
from flowalign.rewards.registry import load_rewards
from flowalign.rollouts.collect import collect, make_prompts
from flowalign.rollouts.scoring import RolloutScorer
from flowalign.runs.adapter import load_adapter
from flowalign.runs.checkpoint import checkpoints

AT_ONCE = 16
PROMPTS = 18


def sample(options: Namespace) -> None:
    """What `sample.py` does. Raises UserError when the source is neither a run nor a model."""
    source = Path(options.source)
    if (source / "config.yaml").is_file():
        sample_run(source, options)
    elif source.is_dir() and not (source / "model_index.json").is_file():
        raise UserError(
            f"{source} is neither a run folder (it has no config.yaml) nor a model (it has no model_index.json)."
        )
    else:
        sample_model(options)


def sample_run(run: Path, options: Namespace) -> None:
    """Before and after as one labelled grid, the rewards of both, and their paired difference."""
    config = load_config(run / "config.yaml")
    adapter = adapter_of(run)
    device = distributed.device()
    settings = {"steps": options.steps, guidance_key(config.model.name): options.guidance}
    sampler = replace(
        config.evaluation_sampler,
        **{name: value for name, value in settings.items() if value is not None},
    )
    policy = Policy(load_model(config.model, str(device)), sampler)
    load_adapter(policy, adapter)
    prompts = asked(options) or spread(
        read_prompts(config.evaluation.prompts or config.data.prompts), PROMPTS
    )
    at_once, count = config.train.images_per_pass, len(prompts) * options.images
    rewards = load_rewards(config.evaluation.rewards, "evaluation.rewards")
    judge = RolloutScorer(rewards, config.combine, config.advantage, at_once, device)
    evaluator = Evaluator(prompts, options.images, judge, at_once, options.seed, shown=count)
    made, remade = (
        list(evaluator.passes(policy.at(weights))) for weights in ("reference", "policy")
    )
    images, shown = evaluator.pictures(made)
    folder = Path(options.output or run / "samples")
    labels = [prompts[i].text for i in shown.tolist()]
    save_before_after(images, evaluator.pictures(remade)[0], labels, folder / "before-after.png")
    print(f"Pictures: {folder / 'before-after.png'}")
    before, after = evaluator.judged(made), evaluator.judged(remade)
    difference = paired_difference(before, after)
    figures = {
        "before": before.means,
        "after": after.means,
        "difference": difference,
        "adapter": str(adapter),
    }
    (folder / "rewards.json").write_text(to_json(figures, indent=2))
    print_differences(before.means, after.means, difference, len(prompts))


def adapter_of(run: Path) -> Path:
    """The adapter that the run handed over, or what its last checkpoint would."""
    if (run / "adapter").is_dir():
        return run / "adapter"
    saved = checkpoints(run)
    if not saved:
        raise UserError(
            f"{run} has no adapter and no checkpoint yet; let python train.py make one first."
        )
    average = saved[-1] / "snapshots" / "ema"
    return average if average.is_dir() else saved[-1]


def guidance_key(model: str) -> str:
    """The sampler's field that a pipeline's `guidance_scale` stands for."""
    return "embedded_guidance" if model == "flux" else "guidance"


def sample_model(options: Namespace) -> None:
    """One labelled grid of a model's pictures."""
    config = describe(options.source)
    device = distributed.device()
    guidance = (
        (4.5 if config.name == "sd3" else 3.5) if options.guidance is None else options.guidance
    )
    sampler = Sampler(steps=options.steps or 28)
    sampler = replace(sampler, **{guidance_key(config.name): guidance})
    policy = Policy(load_model(config, str(device)), sampler)
    prompts = asked(options)
    if not prompts:
        raise UserError(
            'give prompts or a prompt file: python sample.py MODEL "a red circle left of a blue square".'
        )
    members = [(p, i) for p in range(len(prompts)) for i in range(options.images)]
    keys = [(options.seed, -1, prompt, image) for prompt, image in members]
    batch = make_prompts(policy, [prompts[p] for p, _ in members], keys)
    images = collect(policy.at("reference"), batch, AT_ONCE).images
    path = Path(options.output or Path("outputs") / "samples") / "pictures.png"
    save_sheet({"": images}, batch.prompts, path)
    print(f"Pictures: {path}")


def asked(options: Namespace) -> list[Prompt]:
    """The prompts of the command line: texts, or one file of them."""
    if len(options.prompts) == 1 and Path(options.prompts[0]).suffix in (".txt", ".jsonl"):
        return read_prompts(options.prompts[0], "prompts")
    return [Prompt(text) for text in options.prompts]


def spread(prompts: list[Prompt], count: int) -> list[Prompt]:
    """`count` of the prompts, spread evenly over the file."""
    return (
        [prompts[i * len(prompts) // count] for i in range(count)]
        if len(prompts) > count
        else prompts
    )
