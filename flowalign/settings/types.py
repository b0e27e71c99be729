"""Settings: dataclasses and functions whose annotations say what a YAML file may hold.

pydantic checks types and ranges. This module turns its errors into a problem and a fix, merges a
partly written section over its default, and gives functions the same treatment as dataclasses.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, is_dataclass
from functools import cache, partial
from typing import Annotated, Any, ClassVar, get_args, get_type_hints, TYPE_CHECKING, TypeVar

from pydantic import ConfigDict, Field, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, PydanticSerializationError, to_json

from flowalign.errors import did_you_mean, UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

D = TypeVar("D", bound="DataclassInstance")

MANY = 10**6
Count = Annotated[int, Field(ge=1, le=MANY)]
"""A whole number from 1."""
CountOrZero = Annotated[int, Field(ge=0, le=MANY)]
"""A whole number from 0."""
Positive = Annotated[float, Field(gt=0)]
"""A finite number above 0."""
NonNegative = Annotated[float, Field(ge=0)]
"""A finite number from 0."""
Share = Annotated[float, Field(ge=0, le=1)]
"""A number from 0 to 1."""
Guidance = Annotated[float, Field(ge=1, le=100)]
"""A scale of classifier-free guidance; 1 is none."""
Unbounded = Annotated[float, Field(ge=-math.inf, allow_inf_nan=True)]
"""A number that may be infinite."""

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
UNKNOWN_KEY = "unexpected_keyword_argument"


class WrongSetting(UserError, ValueError):
    """A value of a setting that cannot work.

    The message begins with the setting's name; `build` puts the section in front of it.
    """


class Settings:
    """A base for dataclasses of settings, which are checked when they are made.

    Raises WrongSetting if a value is not of its field's type or range. Defaults are not checked:
    they may be values that nobody can write, such as infinity where a number must be finite.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def __post_init__(self) -> None:
        """Validate every field that is not at its default."""
        # Subclasses are dataclasses, which a type checker cannot know.
        for f in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, f.name)
            if not f.init or value is f.default:
                continue
            try:
                adapter(type(self)).validator.validate_assignment(self, f.name, value)
            except ValidationError as error:
                raise WrongSetting(f"{f.name} is {value!r}; {advice(error.errors()[0])}") from None


@cache
def adapter(cls: type) -> TypeAdapter[Any]:
    """Return pydantic's validator of a dataclass, strict also for a user's plain dataclass."""
    # pydantic reads the configuration of a standard dataclass from this attribute only.
    if not issubclass(cls, Settings):
        cls.__pydantic_config__ = STRICT  # pyright: ignore[reportAttributeAccessIssue]
    return TypeAdapter(cls)


def build(cls: type[D], section: object, key: str, other_keys: Sequence[str] = ()) -> D:
    """Return a dataclass made from a mapping, with types and ranges checked.

    Args:
        cls: the dataclass.
        section: what the YAML holds under `key`.
        key: the dotted key, for messages.
        other_keys: keys that the caller reads itself, offered for a misspelt one.

    Raises:
        UserError: a key is unknown or missing, or a value is not of its type or range.
    """
    defaults = defaults_of(cls)
    changed = {
        name: over(defaults.get(name), value)
        for name, value in mapping(section, key).items()
        # A default is not checked: it may be what cannot be written, such as infinity.
        if name not in defaults or repr(value) != repr(defaults[name])
    }
    try:
        # Through JSON: strict pydantic takes JSON's lists and mappings for tuples and dataclasses,
        # but of Python's it wants the exact types.
        return adapter(cls).validate_json(to_json(changed, inf_nan_mode="constants"))
    except ValidationError as error:
        raise UserError(explain(error, cls, key, other_keys)) from None
    except PydanticSerializationError as error:
        raise UserError(
            f"{key} cannot be read: {error}; write text, numbers, lists and mappings."
        ) from None
    except PydanticUserError:
        raise UserError(
            f"{key}: the types of {cls.__name__}'s fields cannot be found. "
            "Import them where the class is defined, outside `if TYPE_CHECKING`."
        ) from None


def defaults_of(cls: type[D]) -> dict[str, object]:
    """Return the default of every field; MISSING for a field without one."""
    return {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(cls)
    }


def over(default: object, value: object) -> object:
    """Return a partly written section merged over the dataclass that is its default.

    pydantic would fill the rest with the defaults of the class, not of this field.
    """
    if not is_dataclass(default) or isinstance(default, type) or not isinstance(value, dict):
        return value
    merged = {name: over(getattr(default, name, None), entry) for name, entry in value.items()}
    return dataclasses.asdict(default) | merged


def mapping(section: object, key: str) -> dict[str, object]:
    """Return a section with its keys as text. UserError if it is not a mapping."""
    if not isinstance(section, dict):
        raise UserError(f"{key} is {section!r}; write its settings as {key}: {{...}}.")
    return {str(name): value for name, value in section.items()}


