"""From YAML to dataclasses: `extends`, overrides, and errors that name the file, the key and what to type."""

import copy
import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flowalign.advantage import ADVANTAGES
from flowalign.batch import Examples, Pairs, Prompts
from flowalign.dynamics import DYNAMICS, ode
from flowalign.errors import UserError
from flowalign.models import MODELS
from flowalign.models.base import ModelConfig
from flowalign.objectives import OBJECTIVES
from flowalign.objectives.base import Objective
from flowalign.policy import Decay, Sampler
from flowalign.rewards import REWARDS
from flowalign.rewards.adapt import make_reward
from flowalign.rewards.base import Reward
from flowalign.rewards.combine import COMBINE, Combine
from flowalign.sources import Ranking

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
class Ema:
    """An average of the trained adapter, evaluated and saved instead of it. `decay` 0 for none."""

    decay: float = 0.0
    every: int = 1
    """Updates between two steps of the average."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1 or self.every < 1:
            raise UserError(f"train.ema is decay {self.decay} every {self.every}; write 0 <= decay < 1 and every >= 1.")

    @property
    def follow(self) -> Decay:
        return Decay(value=self.decay, every=self.every)


@dataclass
class Train:
    """The loop. The experiment is prompts, images and updates per step; memory only decides images_per_pass."""

    steps: int = 100
    prompts_per_step: int = 8
    images_per_prompt: int = 8
    updates_per_step: int = 1
    """Each on its share of the step's prompts; the later ones are off-policy, as published."""
    images_per_pass: int = 8
    learning_rate: float = 3e-4
    warmup: int = 0
    """Updates in which the learning rate rises from 0."""
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    ema: Ema = field(default_factory=Ema)
    seed: int = 0
    save_every: int = 50
    evaluate_every: int = 50
    """Steps; 0 for only before and after."""
    keep: int = 2
    """Checkpoints that stay."""
    drop_equal_groups: bool = False
    """Whether images of a prompt whose rewards are all equal are left out, instead of having advantage 0."""
    max_bad_steps: int = 3
    """Updates with a loss or gradient that is not finite, which are not applied, before the run stops."""

    def __post_init__(self) -> None:
        counts = (
            "steps",
            "prompts_per_step",
            "images_per_prompt",
            "updates_per_step",
            "images_per_pass",
            "save_every",
            "keep",
            "max_bad_steps",
        )
        for name in counts:
            if getattr(self, name) < 1:
                raise UserError(f"train.{name} is {getattr(self, name)}; it must be 1 or more.")
        if self.evaluate_every < 0:
            raise UserError(f"train.evaluate_every is {self.evaluate_every}; write 0 for never, or a number of steps.")
        for name in ("warmup", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise UserError(f"train.{name} is {getattr(self, name)}; it must be 0 or more.")
        if not self.max_grad_norm > 0:
            raise UserError(f"train.max_grad_norm is {self.max_grad_norm}; it must be above 0.")
        if not 0 < self.learning_rate < 1:
            raise UserError(f"train.learning_rate is {self.learning_rate}; write a number above 0 and below 1, such as 3e-4.")


@dataclass
class Evaluation:
    """Fixed prompts and noise, before and after, by the ODE."""

    prompts: str = ""
    """A prompt file; empty for the training prompts."""
    images_per_prompt: int = 1
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
    def evaluation_sampler(self) -> Sampler:
        return dataclasses.replace(self.sampler, dynamics=ode, same_noise=False, **self.evaluation.sampler)


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read, merge and check a YAML file. UserError says what to type instead; no weights are loaded."""
    raw = read_yaml(Path(path))
    for override in overrides or []:
        raw = merge(raw, parse_override(override))
    try:
        return build_config(raw, Path(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_yaml(path: Path, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML file merged over what it extends."""
    if path.resolve() in [child.resolve() for child in children]:
        raise UserError(f"{path}: extends itself, through {' -> '.join(map(str, children))}.")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}.{_similar_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected sections such as `model:` and `train:`, found {type(raw).__name__}.")
    parent = raw.pop("extends", None)
    if parent is None:
        return raw
    for place in (path.parent / str(parent), CONFIGS / str(parent)):
        if place.is_file():
            return merge(read_yaml(place, (*children, path)), raw)
    raise UserError(
        f"{path}: extends: there is no file {parent} beside it or under configs/.{_similar_file(CONFIGS / str(parent))}"
    )


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as text; this reads it as the number it is."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_override(text: str) -> dict[str, Any]:
    """`train.steps=10` as the nested mapping it stands for; values are YAML."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"{text!r} is not an override; write section.key=value, for example train.steps=10.")
    try:
        nested: Any = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{text!r}: the value is not YAML: {' '.join(str(error).split())}") from None
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return nested


def merge(parent: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    """The child over the parent. Reward maps replace; so does a section whose `name` changes; others merge."""
    merged = dict(parent)
    for key, value in child.items():
        before = merged.get(key)
        if isinstance(before, dict) and isinstance(value, dict) and key not in REPLACED:
            renamed = "name" in value and value["name"] != before.get("name")
            merged[key] = value if renamed else merge(before, value)
        else:
            merged[key] = value
    return merged


def build_config(raw: dict[str, Any], path: Path) -> Config:
    """Every section typed and checked."""
    sections = [f.name for f in dataclasses.fields(Config) if f.name != "raw"]
    for key in raw:
        if key not in sections:
            raise UserError(
                f"Key {key!r} is not a section.{_did_you_mean(key, sections)} The sections are {', '.join(sections)}."
            )
    raw = merge(DEFAULTS, raw)
    for key in ("model", "data"):
        if key not in raw:
            raise UserError(f"the section {key!r} is missing.")
    model = raw["model"]
    name = model.get("name") if isinstance(model, dict) else model
    if not isinstance(name, str) or name not in MODELS:
        raise UserError(f"model.name is {name!r}; the models are {', '.join(MODELS)}.{_did_you_mean(name, MODELS)}")
    config = Config(
        model=build(ModelConfig, model, "model"),
        sampler=build_sampler(raw["sampler"]),
        objective=checked_objective(build_named(OBJECTIVES, raw["objective"], "objective")),
        advantage=build_named(ADVANTAGES, raw["advantage"], "advantage"),
        combine=build_named(COMBINE, raw["combine"], "combine"),
        rewards=checked_rewards(raw.get("rewards", {}), "rewards"),
        data=build(Data, raw["data"], "data"),
        train=build(Train, raw.get("train", {}), "train"),
        evaluation=build(Evaluation, raw.get("evaluation", {}), "evaluation"),
        output=checked_output(raw.get("output") or str(Path("outputs") / path.stem)),
        raw=raw,
    )
    check_evaluation(config)
    check_experience(config)
    check_combine(config)
    return config


def checked_objective(objective: Any) -> Objective:
    if not isinstance(objective, Objective):
        raise UserError(f"objective: {type(objective).__name__} must be a subclass of flowalign.objectives.base.Objective.")
    return objective


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


def check_combine(config: Config) -> None:
    """Whether the rewards can be combined so for this objective."""
    if not config.rewards:
        return
    config.combine.check([reward_name(name) for name in config.rewards])
    if config.combine.follows and config.objective.learns_from is Prompts:
        pointwise = [name for name, entry in COMBINE.items() if not entry.follows]
        raise UserError(
            f"combine.name is {config.raw['combine']['name']}, which looks at whole steps, but the objective "
            f"{config.raw['objective']['name']} takes the gradient of each image's reward; choose from {', '.join(pointwise)}."
        )


def reward_name(spec: str) -> str:
    """What a reward is logged by."""
    return spec.partition("://")[2] or spec.rpartition(":")[2]


def checked_output(output: Any) -> str:
    if not isinstance(output, str) or "${" in output:
        raise UserError(f"output is {output!r}; write a folder, such as outputs/first.")
    return output


def check_evaluation(config: Config) -> None:
    """The evaluation's own rewards and sampler."""
    evaluation = config.evaluation
    if evaluation.images_per_prompt < 1:
        raise UserError(f"evaluation.images_per_prompt is {evaluation.images_per_prompt}; it must be 1 or more.")
    evaluation.rewards = checked_rewards(evaluation.rewards, "evaluation.rewards") if evaluation.rewards else config.rewards
    allowed = ("steps", "guidance", "embedded_guidance")
    for key in evaluation.sampler:
        if key not in allowed:
            raise UserError(f"Key {key!r} is not one of evaluation.sampler: {', '.join(allowed)}.{_did_you_mean(key, allowed)}")
    checked = build(Sampler, dict(evaluation.sampler), "evaluation.sampler")
    evaluation.sampler = {key: getattr(checked, key) for key in evaluation.sampler}


def build_sampler(section: Any) -> Sampler:
    section = _mapping(section, "sampler")
    dynamics = build_named(DYNAMICS, section["dynamics"], "sampler.dynamics")
    eta = dynamics.keywords["eta"] if isinstance(dynamics, partial) else 0
    if not 0 <= eta < math.inf or (section["dynamics"]["name"] == "cps" and eta > 1):
        raise UserError(f"sampler.dynamics.eta is {eta}; write a number of 0 or more, for cps at most 1.")
    settings = build(Sampler, {k: v for k, v in section.items() if k != "dynamics"}, "sampler")
    return dataclasses.replace(settings, dynamics=dynamics)


def build(cls: Any, section: Any, key: str) -> Any:
    """A dataclass from a mapping: types checked, unknown keys answered with the nearest, `__post_init__` run."""
    section = _mapping(section, key)
    _check_keys(section, cls, key)
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), section))
    except OmegaConfBaseException as error:
        where = ".".join(filter(None, (key, error.full_key)))
        reason = str(error).splitlines()[0]
        if "MISSING" in reason or "mandatory" in reason.lower():
            raise UserError(f"{where} is missing.") from None
        raise UserError(f"{where}: {reason}") from None


