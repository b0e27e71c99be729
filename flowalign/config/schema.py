"""A JSON schema of configurations, with which editors complete keys and show their descriptions.

`flowalign config schema > flowalign.json` writes it. An editor with the YAML language server reads
it by the first line of a file: `# yaml-language-server: $schema=flowalign.json`.
"""

import ast
import dataclasses
import inspect
import itertools
import math
import textwrap
from collections.abc import Mapping
from typing import cast, get_type_hints

from pydantic import PydanticUserError, TypeAdapter
from pydantic_core import PydanticSerializationError, to_jsonable_python

from flowalign.advantages import ADVANTAGES
from flowalign.config.checks import EVALUATION_SAMPLER
from flowalign.config.sections import Data, DEFAULTS, Distributed, Evaluation, Train
from flowalign.data.source import DataSource
from flowalign.dynamics import DYNAMICS
from flowalign.models import ALIASES, MODELS
from flowalign.models.families import family_of
from flowalign.objectives import OBJECTIVES
from flowalign.policy import Sampler
from flowalign.rewards import REWARDS
from flowalign.rewards.combine import COMBINE
from flowalign.settings.by_name import imported
from flowalign.settings.merging import Section
from flowalign.settings.types import arguments_class, dataclass_in, defaults_of
from flowalign.tracking import TRACKERS

REFERENCE: Section = {"type": "string", "pattern": r"\$\{"}
"""Any value may be a reference, such as ${train.steps}."""

OWN_CODE: Section = {
    "description": 'Your own code: name: "my_file.py:MyClass", and its settings.',
    "type": "object",
    "properties": {"name": {"type": "string", "pattern": ":"}},
    "required": ["name"],
}
"""A section that the schema cannot describe, because its keys are a user's."""


def json_schema() -> Section:
    """Return the JSON schema (draft 2020-12) of a configuration, as plain dictionaries and lists.

    No key is required, because a file may take any of them from the one it extends.
    """
    sampler = properties_of(Sampler)
    sampler["dynamics"] = named_section(DYNAMICS, "How noise enters the steps of the sampler.")
    evaluation = properties_of(Evaluation)
    rewards = reward_map()
    evaluation["rewards"] = rewards
    evaluation["sampler"] = closed(
        {key: sampler[key] for key in EVALUATION_SAMPLER}, field_docs(Evaluation)["sampler"]
    )
    data = properties_of(Data)
    for section in (data, evaluation):
        section |= {key: source_section(section[key]) for key in ("prompts", "pairs")}
    # The order of a shipped file: editors list keys in the order of the schema.
    sections: Section = {
        "extends": {"type": "string", "description": "A YAML file that this one is merged over."},
        "model": model_section(),
        "sampler": closed(sampler, summary(Sampler)),
        "objective": named_section(OBJECTIVES, "The training objective.", "objective"),
        "advantage": named_section(ADVANTAGES, "How rewards become advantages.", "advantage"),
        "combine": named_section(COMBINE, "How several rewards become one.", "combine"),
        "rewards": rewards,
        "data": closed(data, summary(Data)),
        "train": closed(properties_of(Train), summary(Train)),
        "evaluation": closed(evaluation, summary(Evaluation)),
        "distributed": closed(properties_of(Distributed), summary(Distributed)),
        "tracking": tracking_section(),
        "output": {"type": "string", "description": "The run folder; outputs/FILE by default."},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "flowalign configuration",
        **closed(sections),
    }


