"""The JSON schema accepts every shipped file, refuses misspelt keys, and describes settings."""

import json
import re
from collections.abc import Iterator

import pytest

from flowalign.advantages import ADVANTAGES
from flowalign.bundled import CONFIGS
from flowalign.config.load import load_config
from flowalign.config.resolved import resolve
from flowalign.config.schema import json_schema
from flowalign.objectives import OBJECTIVES
from flowalign.rewards import REWARDS
from flowalign.rewards.combine import COMBINE
from flowalign.settings.yaml_files import parse_yaml

FILES = sorted(CONFIGS.rglob("*.yaml"))
TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}
LIMITS = {
    "minimum": lambda value, limit: value >= limit,
    "maximum": lambda value, limit: value <= limit,
    "exclusiveMinimum": lambda value, limit: value > limit,
    "exclusiveMaximum": lambda value, limit: value < limit,
    "minItems": lambda value, limit: len(value) >= limit,
    "maxItems": lambda value, limit: len(value) <= limit,
    "pattern": lambda value, pattern: re.search(pattern, value) is not None,
    "enum": lambda value, choices: value in choices,
    "const": lambda value, constant: value == constant,
}


def accepts(schema, value) -> bool:
    """The parts of JSON Schema that the schema uses."""
    if "anyOf" in schema and not any(accepts(choice, value) for choice in schema["anyOf"]):
        return False
    kind = schema.get("type")
    if kind and not isinstance(value, TYPES[kind]):
        return False
    if kind in ("integer", "number") and isinstance(value, bool):
        return False
    if not all(test(value, schema[key]) for key, test in LIMITS.items() if key in schema):
        return False
    if isinstance(value, dict):
        return accepts_keys(schema, value)
    return not isinstance(value, list) or accepts_entries(schema, value)


def accepts_keys(schema, value) -> bool:
    properties, rest = schema.get("properties", {}), schema.get("additionalProperties", {})
    if not set(schema.get("required", [])) <= set(value):
        return False
    unknown = [entry for key, entry in value.items() if key not in properties]
    if rest is False and unknown:
        return False
    known = [key for key in value if key in properties]
    return all(accepts(properties[key], value[key]) for key in known) and all(
        accepts(rest, entry) for entry in unknown
    )


def accepts_entries(schema, value) -> bool:
    first = schema.get("prefixItems", [])
    schemas = [*first, *[schema.get("items", {})] * len(value)]
    return all(map(accepts, schemas, value))


@pytest.fixture(scope="module")
def schema():
    return json.loads(json.dumps(json_schema(), allow_nan=False))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_shipped_file_fits_the_schema(path, schema):
    assert accepts(schema, parse_yaml(path.read_text(), str(path)))


@pytest.mark.parametrize("name", ["crd", "flow_grpo", "dpo", "alignprop", "flow_grpo_flux"])
def test_a_resolved_configuration_fits_the_schema(name, schema):
    assert accepts(schema, resolve(load_config(CONFIGS / "tiny" / f"{name}.yaml")))


WRONG = [
    {"trian": {}},
    {"train": {"stepz": 1}},
    {"train": {"steps": 0}},
    {"train": {"steps": "many"}},
    {"train": {"steps": 1.5}},
    {"train": {"steps": True}},
    {"train": {"ema": {"decya": 0.9}}},
    {"train": {"stop": {"eval/scene_match": {"faling": 2}}}},
    {"model": {"name": "sd33"}},
    {"model": {"lora": {"rnk": 4}}},
    {"objective": {"name": "crd", "bta": 1.0}},
    {"objective": {"name": "crd", "kl": {"wieght": 1.0}}},
    {"objective": {"name": "nft", "clip_range": 1e-4}},
    {"sampler": {"dynamics": {"name": "ode", "eta": 0.5}}},
    {"sampler": {"window": {"range": [1, 2, 3]}}},
    {"evaluation": {"sampler": {"dynamics": {"name": "ode"}}}},
    {"rewards": {"scene_match": "high"}},
    {"rewards": {"jpeg_size": {"qualty": 50}}},
    {"output": 3},
]


@pytest.mark.parametrize("values", WRONG, ids=str)
def test_a_mistake_does_not_fit_the_schema(values, schema):
    assert not accepts(schema, values)


RIGHT = [
    {},
    {"train": {"steps": "${data.steps}", "learning_rate": "${oc.env:RATE}"}},
    {"objective": {"name": "my_file.py:Mine", "anything": [1]}},
    {"objective": {"clip_range": 1e-3}},
    {"model": {"name": "my_family.py:Model", "path": "p"}},
    {"rewards": {"my_rewards.py:redness": 1.0, "mine": {"reward": "clip_score", "path": "p"}}},
    {"train": {"stop": {"eval/scene_match": {"falling": 2}}}},
]


@pytest.mark.parametrize("values", RIGHT, ids=str)
def test_references_and_code_of_the_user_fit_the_schema(values, schema):
    assert accepts(schema, values)


def names_in(section) -> set[str]:
    choices = [choice["properties"]["name"] for choice in section["anyOf"]]
    return {choice["const"] for choice in choices if "const" in choice}


def test_the_schema_has_every_built_in_name(schema):
    properties = schema["properties"]
    assert names_in(properties["objective"]) == set(OBJECTIVES)
    assert names_in(properties["advantage"]) == set(ADVANTAGES)
    assert names_in(properties["combine"]) == set(COMBINE)
    assert set(properties["rewards"]["properties"]) == set(REWARDS)


def undescribed(schema, key: str) -> Iterator[str]:
    """The dotted keys of settings without a description."""
    for name, setting in schema.get("properties", {}).items():
        if not setting.get("description"):
            yield f"{key}.{name}"
        yield from undescribed(setting, f"{key}.{name}")


@pytest.mark.parametrize("section", ["data", "train", "evaluation"])
def test_every_setting_of_a_plain_section_is_described(section, schema):
    assert not list(undescribed(schema["properties"][section], section))


def test_a_default_is_that_of_the_field_and_not_of_its_class(schema):
    choices = schema["properties"]["objective"]["anyOf"]
    (crd,) = [c for c in choices if c["properties"]["name"].get("const") == "crd"]
    weight = crd["properties"]["kl"]["properties"]["weight"]
    config = load_config(CONFIGS / "base" / "tiny-forward.yaml", ["objective={name: crd}"])
    assert weight["default"] == config.objective.kl.weight > 0