def build_named(table: dict[str, Any], section: Any, key: str) -> Any:
    """The entry of the table that `name` asks for, with the section's other fields as its settings."""
    section = _mapping(section, key)
    name = section.get("name")
    if not isinstance(name, str):
        raise UserError(f"{key}.name is {'missing' if name is None else repr(name)}; choose from {', '.join(table)}.")
    place = table.get(name, name)
    entry = imported(place, key, table) if isinstance(place, str) else place
    return configure(entry, {k: v for k, v in section.items() if k != "name"}, key)


def configure(entry: Any, settings: dict[str, Any], key: str) -> Any:
    """An instance of a class, or a function with its keyword settings bound. UserError when that cannot be."""
    if not callable(entry):
        raise UserError(f"{key}: {entry!r} is neither a function nor a class.")
    try:
        if dataclasses.is_dataclass(entry):
            return build(entry, settings, key)
        arguments = dataclasses.asdict(build(settings_class(entry), settings, key))
        return entry(**arguments) if inspect.isclass(entry) else partial(entry, **arguments) if arguments else entry
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{key} cannot be made: {type(error).__name__}: {error}") from error


def settings_class(entry: Callable[..., Any]) -> type:
    """A dataclass of a function's arguments that have defaults."""
    fields = [
        (p.name, Any if p.annotation is p.empty else p.annotation, field(default_factory=partial(copy.deepcopy, p.default)))
        for p in inspect.signature(entry).parameters.values()
        if p.default is not p.empty
    ]
    return dataclasses.make_dataclass("Settings", fields)


