"""From YAML to dataclasses: `extends`, overrides, and errors that name the file, the key and what to type."""

import dataclasses
import importlib
import importlib.util
import inspect
import math
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field

from flowalign.advantage import ADVANTAGES, BY_NAME
from flowalign.batch import Examples, Pairs, Prompts, Rollout
from flowalign.dynamics import DYNAMICS, is_stochastic, ode, Window
from flowalign.errors import did_you_mean, similar_file, UserError
from flowalign.models.base import ModelConfig
from flowalign.objectives import OBJECTIVES
from flowalign.objectives.base import Objective
from flowalign.policy import Decay, Sampler
from flowalign.rewards import REWARDS
from flowalign.rewards.adapt import make_reward
from flowalign.rewards.base import Reward
from flowalign.rewards.combine import COMBINE, Combine
from flowalign.settings import build, configure, Count, CountOrZero, mapping, Positive, Settings, settings_of, Share
from flowalign.sources import Ranking
from flowalign.stopping import StopRule

CONFIGS = Path(__file__).parents[1] / "configs"
DEFAULTS: dict[str, Any] = {
    "sampler": {"dynamics": {"name": "ode"}},
    "objective": {"name": "flow_grpo"},
    "advantage": {"name": "group"},
    "combine": {"name": "weighted_sum"},
}
REPLACED = ("rewards",)
"""Maps that a child YAML or an override replaces as a whole."""


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
    """Whether images of a prompt whose rewards are all equal are left out, instead of having advantage 0."""
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


def read_yaml(path: Path, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML file merged over what it extends."""
    if path.resolve() in [child.resolve() for child in children]:
        raise UserError(f"{path}: extends itself, through {' -> '.join(map(str, children))}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"there is no file {path}.{similar_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}; give a YAML file, saved as UTF-8.") from None
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else type(raw).__name__
        raise UserError(f"{path}: expected sections such as `model:` and `train:`, found {found}.")
    if "extends" not in raw:
        return raw
    parent = raw.pop("extends")
    if not isinstance(parent, str):
        raise UserError(f"{path}: extends is {parent!r}; write one file, such as base/tiny-sd3.yaml.")
    for place in (path.parent / parent, CONFIGS / parent):
        if os.path.isfile(place):
            return merge(read_yaml(place, (*children, path)), raw)
    raise UserError(f"{path}: extends: there is no file {parent} beside it or under configs/.{similar_file(CONFIGS / parent)}")


class _Loader(yaml.SafeLoader):
    """Numbers are decimal: 1e-4 is one, and neither 010 nor 1:30 is 8 or 90. Keys written twice are refused, and loops."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value]
        for i, (key, _) in enumerate(node.value):
            if key.value in keys[:i]:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is written twice", problem_mark=key.start_mark)
        return node

    def construct_document(self, node: Any) -> Any:
        return self.construct_object(node, deep=True)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag.rpartition(":")[2] not in ("int", "float", "timestamp")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?|\.(inf|Inf|INF))$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, what: str) -> Any:
    """UserError where it is not YAML, or has a value that its tag cannot read."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).replace('in "<unicode string>", ', "").split())
        raise UserError(f"{what} is not YAML: {reason}") from None


def overridden(raw: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A file with overrides laid over it, in their order. UserError for one that would have no effect."""
    given = [(text.partition("=")[0], text, parse_override(text)) for text in overrides]
    for key, _, nested in given:
        raw = merge(raw, nested, replaced=() if {*key.split(".")[:-1]} & {*REPLACED} else REPLACED)
    for i, (key, text, nested) in enumerate(given):
        if key not in [later for later, _, _ in given[i + 1 :]] and not _holds(raw, nested):
            raise UserError(
                f"{text!r} would have no effect: an empty map changes nothing, and a section whose name changes later loses "
                f"its other keys; name a key of {key.partition('.')[0]}, and a section's name before its other keys."
            )
    return raw


