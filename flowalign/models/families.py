"""Find the family of a model: by a name, an alias, a path to a class, or the model's own files."""

from collections.abc import Mapping
from dataclasses import fields

from flowalign.errors import UserError
from flowalign.models import ALIASES, MODELS, PIPELINES
from flowalign.models.base import FlowModel
from flowalign.models.config import ModelConfig
from flowalign.models.hub import explain_loading, read_index
from flowalign.models.pipeline import PipelineModel
from flowalign.settings.by_name import imported
from flowalign.settings.types import build, mapping, unknown_key


def canonical_name(name: str) -> str:
    """Return the built-in name that an alias stands for; a path to a class stays as it is."""
    lower = name.lower()
    return ALIASES.get(lower, lower if lower in MODELS else name)


def family_of(name: str) -> type[FlowModel]:
    """Return the class that `model.name` stands for, without loading a model.

    Raises UserError with the nearest known name, or if a path does not lead to a family.
    """
    canonical = canonical_name(name)
    spec = MODELS.get(canonical, canonical)
    family = imported(spec, "model.name", {**MODELS, **ALIASES})
    if not isinstance(family, type) or not issubclass(family, FlowModel):
        raise UserError(
            f"model.name: {name} is not a model family. "
            "Write a class derived from flowalign.models.base.FlowModel."
        )
    return family


def read_model_config(section: object) -> ModelConfig:
    """Return the settings of the `model` section, checked by the family that they belong to.

    Without a name, the family is read from the model's `model_index.json`.
    """
    settings = mapping(section, "model")
    path, revision = settings.get("path"), settings.get("revision")
    name = settings.get("name")
    if "name" not in settings:
        # Before the hub is asked: a misspelt key must not wait for the network.
        check_keys(settings)
        if not isinstance(path, str):
            # The shared settings answer a missing path or a misspelt key in the usual words.
            return build(ModelConfig, settings, "model")
        name = name_of(path, revision if isinstance(revision, str) else None)
    if not isinstance(name, str):
        raise UserError(f"model.name is {name!r}. Write a name, such as {' or '.join(MODELS)}.")
    config = {**settings, "name": canonical_name(name)}
    return build(family_of(name).Config, config, "model")


def check_keys(settings: Mapping[str, object]) -> None:
    """Refuse a key that no built-in family has."""
    known = [f.name for f in fields(ModelConfig)]
    for family in MODELS:
        known += [f.name for f in fields(family_of(family).Config) if f.name not in known]
    for key in settings:
        if key not in known:
            raise UserError(unknown_key("model", key, known))


def name_of(path: str, revision: str | None = None, key: str = "model.path") -> str:
    """Return the name of the family that loads a folder or repository."""
    kind = read_index(path, revision, key).get("_class_name")
    name = PIPELINES.get(str(kind))
    if name is None:
        raise UserError(
            f"{key}: {path} holds a {kind}, but the built-in families load "
            f"{' and '.join(PIPELINES)}. Use another model, or write a family of your own: "
            'model.name: "my_family.py:MyModel".'
        )
    return name


def describe(path: str, key: str = "model.path") -> ModelConfig:
    """Return settings for making pictures with a model, read from its own files.

    Raises UserError if it cannot be opened, or if no built-in family loads it.
    """
    # Only built-in families are known by their pipelines, so the class is a PipelineModel.
    index = read_index(path, key=key)
    family = family_of(name_of(path, key=key))
    assert issubclass(family, PipelineModel)
    try:
        return family.describe(path, index)
    except (OSError, ValueError) as error:
        raise UserError(explain_loading(key, path, error)) from error