def imported(spec: str, key: str, table: dict[str, Any]) -> Any:
    """What `file.py:name` or `package.module:name` stands for."""
    place, colon, name = spec.rpartition(":")
    if not colon:
        raise UserError(
            f"{key}: there is no {spec!r}; choose from {', '.join(table)}, "
            f'or name your own: "my_file.py:{spec}".{_did_you_mean(spec, table)}'
        )
    try:
        module = _import_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except FileNotFoundError:
        raise UserError(f"{key}: there is no file {place} (looked in {Path.cwd()}).") from None
    except Exception as error:
        raise UserError(f"{key}: {place} cannot be imported: {type(error).__name__}: {error}") from error
    if name not in vars(module):
        public = [n for n, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        raise UserError(
            f"{key}: {place} has no {name!r}; it has {', '.join(public) or 'no functions'}.{_did_you_mean(name, public)}"
        )
    return vars(module)[name]


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
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.append(folder)  # so that it can import its neighbours
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def checked_rewards(section: Any, key: str) -> dict[str, Any]:
    """A map of names to weights or settings, checked but not loaded."""
    section = _mapping(section, key)
    for name, value in section.items():
        if name not in REWARDS and ":" not in str(name):
            raise UserError(
                f"{key}: there is no reward {name!r}; choose from {', '.join(REWARDS)}, "
                f'or name your own: "my_rewards.py:{name}".{_did_you_mean(name, REWARDS)}'
            )
        weight = value.get("weight", 1.0) if isinstance(value, dict) else value
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise UserError(f"{key}.{name} is {value!r}; write a weight, or {{weight: 1.0, ...}} with the reward's own settings.")
    return section


def weight_and_settings(value: Any) -> tuple[float, dict[str, Any]]:
    """The two parts of an entry of a reward map."""
    settings = dict(value) if isinstance(value, dict) else {"weight": value}
    return float(settings.pop("weight", 1.0)), settings


def load_rewards(section: dict[str, Any], key: str = "rewards") -> list[Reward]:
    """The rewards of a checked map, imported and configured. UserError where that fails."""
    rewards = []
    for name, value in section.items():
        weight, settings = weight_and_settings(value)
        if name.startswith(("http://", "https://")):
            place, settings = "flowalign.rewards.web:WebReward", {"url": name, **settings}
        else:
            place = REWARDS.get(name, name)
        function = configure(imported(place, f"{key}.{name}", REWARDS), settings, f"{key}.{name}")
        rewards.append(make_reward(reward_name(name), function, weight))
    names = [reward.name for reward in rewards]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{key}: two rewards are called {twice.pop()!r}; they are logged by name, so rename one.")
    return rewards


def load_reward(spec: str) -> Reward:
    """One reward as the command line names it: its name, or a map of it with its settings."""
    try:
        section = yaml.load(spec, Loader=_Loader) if spec.lstrip().startswith("{") else {spec: 1.0}
    except yaml.YAMLError as error:
        raise UserError(f"{spec!r} is not YAML: {' '.join(str(error).split())}") from None
    rewards = load_rewards(checked_rewards(section, "reward"), "reward")
    if len(rewards) != 1:
        raise UserError(f"{spec} names {len(rewards)} rewards; write one, such as '{{clip_score: {{path: FOLDER}}}}'.")
    return rewards[0]


def describe_rewards() -> dict[str, str]:
    """The first sentence of every built-in reward."""
    entries = {name: imported(place, name, REWARDS) for name, place in REWARDS.items()}
    return {name: (inspect.getdoc(entry) or "").splitlines()[0] for name, entry in entries.items()}


def _mapping(section: Any, key: str) -> dict[str, Any]:
    if not isinstance(section, dict):
        raise UserError(f"{key} is {section!r}; write its settings as {key}: {{...}}.")
    for name, value in section.items():
        if isinstance(value, str) and "${" in value:
            raise UserError(f"{key}.{name} is {value!r}; values are taken as they stand, ${{...}} is not filled in.")
    return {str(name): value for name, value in section.items()}


def _check_keys(section: dict[str, Any], cls: Any, key: str) -> None:
    """Unknown keys, here and in nested dataclasses, answered with the nearest."""
    known = {f.name: f for f in dataclasses.fields(cls) if f.init}
    if section and not known:
        raise UserError(f"{key} has no settings, but {', '.join(section)} is given.")
    for name, value in section.items():
        if name not in known:
            raise UserError(f"Key {key}.{name} is not known.{_did_you_mean(name, known)} {key} has {', '.join(known)}.")
        kind = known[name].type
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            _check_keys(_mapping(value, f"{key}.{name}"), kind, f"{key}.{name}")


def _did_you_mean(word: Any, choices: Any) -> str:
    near = difflib.get_close_matches(str(word), [str(c) for c in choices], n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def _similar_file(path: Path) -> str:
    folder = path.parent
    return _did_you_mean(path.name, [p.name for p in folder.iterdir()]) if folder.is_dir() else ""
