"""Check the sections of a configuration against each other, before any weight is loaded.

Only contradictions are errors: settings with which the run could not train, or not as written.
Settings that merely have no effect become notes.
"""

from flowalign.advantages import ADVANTAGES, PER_REWARD
from flowalign.batch import Examples, Pairs, Prompts, Rollout
from flowalign.config.sections import Config, DEFAULTS
from flowalign.errors import did_you_mean, UserError
from flowalign.policy import Sampler
from flowalign.rewards.combine import COMBINE
from flowalign.rewards.registry import reward_entry, reward_name
from flowalign.settings.types import build

EVALUATION_SAMPLER = ("steps", "guidance", "embedded_guidance", "negative_prompt")
"""The keys of evaluation.sampler."""


def check_all(config: Config) -> None:
    """Run every check. Raises UserError with the first contradiction."""
    check_embedded_guidance(config)
    check_data(config)
    # An objective of given pairs neither generates nor scores images: nothing below concerns it.
    if not config.data.pairs:
        check_rewards(config)
        check_group_size(config)
        config.objective.check(config.sampler)
        check_same_noise(config)
        check_updates(config)
        check_ranking(config)
    check_snapshots(config)
    if config.rewards:
        check_combine(config)
        check_statistics(config)
    check_choice_of_step(config)
    check_stop_metrics(config)


def check_evaluation_sampler(section: dict[str, object]) -> dict[str, object]:
    """Return the settings of evaluation.sampler, typed."""
    for key in section:
        if key not in EVALUATION_SAMPLER:
            raise UserError(
                f"Key evaluation.sampler.{key} is not known."
                f"{did_you_mean(key, EVALUATION_SAMPLER)} "
                f"evaluation.sampler has {', '.join(EVALUATION_SAMPLER)}."
            )
    sampler = build(Sampler, dict(section), "evaluation.sampler")
    return {key: getattr(sampler, key) for key in section}


def check_embedded_guidance(config: Config) -> None:
    """Refuse embedded guidance for a model without it: the user would expect an effect."""
    for key, sampler in (
        ("sampler", config.sampler),
        ("evaluation.sampler", config.evaluation_sampler),
    ):
        changed = sampler.embedded_guidance != Sampler.embedded_guidance
        if changed and not config.model.embeds_guidance:
            raise UserError(
                f"{key}.embedded_guidance is {sampler.embedded_guidance}, but {config.model.name} "
                "models do not take it as an input; write guidance instead."
            )


def check_data(config: Config) -> None:
    """Refuse a run without the data that its objective learns from."""
    data, name = config.data, config.objective_name
    if data.pairs:
        check_pairs(config)
    elif config.objective.learns_from is Examples:
        raise UserError(f"data.pairs is missing: the objective {name} learns from given pictures.")
    elif not data.prompts:
        or_pairs = ", or data.pairs with your pictures" if may_use_pairs(config) else ""
        raise UserError(
            "data.prompts is missing; write a file with a prompt per line, "
            f"such as prompts.txt{or_pairs}."
        )


def may_use_pairs(config: Config) -> bool:
    """Return True if the objective can learn from data.pairs."""
    return config.objective.learns_from in (Pairs, Examples)


def check_pairs(config: Config) -> None:
    """Refuse data.pairs for an objective or a count of images that cannot use them."""
    if not may_use_pairs(config):
        raise UserError(
            f"data.pairs is given, but the objective {config.objective_name} learns from images "
            "it makes itself; remove data.pairs."
        )
    if config.train.images_per_prompt != 1:
        raise UserError(
            f"train.images_per_prompt is {config.train.images_per_prompt}, but a step takes "
            "train.prompts_per_step entries of data.pairs as they are; write images_per_prompt: 1."
        )
    # Paths of votes are made again, so the sampler must have the steps that the objective learns.
    config.objective.check(config.sampler)


def check_rewards(config: Config) -> None:
    """Refuse a run that generates images without a reward to score them."""
    if not config.rewards:
        problem = "the section 'rewards' is missing"
        if "rewards" in config.raw:
            problem = "rewards is empty"
        raise UserError(f"{problem}; name at least one, for example rewards: {{scene_match: 1.0}}.")


def check_group_size(config: Config) -> None:
    """Refuse fewer images of a prompt than the objective compares."""
    images, least = config.train.images_per_prompt, config.objective.min_images_per_prompt
    if config.objective.learns_from is not Prompts and images < least:
        raise UserError(
            f"train.images_per_prompt is {images}, but images of the same prompt are compared; "
            f"use {least} or more."
        )