def _holds(raw: Any, asked: Any) -> bool:
    """Whether every key that was asked for is there; what is asked for as an empty map must be one."""
    if not isinstance(asked, dict):
        return True
    return isinstance(raw, dict) and (all(key in raw and _holds(raw[key], asked[key]) for key in asked) if asked else not raw)


def parse_override(text: str) -> dict[str, Any]:
    """`train.steps=10` as the nested mapping it stands for; values are YAML."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"{text!r} is not an override; write section.key=value, for example train.steps=10.")
    nested: Any = parse_yaml(value, f"{text!r}: the value")
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return nested


def merge(parent: dict[str, Any], child: dict[str, Any], replaced: tuple[str, ...] = REPLACED) -> dict[str, Any]:
    """The child over the parent. Reward maps replace; so does a section whose `name` changes; others merge."""
    merged = dict(parent)
    for key, value in child.items():
        before = merged.get(key)
        if isinstance(before, dict) and isinstance(value, dict) and key not in replaced:
            renamed = "name" in value and value["name"] != before.get("name")
            merged[key] = value if renamed else merge(before, value, replaced)
        else:
            merged[key] = value
    return merged


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
        raise UserError("data.prompts is missing.")
    if not config.rewards:
        found = "rewards is empty" if "rewards" in config.raw else "the section 'rewards' is missing"
        raise UserError(f"{found}; name at least one, for example rewards: {{scene_match: 1.0}}.")
    if kind is not Prompts and train.images_per_prompt < 2:
        raise UserError("train.images_per_prompt is 1, but advantages compare images of the same prompt; use 2 or more.")
    objective.check(config.sampler)
    if config.sampler.same_noise and not config.sampler.stochastic_steps(0, 0):
        raise UserError(
            "sampler.same_noise is true, but sampler.dynamics adds no noise, so all images of a prompt would be one; write false."
        )
    if objective.learns_once and train.updates_per_step > 1:
        raise UserError(f"train.updates_per_step is {train.updates_per_step}, but {name} learns from a rollout once; write 1.")
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
        ("train.drop_equal_groups", "false", not train.drop_equal_groups, kind is Rollout, None),
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
    config.combine.check([reward_name(name) for name in config.rewards])
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


def reward_name(spec: str) -> str:
    """What a reward is logged by."""
    return spec.partition("://")[2] or spec.rpartition(":")[2]


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


def build_named(table: dict[str, Any], section: Any, key: str, kind: type | tuple[str, ...]) -> Any:
    """What `name` asks for, with the section's other fields as its settings: of a class, or a function of these arguments."""
    if isinstance(section, str):
        raise UserError(f"{key} is {section!r}; write {key}: {{name: {section}}}.")
    section = mapping(section, key)
    name = section.get("name")
    if not isinstance(name, str):
        raise UserError(f"{key}.name is {'missing' if name is None else repr(name)}; choose from {', '.join(table)}.")
    place = table.get(name, name)
    entry = imported(place, f"{key}.name", table) if isinstance(place, str) else place
    made = configure(entry, {k: v for k, v in section.items() if k != "name"}, key, ("name",))
    if isinstance(kind, type) and not isinstance(made, kind):
        raise UserError(f"{key}.name: {type(made).__name__} must be a subclass of {kind.__module__}.{kind.__name__}.")
    if isinstance(kind, tuple) and not takes(made, len(kind)):
        raise UserError(f"{key}.name: {name} must be a function of ({', '.join(kind)}).")
    return made


def takes(function: Any, count: int) -> bool:
    """Whether it can be called with so many arguments."""
    try:
        return bool(inspect.signature(function).bind(*range(count)))
    except (TypeError, ValueError):
        return False