def explain(error: ValidationError, cls: type, key: str, other_keys: Sequence[str]) -> str:
    """Return the most useful of pydantic's errors: an unknown key explains the others."""
    first = min(error.errors(), key=lambda details: details["type"] != UNKNOWN_KEY)
    location = [key, *map(str, first["loc"])]
    place = ".".join(location)
    match first["type"]:
        case "unexpected_keyword_argument":
            return explain_unknown_key(cls, location, other_keys)
        case "missing":
            *sections, name = location
            return f"{place} is missing; write it as {'.'.join(sections)}: {{{name}: ...}}."
        case "value_error":
            cause = first.get("ctx", {})["error"]
            if isinstance(cause, WrongSetting):
                return f"{place}.{cause}"
            return f"{place} cannot be made: {type(cause).__name__}: {cause}"
        case "dataclass_type" if first["loc"]:
            names = [f.name for f in dataclasses.fields(class_at(cls, location[1:])) if f.init]
            settings = ", ".join(f"{name}: ..." for name in names)
            return (
                f"{place} is {first['input']!r}; it must be a mapping: "
                f"write one or more of {place}: {{{settings}}}."
            )
    return f"{place} is {first['input']!r}; {advice(first)}"


def explain_unknown_key(cls: type, location: Sequence[str], other_keys: Sequence[str]) -> str:
    """Return the nearest key and all that the section has."""
    *sections, name = location
    owner = class_at(cls, sections[1:])
    known = [f.name for f in dataclasses.fields(owner) if f.init]
    if owner is cls:
        known = [*other_keys, *known]
    return unknown_key(".".join(sections), name, known)


def unknown_key(section: str, name: str, known: Sequence[str]) -> str:
    """Return the message for a key that a section does not have."""
    return (
        f"Key {section}.{name} is not known.{did_you_mean(name, known)} "
        f"{section} has {', '.join(known) or 'no settings'}."
    )


def class_at(cls: type, path: Sequence[str]) -> type:
    """Return the dataclass of a section inside a dataclass; keys of mappings are passed over."""
    for name in path:
        cls = dataclass_in(get_type_hints(cls).get(name)) or cls
    return cls


def dataclass_in(annotation: object) -> type | None:
    """Return the dataclass that an annotation is or contains, such as that of `dict[str, X]`."""
    if isinstance(annotation, type) and is_dataclass(annotation):
        return annotation
    return next(filter(None, map(dataclass_in, get_args(annotation))), None)


def advice(error: ErrorDetails) -> str:
    """Return what to write instead, in pydantic's words where they are clear."""
    details = error.get("ctx", {})
    if error["type"] == "literal_error":
        choices = details["expected"].replace("'", "").replace(" or ", ", ")
        return f"choose from {choices}.{did_you_mean(error['input'], choices.split(', '))}"
    # "at most 2 items after validation, not 3" misleads: the list must have exactly this many.
    if error["type"] == "too_long":
        return f"write a list of {details['max_length']}."
    text = error["msg"]
    for theirs, ours in (
        ("Input should", "it must"),
        ("an object", "a mapping"),
        ("valid array", "list"),
        ("a valid string", "text, in quotes where it looks like a number"),
    ):
        text = text.replace(theirs, ours)
    return f"{text}."


def configure(
    entry: object, settings: Mapping[str, object], key: str, other_keys: Sequence[str] = ()
) -> Any:
    """Return a class's instance, or a function with its settings bound.

    Args:
        entry: a class, whose arguments are settings, or a function, whose arguments with defaults
            are settings.
        settings: what the YAML writes for them.
        key: the dotted key, for messages.
        other_keys: keys that the caller reads itself, offered for a misspelt one.

    Raises:
        UserError: a setting is wrong, or the class raises an error.
    """
    if not callable(entry):
        raise UserError(f"{key}: {entry!r} is neither a function nor a class.")
    try:
        if isinstance(entry, type) and is_dataclass(entry):
            return build(entry, settings, key, other_keys)
        arguments = vars(build(arguments_class(entry), settings, key, other_keys))
        if isinstance(entry, type):
            return entry(**arguments)
        return partial(entry, **arguments) if arguments else entry
    except UserError:
        raise
    # A user's class may raise anything, or end the program. The message names the key.
    except (Exception, SystemExit) as error:
        raise UserError(f"{key} cannot be made: {type(error).__name__}: {error}") from error


def arguments_class(entry: Callable[..., object]) -> type["DataclassInstance"]:
    """Return a dataclass of a function's arguments with defaults, or of all a class's arguments."""
    is_class = inspect.isclass(entry)
    try:
        hints = get_type_hints(entry.__init__ if is_class else entry, include_extras=True)
    except (NameError, TypeError):  # a name that only a type checker knows, or no annotations
        hints = {}
    required, optional = [], []
    for parameter in inspect.signature(entry).parameters.values():
        kind, default = hints.get(parameter.name, Any), parameter.default
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        # It cannot be bound by its name, so it keeps its default.
        if parameter.kind is parameter.POSITIONAL_ONLY and not is_class:
            continue
        if default is not parameter.empty:
            # A factory, because a dataclass refuses a default that can be changed, such as a list.
            factory = partial(same, default)
            optional.append((parameter.name, kind, field(default_factory=factory)))
        elif is_class:
            required.append((parameter.name, kind))
    return dataclasses.make_dataclass("Arguments", [*required, *optional])


def same(value: object) -> object:
    """Return the argument."""
    return value


def settings_of(value: object) -> dict[str, object]:
    """Return the fields of a dataclass, or the arguments bound to a function."""
    if isinstance(value, partial):
        return value.keywords
    if is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return {}
