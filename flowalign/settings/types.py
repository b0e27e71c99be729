"""Settings: dataclasses and functions whose annotations say what may be written in a YAML file; pydantic holds it to them."""

import dataclasses
import inspect
import math
from collections.abc import Callable
from dataclasses import field, is_dataclass
from functools import cache, partial
from typing import Annotated, Any, ClassVar, get_args, get_type_hints

from pydantic import ConfigDict, Field, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, PydanticSerializationError, to_json

from flowalign.errors import did_you_mean, UserError

MANY = 10**6
Count = Annotated[int, Field(ge=1, le=MANY)]
CountOrZero = Annotated[int, Field(ge=0, le=MANY)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Guidance = Annotated[float, Field(ge=1, le=100)]
Unbounded = Annotated[float, Field(ge=-math.inf, allow_inf_nan=True)]
"""Also infinite."""
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)


class WrongSetting(UserError, ValueError):
    """The message begins with the setting's name; `build` says where it stands."""


class Settings:
    """A base of dataclasses: what is not left at its default must be of its type. WrongSetting otherwise."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]  its subclasses are dataclasses
            if f.init and (value := getattr(self, f.name)) is not f.default:
                try:
                    adapter(type(self)).validator.validate_assignment(self, f.name, value)
                except ValidationError as error:
                    raise WrongSetting(
                        f"{f.name} is {value!r}; {advice(error.errors()[0])}"
                    ) from None


@cache
def adapter(cls: Any) -> TypeAdapter[Any]:
    if not issubclass(cls, Settings):
        cls.__pydantic_config__ = STRICT
    return TypeAdapter(cls)


def build(cls: Any, section: Any, key: str, beside: tuple[str, ...] = ()) -> Any:
    """A dataclass from a mapping: types and ranges checked, unknown keys answered with the nearest of its own and `beside`."""
    no_default = dataclasses.MISSING
    defaults = {
        f.name: f.default if f.default_factory is no_default else f.default_factory()
        for f in dataclasses.fields(cls)
    }
    written = {  # a default may be what else cannot be written, such as infinity
        name: over(defaults.get(name), value)
        for name, value in mapping(section, key).items()
        if name not in defaults or repr(value) != repr(defaults[name])
    }
    try:  # as JSON, whose lists and mappings strict pydantic takes for tuples and dataclasses
        return adapter(cls).validate_json(to_json(written, inf_nan_mode="constants"))
    except ValidationError as error:
        raise UserError(refusal(error, cls, key, beside)) from None
    except PydanticSerializationError as error:
        raise UserError(
            f"{key} cannot be read: {error}; write text, numbers, lists and mappings."
        ) from None
    except PydanticUserError:
        raise UserError(
            f"{key}: the types of {cls.__name__}'s fields are not all imported when it runs; import them."
        ) from None


def over(default: Any, value: Any) -> Any:
    """A section over the dataclass that is its default; anything else as it stands."""
    if not is_dataclass(default) or not isinstance(value, dict):
        return value
    rest: dict[str, Any] = dataclasses.asdict(default)  # pyright: ignore[reportArgumentType]  no class, but an instance
    return rest | {name: over(getattr(default, name, None), entry) for name, entry in value.items()}


def refusal(error: ValidationError, cls: Any, key: str, beside: tuple[str, ...]) -> str:
    """One sentence on what is wrong, first of all on a key that is not known."""
    first = min(error.errors(), key=lambda one: one["type"] != "unexpected_keyword_argument")
    *above, last = [key, *map(str, first["loc"])]
    section, place = ".".join(above), ".".join([*above, last])
    if first["type"] == "unexpected_keyword_argument":
        for part in above[1:]:
            cls, beside = dataclass_in(get_type_hints(cls).get(part)) or cls, ()
        known = [*beside, *(f.name for f in dataclasses.fields(cls) if f.init)]
        return f"Key {place} is not known.{did_you_mean(last, known)} {section} has {', '.join(known) or 'no settings'}."
    if first["type"] == "missing":
        return f"{place} is missing; write it as {section}: {{{last}: ...}}."
    if first["type"] == "value_error":
        cause = first.get("ctx", {})["error"]
        own = isinstance(cause, WrongSetting)
        return (
            f"{place}.{cause}"
            if own
            else f"{place} cannot be made: {type(cause).__name__}: {cause}"
        )
    inner = cls
    for part in first["loc"] if first["type"] == "dataclass_type" else ():
        inner = dataclass_in(get_type_hints(inner).get(str(part))) or inner
    if inner is not cls:
        fields = ", ".join(f"{f.name}: ..." for f in dataclasses.fields(inner) if f.init)
        return f"{place} is {first['input']!r}; it must be a mapping: write one or more of {place}: {{{fields}}}."
    return f"{place} is {first['input']!r}; {advice(first)}"


def advice(error: ErrorDetails) -> str:
    """What to write instead, in pydantic's words where they will do."""
    details = error.get("ctx", {})
    if error["type"] == "literal_error":
        choices = details["expected"].replace("'", "").replace(" or ", ", ")
        return f"choose from {choices}.{did_you_mean(error['input'], choices.split(', '))}"
    if error["type"] == "too_long":
        return f"write a list of {details['max_length']}."
    text = (
        error["msg"]
        .replace("Input should", "it must")
        .replace("an object", "a mapping")
        .replace("valid array", "list")
    )
    return text.replace("a valid string", "text, in quotes where it looks like a number") + "."


