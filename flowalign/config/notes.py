"""Notes on settings: those that have no effect, and those whose effect must be measured.

Neither is an error, so that one file can be tried with every objective.
"""

import os
from typing import NamedTuple

from flowalign.advantages import ADVANTAGES
from flowalign.batch import Pairs, Rollout
from flowalign.config.checks import uses_advantages
from flowalign.config.sections import Config, DEFAULTS, Evaluation
from flowalign.dynamics import is_stochastic, Window
from flowalign.rewards.combine import COMBINE
from flowalign.rollouts.ranking_settings import Ranking
from flowalign.settings.types import configure, settings_of


def notes_on(config: Config) -> list[str]:
    """Return a sentence or two for each setting that the user should know more about."""
    notes = unused_settings(config)
    if config.model.compile and config.objective.needs_stochastic_steps:
        notes.append(
            "`model.compile` can make ratios differ from 1 before the first update. "
            "`flowalign check` measures by how much."
        )
    return notes


class Setting(NamedTuple):
    """A setting, and whether the run reads it."""

    key: str
    changed: bool
    """True if its value is not the default."""
    used: bool
    reason: str
    """Why it is not used, as the end of a sentence."""


def unused_settings(config: Config) -> list[str]:
    """Return a sentence for each setting that is not at its default and that nothing reads."""
    settings = [*settings_of_objectives(config), *settings_of_images(config), *others(config)]
    return [f"`{s.key}` is not used {s.reason}." for s in settings if s.changed and not s.used]


def settings_of_objectives(config: Config) -> list[Setting]:
    """Return the settings that only some objectives read."""
    reason = f"by the objective {config.objective_name}"
    learns_from = config.objective.learns_from
    drops, ranks = learns_from in (Rollout, Pairs), learns_from is Pairs
    return [
        Setting("advantage", advantage_changed(config), uses_advantages(config), reason),
        Setting("train.drop_equal_groups", config.train.drop_equal_groups, drops, reason),
        Setting("data.ranking", config.data.ranking != Ranking(), ranks, reason),
    ]


def settings_of_images(config: Config) -> list[Setting]:
    """Return the settings that only runs read that generate images."""
    reason = "with data.pairs, because no images are generated"
    generates, sampler = not config.data.pairs, config.sampler
    makes_paths = config.objective.needs_stochastic_steps
    ranking, ranks = config.data.ranking, config.objective.learns_from is Pairs
    # An objective that never ranks has said so already.
    by, top = (ranks and changed for changed in (ranking.by != "reward", ranking.top != 1))
    return [
        Setting("combine", combine_changed(config), generates, reason),
        Setting("data.ranking.by", by, generates, reason),
        Setting("data.ranking.top", top, generates, reason),
        # Paths of votes begin with it, too.
        Setting("sampler.same_noise", sampler.same_noise, generates or makes_paths, reason),
    ]


def others(config: Config) -> list[Setting]:
    """Return the settings that another setting turns off."""
    sampler, ema, model = config.sampler, config.train.ema, config.model
    ranking, generates = config.data.ranking, not config.data.pairs
    sweep = config.evaluation.guidance_sweep
    return [
        Setting(
            "sampler.negative_prompt",
            sampler.negative_prompt != "",
            is_guided(config),
            "without guidance: sampler.guidance is 1",
        ),
        Setting(
            "data.ranking.top",
            ranking.top != 1 and ranking.by != "reward" and generates,
            False,
            f"with data.ranking.by: {ranking.by}",
        ),
        Setting(
            "evaluation.guidance_sweep",
            sweep not in ([], Evaluation().guidance_sweep),
            bool(config.evaluation.rewards),
            "without evaluation.rewards, because a reward chooses the scale",
        ),
        Setting(
            "sampler.window",
            sampler.window != Window(),
            is_stochastic(sampler.dynamics),
            "without noise: sampler.dynamics is deterministic",
        ),
        Setting("train.ema.every", ema.every != 1, ema.decay > 0, "while train.ema.decay is 0"),
        Setting("train.ema.warmup", not ema.warmup, ema.decay > 0, "while train.ema.decay is 0"),
        Setting(
            "model.revision",
            model.revision is not None,
            not os.path.isdir(model.path),
            "for a local folder",
        ),
    ]


def is_guided(config: Config) -> bool:
    """Return True if guidance away from a negative prompt occurs somewhere in a run."""
    # An embedded guidance leads away from nothing. The sweep varies the guidance that is the
    # model's own, and objectives may guide the reference alone.
    sweeps = bool(config.evaluation.guidance_sweep) and not config.model.embeds_guidance
    scales = guidance_scales(settings_of(config.objective))
    scales += [config.sampler.guidance, config.evaluation_sampler.guidance]
    return sweeps or any(scale > 1 for scale in scales)


def guidance_scales(settings: dict[str, object]) -> list[float]:
    """Return every guidance scale among an objective's settings."""
    scales: list[float] = []
    for name, value in settings.items():
        if isinstance(value, dict):
            scales += guidance_scales(value)
        elif name == "guidance" and isinstance(value, int | float):
            scales.append(float(value))
    return scales


def advantage_changed(config: Config) -> bool:
    """Return True if the advantage is not the default one."""
    # Compared by name and settings, because a function with bound settings equals only itself.
    default = configure(ADVANTAGES["group"], {}, "advantage")
    is_default = DEFAULTS["advantage"] == {"name": config.advantage_name}
    return not is_default or settings_of(config.advantage) != settings_of(default)


def combine_changed(config: Config) -> bool:
    """Return True if the rule that combines rewards is not the default one."""
    default = configure(COMBINE["weighted_sum"], {}, "combine")
    is_default = DEFAULTS["combine"] == {"name": config.combine_name}
    return not is_default or settings_of(config.combine) != settings_of(default)
