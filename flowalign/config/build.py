"""Build the sections that need torch: model, sampler, objective, advantage, combine and rewards."""

import dataclasses

from flowalign.advantages import ADVANTAGES
from flowalign.config.checks import check_all, check_evaluation_sampler
from flowalign.config.notes import notes_on
from flowalign.config.sections import Config, Evaluation, PlainSections
from flowalign.dynamics import DYNAMICS
from flowalign.models.families import read_model_config
from flowalign.objectives import OBJECTIVES
from flowalign.objectives.base import Objective
from flowalign.policy import Sampler
from flowalign.rewards.combine import COMBINE, Combine
from flowalign.settings.by_name import build_named
from flowalign.settings.merging import Section
from flowalign.settings.types import build, mapping


def build_objects(values: Section, plain: PlainSections) -> Config:
    """Return the whole configuration, checked, with its notes."""
    config = Config(
        model=read_model_config(values["model"]),
        sampler=build_sampler(values["sampler"]),
        objective=build_named(OBJECTIVES, values["objective"], "objective", Objective),
        advantage=build_named(ADVANTAGES, values["advantage"], "advantage", ("rewards", "group")),
        combine=build_named(COMBINE, values["combine"], "combine", Combine),
        rewards=plain.rewards,
        data=plain.data,
        train=plain.train,
        evaluation=complete(plain.evaluation, plain.rewards),
        distributed=plain.distributed,
        tracking=plain.tracking,
        output=plain.output,
        raw=values,
    )
    check_all(config)
    # Last: a contradiction is an error, and only a run that can train has notes.
    config.notes = notes_on(config)
    return config


def build_sampler(values: object) -> Sampler:
    """Return the sampler with its dynamics. UserError if its window does not fit its steps."""
    section = mapping(values, "sampler")
    dynamics = build_named(DYNAMICS, section["dynamics"], "sampler.dynamics", ("x", "v", "t", "s"))
    settings = {key: value for key, value in section.items() if key != "dynamics"}
    sampler = dataclasses.replace(build(Sampler, settings, "sampler"), dynamics=dynamics)
    # Asking for the steps of a window is what checks that it fits.
    sampler.stochastic_steps(0, 0)
    return sampler


def complete(evaluation: Evaluation, rewards: dict[str, object]) -> Evaluation:
    """Return the evaluation with the training rewards as its default, and its sampler checked."""
    sampler = check_evaluation_sampler(evaluation.sampler)
    return dataclasses.replace(evaluation, rewards=evaluation.rewards or rewards, sampler=sampler)