def closed(properties: Section, description: str = "") -> Section:
    """Return the schema of a mapping that has these keys and no others."""
    about: Section = {"description": description} if description else {}
    return {
        **about,
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def named_section(table: Mapping[str, object], description: str, section: str = "") -> Section:
    """Return the schema of a section whose `name` decides which other keys it has."""
    default = DEFAULTS.get(section, {})
    choices = [named_choice(name, entry, table) for name, entry in table.items()]
    about: Section = {"description": description} | ({"default": default} if default else {})
    return {**about, "anyOf": [*choices, OWN_CODE]}


def model_section() -> Section:
    """Return the schema of a model of each built-in family, or of the user's own."""
    description = "The model, a folder or repository in diffusers' layout."
    return {"description": description, "anyOf": [*map(model_choice, MODELS), OWN_CODE]}


def model_choice(family: str) -> Section:
    """Return the schema of a model of one family, which may be named by an alias or not at all."""
    config = family_of(family).Config
    name: Section = {
        "description": "The model family; read from the model itself if left out.",
        "enum": [family, *(alias for alias, meaning in ALIASES.items() if meaning == family)],
    }
    return closed(properties_of(config) | {"name": name}, summary(config))


def named_choice(name: str, entry: object, table: Mapping[str, object]) -> Section:
    """Return the schema of a section that names one built-in entry."""
    value = imported(entry, name, table) if isinstance(entry, str) else entry
    about = summary(value)
    properties: Section = {"name": {"const": name, "description": about}}
    return closed(properties | properties_of(value), about)


def reward_map() -> Section:
    """Return the schema of a map of rewards: built-in names, or the user's own code."""
    weight: Section = {"type": "number", "default": 1, "description": "Weight of the reward."}
    limit: Section = {"type": "number", "exclusiveMinimum": 0, "description": "Seconds of a call."}
    properties: Section = {}
    for name, entry in REWARDS.items():
        # Importing all rewards takes seconds, but their settings stand nowhere else.
        reward = imported(entry, f"rewards.{name}", REWARDS)
        own = {"weight": weight, "time_limit": limit}
        settings = closed(own | properties_of(reward), summary(reward))
        properties[name] = {"description": summary(reward), "anyOf": [weight, settings, REFERENCE]}
    return {
        "description": "Rewards by name, each with a weight or settings.",
        "type": "object",
        "properties": properties,
        "additionalProperties": {"anyOf": [weight, {"type": "object"}, REFERENCE]},
    }


def source_section(written: object) -> Section:
    """Return the schema of prompts or pairs: a path, or a mapping with details."""
    assert isinstance(written, dict)
    details = closed(properties_of(DataSource), summary(DataSource))
    return {**written, "anyOf": [{"type": "string"}, details]}


def tracking_section() -> Section:
    """Return the schema of the section `tracking`: names, or names with settings."""
    properties: Section = {}
    for name, entry in TRACKERS.items():
        tracker = imported(entry, f"tracking.{name}", TRACKERS)
        settings = closed(properties_of(tracker), summary(tracker))
        properties[name] = {"description": summary(tracker), "anyOf": [settings, {"type": "null"}]}
    choice: Section = {"anyOf": [{"enum": list(TRACKERS)}, {"type": "string", "pattern": ":"}]}
    return {
        "description": "Where the run is recorded, besides metrics.jsonl and TensorBoard.",
        "anyOf": [
            {"type": "object", "properties": properties},
            {"type": "array", "items": choice},
            choice,
        ],
    }


def summary(value: object) -> str:
    """Return the first paragraph of a docstring on one line."""
    return " ".join((inspect.getdoc(value) or "").partition("\n\n")[0].split())


def properties_of(value: object, values: Section | None = None) -> Section:
    """Return the schema of every setting of a dataclass, a class or a function.

    Args:
        value: the dataclass, class or function.
        values: the defaults of these settings, if the section has others than the class.
    """
    if isinstance(value, type) and dataclasses.is_dataclass(value):
        cls = value
    elif callable(value):
        cls = arguments_class(value)
    else:
        return {}
    hints, docs = get_type_hints(cls, include_extras=True), field_docs(cls)
    defaults = defaults_of(cls) | (values or {})
    return {
        f.name: setting(hints[f.name], defaults[f.name], docs.get(f.name, ""))
        for f in dataclasses.fields(cls)
        if f.init
    }


def setting(annotation: object, default: object, description: str) -> Section:
    """Return the schema of one setting: its type, its default and its description."""
    about: Section = {"description": description} if description else {}
    inner = dataclass_in(annotation)
    if inner is not None and inner is annotation:
        # A field's own default may differ from its class's: one KL weight is 0.1, another 0.5.
        values = vars(default) if isinstance(default, inner) else None
        return closed(properties_of(inner, values), description or summary(inner))
    default = plain(default)
    if default is not UNKNOWN:
        about["default"] = default
    if inner is not None:
        entries = closed(properties_of(inner), summary(inner))
        return {**about, "type": "object", "additionalProperties": entries}
    kind = type_schema(annotation)
    # Not for mappings and lists: an editor would offer the reference before their keys.
    return {**about, "anyOf": [kind, REFERENCE]} if kind.get("type") != "object" else about | kind


def type_schema(annotation: object) -> Section:
    """Return the schema of a type with its range, or of anything if JSON has no such type."""
    try:
        # Own types such as functions are allowed, and have no schema.
        adapter: TypeAdapter[object] = TypeAdapter(cast("type[object]", annotation))
        return without_infinity(adapter.json_schema())
    except PydanticUserError:
        return {}


def without_infinity(schema: Section) -> Section:
    """Return a schema without limits that JSON cannot write."""
    return {key: value for key, value in schema.items() if value not in (math.inf, -math.inf)}


UNKNOWN = object()
"""Stands for a default that does not exist or that JSON cannot write."""


def plain(default: object) -> object:
    """Return a default as JSON holds it, or UNKNOWN."""
    try:
        value = to_jsonable_python(default)
    except PydanticSerializationError:
        return UNKNOWN
    finite = not isinstance(value, float) or math.isfinite(value)
    return value if finite and default is not dataclasses.MISSING else UNKNOWN


def field_docs(cls: type) -> dict[str, str]:
    """Return the docstrings of a dataclass's fields, those of its base classes included.

    Python does not keep them, so they are read from the source.
    """
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):  # a built-in class, or one made while the program runs
            continue
        definition = tree.body[0]
        assert isinstance(definition, ast.ClassDef)
        for statement, following in itertools.pairwise(definition.body):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                # A subclass that declares a field again describes it again, or not at all.
                docs.pop(statement.target.id, None)
                if text := text_of(following):
                    docs[statement.target.id] = text
    return docs


def text_of(statement: ast.stmt) -> str:
    """Return the text of a docstring on one line, or nothing for any other statement."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return " ".join(str(statement.value.value).split())
    return ""
