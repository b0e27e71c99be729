"""From YAML to dataclasses, every section typed and checked against the others before any weight is loaded."""

import dataclasses
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowalign.advantages import ADVANTAGES
from flowalign.config.checks import (
    check_combine,
    check_evaluation,
    check_experience,
    check_idle,
    check_stop,
)
from flowalign.config.sections import Config, Data, DEFAULTS, Evaluation, Train
from flowalign.dynamics import DYNAMICS
from flowalign.errors import did_you_mean, UserError
from flowalign.models.families import read_model_config
from flowalign.objectives import OBJECTIVES
from flowalign.objectives.base import Objective
from flowalign.policy import Sampler
from flowalign.rewards.combine import COMBINE, Combine
from flowalign.rewards.registry import checked_rewards
from flowalign.settings.by_name import build_named
from flowalign.settings.types import build, mapping
from flowalign.settings.yaml_files import merge, overridden, read_yaml


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read, merge and check a YAML file. UserError says what to type instead; no weights are loaded."""
    raw = read_yaml(Path(path))
    with naming(path):
        return build_config(overridden(raw, overrides or []), Path(path))


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """What is wrong in here is said of this file."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def build_config(raw: dict[str, Any], path: Path) -> Config:
    """Every section typed and checked."""
    sections = [f.name for f in dataclasses.fields(Config) if f.name != "raw"]
    for key in raw:
        if key not in sections:
            near = (
                did_you_mean(key, [*sections, "extends"])
                if key != "extends"
                else " It belongs in the file."
            )
            raise UserError(
                f"Key {key!r} is not a section.{near} The sections are {', '.join(sections)}."
            )
    raw = merge(DEFAULTS, raw)
    for key in ("model", "data"):
        if key not in raw:
            raise UserError(f"the section {key!r} is missing; write {key}: {{...}}.")
    config = Config(
        model=read_model_config(raw["model"]),
        sampler=build_sampler(raw["sampler"]),
        objective=build_named(OBJECTIVES, raw["objective"], "objective", Objective),
        advantage=build_named(ADVANTAGES, raw["advantage"], "advantage", ("rewards", "group")),
        combine=build_named(COMBINE, raw["combine"], "combine", Combine),
        rewards=checked_rewards(raw.get("rewards", {}), "rewards"),
        data=build(Data, raw["data"], "data"),
        train=build(Train, raw.get("train", {}), "train"),
        evaluation=build(Evaluation, raw.get("evaluation", {}), "evaluation"),
        output=checked_output(raw.get("output", str(Path("outputs") / path.stem))),
        raw=raw,
    )
    check_evaluation(config)
    check_experience(config)
    check_combine(config)
    check_idle(config)
    check_stop(config)
    return config


def checked_output(output: Any) -> str:
    if not isinstance(output, str) or not output or "${" in output:
        raise UserError(f"output is {output!r}; write a folder, such as outputs/first.")
    try:
        possible = stat.S_ISDIR(os.stat(output).st_mode)
    except (FileNotFoundError, PermissionError):
        possible = True
    except (OSError, ValueError):
        possible = False
    if not possible:
        raise UserError(
            f"output is {output!r}, which cannot be a folder; write another, such as outputs/first."
        )
    return output


def build_sampler(section: Any) -> Sampler:
    section = mapping(section, "sampler")
    dynamics = build_named(DYNAMICS, section["dynamics"], "sampler.dynamics", ("x", "v", "t", "s"))
    settings = build(Sampler, {k: v for k, v in section.items() if k != "dynamics"}, "sampler")
    sampler = dataclasses.replace(settings, dynamics=dynamics)
    sampler.stochastic_steps(0, 0)  # UserError where the window does not fit
    return sampler