def check_same_noise(config: Config) -> None:
    """Refuse equal starting noise if nothing else tells the images of a prompt apart."""
    sampler = config.sampler
    if sampler.same_noise and not sampler.stochastic_steps(0, 0):
        raise UserError(
            "sampler.same_noise is true, but sampler.dynamics adds no noise, so all images of a "
            "prompt would be equal; write false."
        )


def check_updates(config: Config) -> None:
    """Refuse several updates on one rollout for an objective without off-policy correction."""
    updates = config.train.updates_per_step
    if config.objective.on_policy_only and updates > 1:
        raise UserError(
            f"train.updates_per_step is {updates}, but {config.objective_name} learns from a "
            "rollout once; write 1."
        )


def check_snapshots(config: Config) -> None:
    """Refuse snapshots that follow once a step, but are to be updated in the middle of one."""
    updates = config.train.updates_per_step
    if config.objective.copies_follow_after == "update":
        return
    for name, decay in config.objective.snapshots.items():
        if decay.every > 1 and decay.every % updates:
            nearest = -(-decay.every // updates) * updates
            raise UserError(
                f"objective: the snapshot {name} follows every {decay.every} updates, but "
                f"snapshots follow once a step, of {updates} updates. Write every: {nearest}."
            )


def check_ranking(config: Config) -> None:
    """Refuse to rank an image among the best and the worst of its prompt."""
    images, ranking = config.train.images_per_prompt, config.data.ranking
    top = ranking.top
    ranks = config.objective.learns_from is Pairs and ranking.by == "reward"
    if ranks and 2 * top > images:
        raise UserError(
            f"data.ranking.top is {top}, but a prompt has {images} images; write {images // 2}."
        )


def check_combine(config: Config) -> None:
    """Refuse a rule for combining rewards that the advantage would ignore."""
    entries = [reward_entry(name, value) for name, value in config.rewards.items()]
    config.combine.check({entry.name: entry.weight for entry in entries})
    default = DEFAULTS["combine"]
    assert isinstance(default, dict)
    if not uses_advantages(config) or config.combine_name == default["name"]:
        return
    # These normalise each reward alone, before anything could combine them.
    if ADVANTAGES.get(config.advantage_name) in PER_REWARD:
        others = [name for name, entry in ADVANTAGES.items() if entry not in PER_REWARD]
        raise UserError(
            f"combine.name is {config.combine_name}, but advantage.name {config.advantage_name} "
            "weighs the rewards one by one, so nothing would be combined; "
            f"choose advantage.name from {', '.join(others)}, or leave combine out."
        )


def uses_advantages(config: Config) -> bool:
    """Return True if the objective reads the advantages of a rollout."""
    return config.objective.learns_from is Rollout and config.objective.uses_advantages


def check_statistics(config: Config) -> None:
    """Refuse a rule that looks at whole steps where rewards are differentiated image by image."""
    # Such rules learn from finished scores, which exist only after the gradient has been taken.
    if config.combine.needs_statistics and config.objective.takes_reward_gradient:
        pointwise = [name for name, entry in COMBINE.items() if not entry.needs_statistics]
        raise UserError(
            f"combine.name is {config.combine_name}, which looks at whole steps, but the objective "
            f"{config.objective_name} takes the gradient of each image's reward; "
            f"choose from {', '.join(pointwise)}."
        )


def check_choice_of_step(config: Config) -> None:
    """Refuse rules for stopping, and the best step, if the run is never evaluated on its way."""
    every, steps = config.train.evaluate_every, config.train.steps
    if config.train.exports_best and not 0 < every < steps:
        key = "train.stop" if config.train.stop else "train.export: best"
        raise UserError(
            f"{key} looks at evaluations, but train.evaluate_every is {every} and "
            f"train.steps {steps}; write a number of steps for evaluate_every that is less than "
            "train.steps."
        )


def check_stop_metrics(config: Config) -> None:
    """Refuse rules for metrics that evaluations do not have."""
    known = evaluation_metrics(config)
    for name in config.train.stop:
        if name.startswith("eval/") and name not in known:
            raise UserError(
                f"train.stop: there is no metric {name!r}; choose from {', '.join(known)}."
                f"{did_you_mean(name, known)}"
            )


def evaluation_metrics(config: Config) -> list[str]:
    """Return the names of the metrics that this run's evaluations have."""
    # Must agree with what evaluation/ reports; a rule for any other metric would never fire.
    names = [reward_name(name) for name in config.evaluation.rewards]
    names += ["velocity_norm", "velocity_moved"]
    if config.evaluation.images_per_prompt > 1:
        names.append("diversity")
    # Without pairs of its own, an evaluation has a part of the training data that is held out.
    if config.evaluation.pairs or config.data.pairs:
        names.append("reconstruction_error")
        if config.objective.learns_from is Pairs:
            names += ["chosen_preferred", "margin"]
    return [f"eval/{name}" for name in names]