def imported(spec: str, key: str, table: dict[str, Any]) -> Any:
    """What `file.py:name` or `package.module:name` stands for."""
    place, colon, name = spec.rpartition(":")
    if not colon:
        raise UserError(
            f"{key}: there is no {spec!r}; choose from {', '.join(table)}, "
            f'or name your own: "my_file.py:{spec}".{did_you_mean(spec, table)}'
        )
    try:
        module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    except FileNotFoundError:
        raise UserError(f"{key}: there is no file {place} (looked in {Path.cwd()}).{similar_file(place)}") from None
    except Exception as error:
        raise UserError(f"{key}: {place} cannot be imported: {type(error).__name__}: {error}") from error
    if name not in vars(module):
        public = [n for n, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        raise UserError(
            f"{key}: {place} has no {name!r}; it has {', '.join(public) or 'no functions'}.{did_you_mean(name, public)}"
        )
    return vars(module)[name]


def _import_module(name: str) -> Any:
    _look_in(Path.cwd())  # which is not looked in where an installed script was started
    return importlib.import_module(name)


def _look_in(folder: Path) -> None:
    """Modules of this folder can be imported, where no other has their name."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(path)
    name = f"flowalign_user_{path.resolve()}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    _look_in(path.resolve().parent)  # so that it can import its neighbours
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@dataclass(frozen=True)
class RewardEntry:
    """One line of a reward map."""

    name: str
    """What it is logged by."""
    spec: str
    """A built-in's name, `file.py:name`, `package.module:name`, or an address."""
    weight: float
    settings: dict[str, Any]


def reward_entry(key: str, value: Any) -> RewardEntry:
    """`key: weight`, or `key: {weight, reward, ...}` with settings; `reward` where the key is a name of the user's own."""
    settings = dict(value) if isinstance(value, dict) else {"weight": value}
    return RewardEntry(reward_name(key), settings.pop("reward", key), float(settings.pop("weight", 1.0)), settings)


def checked_rewards(section: Any, key: str) -> dict[str, Any]:
    """A map of names to weights or settings, checked but not loaded."""
    section = mapping(section, key)
    names = [reward_name(name) for name in section]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f"{key}: two rewards are called {twice[0]!r}; they are logged by name, so give one a name of its own: "
            f"{{mine: {{reward: {[name for name in section if reward_name(name) == twice[0]][1]!r}}}}}."
        )
    for name, value in section.items():
        weight, spec = (value.get("weight", 1.0), value.get("reward", name)) if isinstance(value, dict) else (value, name)
        if not isinstance(spec, str) or (spec not in REWARDS and ":" not in spec):
            raise UserError(
                f"{key}: there is no reward {spec!r}; choose from {', '.join(REWARDS)}, "
                f'or name your own: "my_rewards.py:{spec}".{did_you_mean(str(spec), REWARDS)}'
            )
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise UserError(f"{key}.{name} is {value!r}; write a weight, or {{weight: 1.0, ...}} with the reward's own settings.")
    return section


def load_rewards(section: dict[str, Any], key: str = "rewards") -> list[Reward]:
    """The rewards of a checked map, imported and configured. UserError where that fails."""
    rewards = []
    for name, value in section.items():
        entry = reward_entry(name, value)
        place, settings = REWARDS.get(entry.spec, entry.spec), entry.settings
        if place.startswith(("http://", "https://")):
            place, settings = "flowalign.rewards.web:WebReward", {"url": place, **settings}
        function = configure(imported(place, f"{key}.{name}", REWARDS), settings, f"{key}.{name}", ("weight", "reward"))
        rewards.append(make_reward(entry.name, function, entry.weight))
    return rewards


def load_reward(spec: str) -> Reward:
    """One reward as the command line names it: its name, or a map of it with its settings."""
    section = parse_yaml(spec, repr(spec)) if spec.lstrip().startswith("{") else {spec: 1.0}
    rewards = load_rewards(checked_rewards(section, "reward"), "reward")
    if len(rewards) != 1:
        raise UserError(f"{spec} names {len(rewards)} rewards; write one, such as '{{clip_score: {{path: FOLDER}}}}'.")
    return rewards[0]


def describe_rewards() -> dict[str, str]:
    """The first sentence of every built-in reward."""
    entries = {name: imported(place, name, REWARDS) for name, place in REWARDS.items()}
    return {name: (inspect.getdoc(entry) or "").splitlines()[0] for name, entry in entries.items()}