def dataclass_in(kind: Any) -> Any:
    """The dataclass that a type holds, itself or inside, or None."""
    return (
        kind if is_dataclass(kind) else next(filter(None, map(dataclass_in, get_args(kind))), None)
    )


def mapping(section: Any, key: str) -> dict[str, Any]:
    """A section. UserError where it is none, or a value would have to be filled in."""
    if not isinstance(section, dict):
        raise UserError(f"{key} is {section!r}; write its settings as {key}: {{...}}.")
    for name, value in section.items():
        if isinstance(value, str) and "${" in value:
            raise UserError(
                f"{key}.{name} is {value!r}; values are taken as they stand, ${{...}} is not filled in."
            )
    return {str(name): value for name, value in section.items()}


def configure(entry: Any, settings: dict[str, Any], key: str, beside: tuple[str, ...] = ()) -> Any:
    """An instance of a class, or a function with its keyword settings bound. UserError when that cannot be."""
    if not callable(entry):
        raise UserError(f"{key}: {entry!r} is neither a function nor a class.")
    try:
        if inspect.isclass(entry) and is_dataclass(entry):
            return build(entry, settings, key, beside)
        arguments = vars(build(_arguments(entry), settings, key, beside))
        return (
            entry(**arguments)
            if inspect.isclass(entry)
            else partial(entry, **arguments)
            if arguments
            else entry
        )
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{key} cannot be made: {type(error).__name__}: {error}") from error


def settings_of(value: Any) -> dict[str, Any]:
    """The fields of a dataclass, or the arguments bound to a function."""
    if isinstance(value, partial):
        return value.keywords
    return dataclasses.asdict(value) if is_dataclass(value) and not isinstance(value, type) else {}


def _arguments(entry: Callable[..., Any]) -> type:
    """A dataclass of a function's arguments that have defaults, and of all that a class is made with."""
    try:
        kinds = get_type_hints(
            entry.__init__ if inspect.isclass(entry) else entry, include_extras=True
        )
    except (NameError, TypeError):  # a name that only a type checker sees, or no types
        kinds = {}
    settings = [
        p
        for p in inspect.signature(entry).parameters.values()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    required = [
        (p.name, kinds.get(p.name, Any))
        for p in settings
        if p.default is p.empty and inspect.isclass(entry)
    ]
    others = [
        (p.name, kinds.get(p.name, Any), field(default_factory=lambda default=p.default: default))
        for p in settings
        if p.default is not p.empty
    ]
    return dataclasses.make_dataclass("Arguments", [*required, *others])
