"""Checks of one section of a configuration against the others, before any weight is loaded."""

import os
from typing import Any

from flowalign.advantages import ADVANTAGES, PER_REWARD
from flowalign.batch import Examples, Pairs, Prompts, Rollout
from flowalign.config.sections import Config, DEFAULTS
from flowalign.dynamics import is_stochastic, Window
from flowalign.errors import did_you_mean, UserError
from flowalign.policy import Sampler
from flowalign.rewards.combine import COMBINE
from flowalign.rewards.registry import checked_rewards, reward_entry, reward_name
from flowalign.rollouts.ranking import Ranking
from flowalign.settings.types import build, configure, settings_of


def check_experience(config: Config) -> None:
    """Whether the objective is given what it learns from."""
    objective, data, train = config.objective, config.data, config.train
    name, kind = config.raw["objective"]["name"], objective.learns_from
    may_be_given, must_be_given = kind in (Pairs, Examples), kind is Examples
    if data.pairs and (not may_be_given or objective.needs_stochastic_steps):
        raise UserError(
            f"data.pairs is given, but the objective {name} learns from images it makes itself; remove data.pairs."
        )
    if must_be_given and not data.pairs:
        raise UserError(f"data.pairs is missing: the objective {name} learns from given pictures.")
    if data.pairs:
        if train.images_per_prompt != 1:
            raise UserError(
                f"train.images_per_prompt is {train.images_per_prompt}, but a step takes train.prompts_per_step entries of "
                "data.pairs as they are; write images_per_prompt: 1."
            )
        return
    if not data.prompts:
        given = (
            ", or data.pairs, pictures of yours"
            if may_be_given and not objective.needs_stochastic_steps
            else ""
        )
        raise UserError(
            f"data.prompts is missing; write a file with a prompt a line, such as prompts.txt{given}."
        )
    if not config.rewards:
        found = (
            "rewards is empty" if "rewards" in config.raw else "the section 'rewards' is missing"
        )
        raise UserError(f"{found}; name at least one, for example rewards: {{scene_match: 1.0}}.")
    if kind is not Prompts and train.images_per_prompt < objective.min_images_per_prompt:
        found = f"train.images_per_prompt is {train.images_per_prompt}, but images of the same prompt are compared"
        raise UserError(f"{found}; use {objective.min_images_per_prompt} or more.")
    objective.check(config.sampler)
    if config.sampler.same_noise and (kind is Prompts or not config.sampler.stochastic_steps(0, 0)):
        why = (
            f"the objective {name} makes images by the ODE"
            if kind is Prompts
            else "sampler.dynamics adds no noise"
        )
        raise UserError(
            f"sampler.same_noise is true, but {why}, so all images of a prompt would be one; write false."
        )
    if objective.on_policy_only and train.updates_per_step > 1:
        raise UserError(
            f"train.updates_per_step is {train.updates_per_step}, but {name} learns from a rollout once; write 1."
        )
    for copied, decay in objective.snapshots.items():
        if decay.every > 1 and decay.every % train.updates_per_step:
            near = -(-decay.every // train.updates_per_step) * train.updates_per_step
            raise UserError(
                f"objective.{copied}.every is {decay.every} updates, but copies follow once a step, of "
                f"{train.updates_per_step} updates; write {near}."
            )
    if kind is Pairs and 2 * data.ranking.top > train.images_per_prompt:
        half = train.images_per_prompt // 2
        raise UserError(
            f"data.ranking.top is {data.ranking.top}, but a prompt has {train.images_per_prompt} images; write {half}."
        )


def check_idle(config: Config) -> None:
    """Whether everything that is not left at its default is looked at in this run."""
    objective, data, train, sampler = config.objective, config.data, config.train, config.sampler
    name, kind = config.raw["objective"]["name"], objective.learns_from
    stochastic, made, uses_advantages = (
        is_stochastic(sampler.dynamics),
        not data.pairs,
        kind is Rollout and objective.uses_advantages,
    )

    def default(section: str, table: dict[str, Any], made: Any) -> bool:
        name = DEFAULTS[section]["name"]
        return config.raw[section]["name"] == name and settings_of(made) == settings_of(
            configure(table[name], {}, section)
        )

    no_noise, given = (
        "sampler.dynamics adds no noise",
        "data.pairs are given, and no images are made",
    )
    rules = (  # key, what it is by default, whether it is that, whether anything looks at it, why nothing does
        (
            "advantage",
            "{name: group}",
            default("advantage", ADVANTAGES, config.advantage),
            uses_advantages,
            None,
        ),
        (
            "combine",
            "{name: weighted_sum}",
            default("combine", COMBINE, config.combine),
            made,
            given,
        ),
        (
            "train.drop_equal_groups",
            "false",
            not train.drop_equal_groups,
            kind in (Rollout, Pairs),
            None,
        ),
        (
            "data.ranking",
            "{top: 1}",
            data.ranking == Ranking(),
            kind is Pairs and made,
            None if made else given,
        ),
        (
            "sampler.window",
            "{size: 0, range: [0, 0]}",
            sampler.window == Window(),
            stochastic,
            no_noise,
        ),
        ("sampler.same_noise", "false", not sampler.same_noise, made, given),
        ("train.ema.every", "1", train.ema.every == 1, train.ema.decay > 0, "train.ema.decay is 0"),
        (
            "model.revision",
            "null",
            config.model.revision is None,
            not os.path.isdir(config.model.path),
            "model.path is a folder",
        ),
    )
    for key, usual, untouched, used, why in rules:
        if not untouched and not used:
            why = why or f"the objective {name} does not look at it"
            raise UserError(
                f"{key} would have no effect: {why}; leave it out, or write {key}: {usual}."
            )


def check_combine(config: Config) -> None:
    """Whether the rewards can be combined so for this objective."""
    if not config.rewards:
        return
    entries = [reward_entry(name, value) for name, value in config.rewards.items()]
    config.combine.check({entry.name: entry.weight for entry in entries})
    advantage, combine = (config.raw[section]["name"] for section in ("advantage", "combine"))
    if ADVANTAGES.get(advantage) in PER_REWARD and combine != DEFAULTS["combine"]["name"]:
        others = [name for name, entry in ADVANTAGES.items() if entry not in PER_REWARD]
        raise UserError(
            f"combine.name is {combine}, but advantage.name {advantage} weighs the rewards one by one, so nothing would be "
            f"combined; choose advantage.name from {', '.join(others)}, or leave combine out."
        )
    if config.combine.needs_statistics and config.objective.learns_from is Prompts:
        pointwise = [name for name, entry in COMBINE.items() if not entry.needs_statistics]
        raise UserError(
            f"combine.name is {combine}, which looks at whole steps, but the objective "
            f"{config.raw['objective']['name']} takes the gradient of each image's reward; choose from {', '.join(pointwise)}."
        )


def check_stop(config: Config) -> None:
    """Whether the metrics that may stop the run are looked at."""
    evaluation, every = config.evaluation, config.train.evaluate_every
    if config.train.stop and not 0 < every < config.train.steps:
        raise UserError(
            f"train.stop looks at evaluations, but train.evaluate_every is {every} and train.steps {config.train.steps}; "
            "write a number of steps for evaluate_every that is less than train.steps."
        )
    watched = [
        "velocity_norm",
        "velocity_moved",
        *(["diversity"] if evaluation.images_per_prompt > 1 else []),
    ]
    if evaluation.pairs:
        watched += [
            "reconstruction_error",
            *(["chosen_preferred"] if config.objective.learns_from is Pairs else []),
        ]
    known = [f"eval/{name}" for name in (*map(reward_name, evaluation.rewards), *watched)]
    for name in config.train.stop:
        if name.startswith("eval/") and name not in known:
            raise UserError(
                f"train.stop: there is no metric {name!r}; choose from {', '.join(known)}.{did_you_mean(name, known)}"
            )


def check_evaluation(config: Config) -> None:
    """The evaluation's own rewards and sampler."""
    evaluation = config.evaluation
    evaluation.rewards = (
        checked_rewards(evaluation.rewards, "evaluation.rewards")
        if evaluation.rewards
        else config.rewards
    )
    allowed = ("steps", "guidance", "embedded_guidance")
    for key in evaluation.sampler:
        if key not in allowed:
            near = did_you_mean(key, allowed)
            raise UserError(
                f"Key evaluation.sampler.{key} is not known.{near} evaluation.sampler has {', '.join(allowed)}."
            )
    checked = build(Sampler, dict(evaluation.sampler), "evaluation.sampler")
    evaluation.sampler = {key: getattr(checked, key) for key in evaluation.sampler}
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
