"""Notes on settings that have no effect, so that one file can be tried with every objective."""

import os

from flowalign.advantages import ADVANTAGES
from flowalign.batch import Pairs, Rollout
from flowalign.config.checks import uses_advantages
from flowalign.config.sections import Config, DEFAULTS
from flowalign.dynamics import is_stochastic, Window
from flowalign.rewards.combine import COMBINE
from flowalign.rollouts.ranking_settings import Ranking
from flowalign.settings.types import configure, settings_of


def unused_settings(config: Config) -> list[str]:
    """Return a sentence for each setting that is not at its default and that nothing reads."""
    by_objective = f"by the objective {config.objective_name}"
    with_pairs = "with data.pairs, because no images are generated"
    without_noise = "without noise: sampler.dynamics is deterministic"
    generates = not config.data.pairs
    learns_from = config.objective.learns_from
    rules = (  # key, whether its value is not the default, whether something reads it, why nothing
        ("advantage", advantage_changed(config), uses_advantages(config), by_objective),
        ("combine", combine_changed(config), generates, with_pairs),
        (
            "train.drop_equal_groups",
            config.train.drop_equal_groups,
            learns_from in (Rollout, Pairs),
            by_objective,
        ),
        (
            "data.ranking",
            config.data.ranking != Ranking(),
            learns_from is Pairs and generates,
            by_objective if generates else with_pairs,
        ),
        (
            "sampler.window",
            config.sampler.window != Window(),
            is_stochastic(config.sampler.dynamics),
            without_noise,
        ),
        ("sampler.same_noise", config.sampler.same_noise, generates, with_pairs),
        (
            "train.ema.every",
            config.train.ema.every != 1,
            config.train.ema.decay > 0,
            "while train.ema.decay is 0",
        ),
        (
            "model.revision",
            config.model.revision is not None,
            not os.path.isdir(config.model.path),
            "for a local folder",
        ),
    )
    return [
        f"`{key}` is not used {reason}."
        for key, changed, used, reason in rules
        if changed and not used
    ]


def advantage_changed(config: Config) -> bool:
    """Return True if the advantage is not the default one."""
    default = configure(ADVANTAGES["group"], {}, "advantage")
    is_default = DEFAULTS["advantage"] == {"name": config.advantage_name}
    return not is_default or settings_of(config.advantage) != settings_of(default)


def combine_changed(config: Config) -> bool:
    """Return True if the rule that combines rewards is not the default one."""
    default = configure(COMBINE["weighted_sum"], {}, "combine")
    is_default = DEFAULTS["combine"] == {"name": config.combine_name}
    return not is_default or settings_of(config.combine) != settings_of(default)
