"""From YAML to dataclasses, every section typed and checked against the others before any weight is loaded."""

import dataclasses
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from flowalign.advantage import ADVANTAGES, BY_NAME
from flowalign.batch import Examples, Pairs, Prompts, Rollout
from flowalign.dynamics import DYNAMICS, is_stochastic, ode, Window
from flowalign.errors import did_you_mean, UserError
from flowalign.models.base import ModelConfig
from flowalign.named import build_named
from flowalign.objectives import OBJECTIVES
from flowalign.objectives.base import Objective
from flowalign.policy import Decay, Sampler
from flowalign.reading import merge, overridden, read_yaml
from flowalign.reward_maps import checked_rewards, reward_entry, reward_name
from flowalign.rewards.combine import COMBINE, Combine
from flowalign.settings import build, configure, Count, CountOrZero, mapping, Positive, Settings, settings_of, Share
from flowalign.sources import Ranking
from flowalign.stopping import StopRule

DEFAULTS: dict[str, Any] = {
    "sampler": {"dynamics": {"name": "ode"}},
    "objective": {"name": "flow_grpo"},
    "advantage": {"name": "group"},
    "combine": {"name": "weighted_sum"},
}


@dataclass
class Ema(Settings):
    """An average of the trained adapter, evaluated and saved instead of it. `decay` 0 for none."""

    decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    every: Count = 1
    """Updates between two steps of the average."""

    @property
    def follow(self) -> Decay:
        return Decay(value=self.decay, every=self.every)


@dataclass
class Train(Settings):
    """The loop. The experiment is prompts, images and updates per step; memory only decides images_per_pass."""

    steps: Count = 100
    prompts_per_step: Count = 8
    images_per_prompt: Count = 8
    updates_per_step: Count = 1
    """Each on its share of the step's prompts; the later ones are off-policy, as published."""
    images_per_pass: Count = 8
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 3e-4
    warmup: CountOrZero = 0
    """Updates at the start in which the learning rate rises from 0."""
    cooldown: CountOrZero = 0
    """Updates at the end in which it falls to 0."""
    weight_decay: Share = 1e-4
    max_grad_norm: Positive = 1.0
    ema: Ema = field(default_factory=Ema)
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    save_every: Count = 50
    evaluate_every: CountOrZero = 50
    """Steps; 0 for only before and after."""
    keep: Count = 2
    """Checkpoints that stay."""
    drop_equal_groups: bool = False
    """Whether images of a prompt whose advantages are all equal are left out, instead of having advantage 0. Ties always are."""
    max_bad_steps: Count = 3
    """Updates with a loss or gradient that is not finite, which are not applied, before the run stops."""
    stop: dict[str, StopRule] = field(default_factory=dict)
    """Of metrics by name, when to stop early; the best evaluated weights are handed over then."""


@dataclass
class Evaluation(Settings):
    """Fixed prompts and noise, before and after, by the ODE."""

    prompts: str = ""
    """A prompt file; empty for the training prompts."""
    images_per_prompt: Count = 1
    rewards: dict[str, Any] = field(default_factory=dict)
    """As the training rewards; none for the training rewards themselves."""
    pairs: str = ""
    """As data.pairs: pictures that are not trained on, for reconstruction_error and, where they are pairs, chosen_preferred."""
    sampler: dict[str, Any] = field(default_factory=dict)
    """What differs from the training sampler: steps, guidance."""


@dataclass
class Data:
    """What there is to learn from: prompts to make images for, or given pictures."""

    prompts: str = ""
    """A .txt file (a prompt a line) or a .jsonl file (objects with `prompt`; other fields are metadata)."""
    pairs: str = ""
    """A .jsonl file, a folder, or a dataset of better and worse pictures, or of single ones."""
    ranking: Ranking = field(default_factory=Ranking)
    """Which pairs are made of ranked images, for objectives that learn from pairs where none are given."""


@dataclass
class Config:
    """A run. `raw` is the merged YAML it was built from."""

    model: ModelConfig
    sampler: Sampler
    objective: Objective
    advantage: Callable[..., Any]
    combine: Combine
    rewards: dict[str, Any]
    data: Data
    train: Train
    evaluation: Evaluation
    output: str
    raw: dict[str, Any]

    @property
    def judged_by(self) -> tuple[str, int]:
        """The metric by which one evaluation is better than another, and 1 where more of it is better, or -1."""
        for name, rule in self.train.stop.items():
            if rule.falling or rule.rising:
                return name, 1 if rule.falling else -1
        if self.evaluation.rewards:
            return f"eval/{reward_name(next(iter(self.evaluation.rewards)))}", 1
        return ("eval/chosen_preferred", 1) if self.objective.learns_from is Pairs else ("eval/reconstruction_error", -1)

    @property
    def evaluation_sampler(self) -> Sampler:
        return dataclasses.replace(self.sampler, dynamics=ode, same_noise=False, **self.evaluation.sampler)


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
            near = did_you_mean(key, [*sections, "extends"]) if key != "extends" else " It belongs in the file."
            raise UserError(f"Key {key!r} is not a section.{near} The sections are {', '.join(sections)}.")
    raw = merge(DEFAULTS, raw)
    for key in ("model", "data"):
        if key not in raw:
            raise UserError(f"the section {key!r} is missing; write {key}: {{...}}.")
    config = Config(
        model=build(ModelConfig, raw["model"], "model"),
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


def check_experience(config: Config) -> None:
    """Whether the objective is given what it learns from."""
    objective, data, train = config.objective, config.data, config.train
    name, kind = config.raw["objective"]["name"], objective.learns_from
    may_be_given, must_be_given = kind in (Pairs, Examples), kind is Examples
    if data.pairs and (not may_be_given or objective.needs_stochastic_steps):
        raise UserError(f"data.pairs is given, but the objective {name} learns from images it makes itself; remove data.pairs.")
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
        given = ", or data.pairs, pictures of yours" if may_be_given and not objective.needs_stochastic_steps else ""
        raise UserError(f"data.prompts is missing; write a file with a prompt a line, such as prompts.txt{given}.")
    if not config.rewards:
        found = "rewards is empty" if "rewards" in config.raw else "the section 'rewards' is missing"
        raise UserError(f"{found}; name at least one, for example rewards: {{scene_match: 1.0}}.")
    if kind is not Prompts and train.images_per_prompt < objective.images_needed:
        found = f"train.images_per_prompt is {train.images_per_prompt}, but images of the same prompt are compared"
        raise UserError(f"{found}; use {objective.images_needed} or more.")
    objective.check(config.sampler)
    if config.sampler.same_noise and (kind is Prompts or not config.sampler.stochastic_steps(0, 0)):
        why = f"the objective {name} makes images by the ODE" if kind is Prompts else "sampler.dynamics adds no noise"
        raise UserError(f"sampler.same_noise is true, but {why}, so all images of a prompt would be one; write false.")
    if objective.learns_once and train.updates_per_step > 1:
        raise UserError(f"train.updates_per_step is {train.updates_per_step}, but {name} learns from a rollout once; write 1.")
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
    stochastic, made, by_advantage = is_stochastic(sampler.dynamics), not data.pairs, kind is Rollout and objective.by_advantage

    def default(section: str, table: dict[str, Any], made: Any) -> bool:
        name = DEFAULTS[section]["name"]
        return config.raw[section]["name"] == name and settings_of(made) == settings_of(configure(table[name], {}, section))

    no_noise, given = "sampler.dynamics adds no noise", "data.pairs are given, and no images are made"
    rules = (  # key, what it is by default, whether it is that, whether anything looks at it, why nothing does
        ("advantage", "{name: group}", default("advantage", ADVANTAGES, config.advantage), by_advantage, None),
        ("combine", "{name: weighted_sum}", default("combine", COMBINE, config.combine), made, given),
        ("train.drop_equal_groups", "false", not train.drop_equal_groups, kind in (Rollout, Pairs), None),
        ("data.ranking", "{top: 1}", data.ranking == Ranking(), kind is Pairs and made, None if made else given),
        ("sampler.window", "{size: 0, range: [0, 0]}", sampler.window == Window(), stochastic, no_noise),
        ("sampler.same_noise", "false", not sampler.same_noise, made, given),
        ("train.ema.every", "1", train.ema.every == 1, train.ema.decay > 0, "train.ema.decay is 0"),
        ("model.revision", "null", config.model.revision is None, not os.path.isdir(config.model.path), "model.path is a folder"),
    )
    for key, usual, untouched, used, why in rules:
        if not untouched and not used:
            why = why or f"the objective {name} does not look at it"
            raise UserError(f"{key} would have no effect: {why}; leave it out, or write {key}: {usual}.")


def check_combine(config: Config) -> None:
    """Whether the rewards can be combined so for this objective."""
    if not config.rewards:
        return
    entries = [reward_entry(name, value) for name, value in config.rewards.items()]
    config.combine.check({entry.name: entry.weight for entry in entries})
    advantage, combine = (config.raw[section]["name"] for section in ("advantage", "combine"))
    if ADVANTAGES.get(advantage) in BY_NAME and combine != DEFAULTS["combine"]["name"]:
        others = [name for name, entry in ADVANTAGES.items() if entry not in BY_NAME]
        raise UserError(
            f"combine.name is {combine}, but advantage.name {advantage} weighs the rewards one by one, so nothing would be "
            f"combined; choose advantage.name from {', '.join(others)}, or leave combine out."
        )
    if config.combine.follows and config.objective.learns_from is Prompts:
        pointwise = [name for name, entry in COMBINE.items() if not entry.follows]
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
    watched = ["velocity_norm", "velocity_moved", *(["diversity"] if evaluation.images_per_prompt > 1 else [])]
    if evaluation.pairs:
        watched += ["reconstruction_error", *(["chosen_preferred"] if config.objective.learns_from is Pairs else [])]
    known = [f"eval/{name}" for name in (*map(reward_name, evaluation.rewards), *watched)]
    for name in config.train.stop:
        if name.startswith("eval/") and name not in known:
            raise UserError(
                f"train.stop: there is no metric {name!r}; choose from {', '.join(known)}.{did_you_mean(name, known)}"
            )


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
        raise UserError(f"output is {output!r}, which cannot be a folder; write another, such as outputs/first.")
    return output


def check_evaluation(config: Config) -> None:
    """The evaluation's own rewards and sampler."""
    evaluation = config.evaluation
    evaluation.rewards = checked_rewards(evaluation.rewards, "evaluation.rewards") if evaluation.rewards else config.rewards
    allowed = ("steps", "guidance", "embedded_guidance")
    for key in evaluation.sampler:
        if key not in allowed:
            near = did_you_mean(key, allowed)
            raise UserError(f"Key evaluation.sampler.{key} is not known.{near} evaluation.sampler has {', '.join(allowed)}.")
    checked = build(Sampler, dict(evaluation.sampler), "evaluation.sampler")
    evaluation.sampler = {key: getattr(checked, key) for key in evaluation.sampler}
    for key, sampler in (("sampler", config.sampler), ("evaluation.sampler", config.evaluation_sampler)):
        if config.model.name != "flux" and sampler.embedded_guidance != Sampler.embedded_guidance:
            found = f"{key}.embedded_guidance is {sampler.embedded_guidance}"
            raise UserError(f"{found}, but model.name is {config.model.name}, and only flux is told it; write guidance instead.")


def build_sampler(section: Any) -> Sampler:
    section = mapping(section, "sampler")
    dynamics = build_named(DYNAMICS, section["dynamics"], "sampler.dynamics", ("x", "v", "t", "s"))
    settings = build(Sampler, {k: v for k, v in section.items() if k != "dynamics"}, "sampler")
    sampler = dataclasses.replace(settings, dynamics=dynamics)
    sampler.stochastic_steps(0, 0)  # UserError where the window does not fit
    return sampler
