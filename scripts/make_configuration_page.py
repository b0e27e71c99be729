"""Write docs/configuration.md and the settings tables of docs/objectives/.

    python scripts/make_configuration_page.py

Everything comes from the dataclasses that check a YAML file: keys, types, ranges, defaults, and
the docstring under each field. A test compares the pages with what this script would write, so
run it after a change of a setting.
"""

import dataclasses
import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints, Literal, Union

from pydantic.fields import FieldInfo

from flowalign.advantages import ADVANTAGES
from flowalign.bundled import ROOT as PACKAGE_ROOT
from flowalign.config.schema import field_docs, summary
from flowalign.config.sections import Data, Distributed, Evaluation, Train
from flowalign.data.source import DataSource
from flowalign.dynamics import DYNAMICS
from flowalign.models import MODELS
from flowalign.models.config import ModelConfig
from flowalign.models.families import family_of
from flowalign.objectives import OBJECTIVES
from flowalign.policy import Sampler
from flowalign.rewards import REWARDS
from flowalign.rewards.combine import COMBINE
from flowalign.settings.by_name import imported
from flowalign.tracking import TRACKERS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
UNBOUNDED = 1e5
"""Upper limits from here on only stop typing errors; the page leaves them out."""
SIMPLE_TYPES = {
    bool: "true or false",
    int: "integer",
    float: "number",
    str: "text",
    type(None): "none",
}
LIMITS = {"gt": "above {}", "ge": "{} or more", "lt": "below {}", "le": "at most {}"}
"""How the limits of a number are written, by their names in annotations."""
TABLE = re.compile(r"(<!-- settings: (\w+) -->\n).*?(<!-- end of settings -->\n)", re.DOTALL)

HEAD = """# Configuration

<!-- Written by scripts/make_configuration_page.py. Edit the docstrings of the settings instead. -->

A run is one YAML file. It says only what differs from the defaults on this page.

```yaml
extends: base/tiny-sd3.yaml
objective: {name: flow_grpo, clip_range: 2e-3}
rewards: {scene_match_graded: 1.0}
```

`model` and `data` are required, and `rewards` when images are scored. All other sections have
defaults. [Writing a YAML file](writing-yaml.md) explains `extends`, overrides and names.
"""

OBJECTIVE = """## objective

The rule by which the model learns. Default: `{name: flow_grpo}`. [Your own](your-own-objective.md)
is named by its path: `my_file.py:MyObjective`. Each built-in one has a page with its settings:

"""

REWARDS_SECTION = """## rewards

A mapping of names to weights, or to `{weight: 1.0, ...}` with the reward's own settings: see
[rewards](rewards.md). Under a name of your choice, `{reward: NAME, ...}` says which reward it is.
"""

ADVANTAGE_NOTE = """
`epsilon` is added to the deviation. Advantages are cut to [-`clip`, `clip`]. `std` says whether
the deviation is that of the prompt's images or of all images of the step.
""".lstrip()

STOP_NOTE = """A rule of `stop` has one or more of `above`, `below`, `falling` and `rising`: see
[over-optimisation](reliability.md#over-optimisation).
"""

SOURCES = """### Files, folders and data sets

`prompts` and `pairs` are a path, such as `my_prompts.csv` or `owner/name` for a data set of the
Hugging Face hub, or a mapping with details, such as
`{path: owner/name, split: train, columns: {prompt: caption}}`:

"""

TRACKING = """## tracking

Where a run is recorded, besides `metrics.jsonl` and TensorBoard: names, such as `[wandb, mlflow]`,
or names with settings, such as `{wandb: {project: my_project}}`. Default: nowhere else.
[Your own](running.md#your-own-tracker) is named by its path: `my_tracker.py:MyTracker`.

"""

OUTPUT = """## output

The run folder. Default: `outputs/` and the name of the YAML file without its ending.
[Running](running.md) lists its files.
"""


@dataclass(frozen=True)
class Setting:
    """One key of a section, as a reader sees it."""

    name: str
    kind: str
    default: str
    meaning: str


def main() -> None:
    """Write every page whose text has changed."""
    for path, text in pages().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"Wrote {path.relative_to(ROOT)}")


def pages() -> dict[Path, str]:
    """Every page that holds generated text, as it should be."""
    texts = {DOCS / "configuration.md": configuration_page()}
    for name in OBJECTIVES:
        path = DOCS / "objectives" / f"{name}.md"
        texts[path] = with_settings_table(path.read_text(encoding="utf-8"))
    return texts


def configuration_page() -> str:
    """The whole of docs/configuration.md."""
    objectives = [f"- [`{name}`](objectives/{name}.md)" for name in OBJECTIVES]
    sections = [
        section("model", ModelConfig),
        *(family_settings(name) for name in MODELS),
        section("sampler", Sampler, skip=("dynamics",)),
        alternatives("sampler.dynamics", DYNAMICS),
        "`eta` scales the noise of a step. The last step has none.\n",
        OBJECTIVE + "\n".join(objectives) + "\n",
        alternatives("advantage", ADVANTAGES),
        ADVANTAGE_NOTE,
        REWARDS_SECTION,
        reward_settings(),
        alternatives("combine", COMBINE),
        section("data", Data),
        SOURCES + "\n".join(entry(row) for row in settings(DataSource)) + "\n",
        "[Preference data](preference-data.md) describes the formats of `pairs`.\n",
        section("train", Train),
        STOP_NOTE,
        section("evaluation", Evaluation),
        section("distributed", Distributed),
        TRACKING + "\n".join(map(tracker_settings, TRACKERS)) + "\n",
        OUTPUT,
    ]
    return "\n".join(filter(None, [HEAD, *sections]))


def section(name: str, cls: type, skip: tuple[str, ...] = ()) -> str:
    """A heading, the dataclass's own docstring, and a list of its settings."""
    rows = [entry(row) for row in settings(cls) if row.name.partition(".")[0] not in skip]
    return f"## {name}\n\n{one_line(summary(cls))}\n\n" + "\n".join(rows) + "\n"


def family_settings(name: str) -> str:
    """Settings that a model family adds to the section `model`, or an empty text."""
    family = family_of(name)
    shared = {row.name for row in settings(ModelConfig)}
    rows = [entry(row) for row in settings(family.Config) if row.name not in shared]
    if not rows:
        return ""
    return f"Models of the family `{name}` also have:\n\n" + "\n".join(rows) + "\n"


def alternatives(key: str, table: Mapping[str, object]) -> str:
    """A heading, and for every built-in name what it is and its settings."""
    lines = []
    for name, value in table.items():
        lines.append(f"- `{{name: {name}}}`: {about(value)}")
        lines += [f"    {entry(row)}" for row in all_settings(value)]
    return f"## {key}\n\n" + "\n".join(lines) + "\n"


def reward_settings() -> str:
    """The settings of every built-in reward that has some."""
    lines = []
    for name, place in REWARDS.items():
        reward = imported(place, f"rewards.{name}", REWARDS)
        rows = [f"    {entry(row)}" for row in all_settings(reward)]
        if rows:
            lines += [f"- `{name}`: {about(reward)}", *rows]
    return "### Settings of built-in rewards\n\n" + "\n".join(lines) + "\n"


def tracker_settings(name: str) -> str:
    """A built-in tracker: what it is and its settings."""
    tracker = imported(TRACKERS[name], f"tracking.{name}", TRACKERS)
    rows = [f"    {entry(row)}" for row in all_settings(tracker)]
    return "\n".join([f"- `{name}`: {about(tracker)}", *rows])


def about(value: object) -> str:
    """The first paragraph of a docstring, as the description of a thing."""
    text = one_line(summary(value))
    # The docstring of a function says what it does; the page says what it is.
    return text.removeprefix("Return ")[:1].upper() + text.removeprefix("Return ")[1:]


def all_settings(value: object) -> list[Setting]:
    """The settings of a dataclass, or the arguments of a function that have defaults."""
    if inspect.isclass(value):
        return list(settings(value))
    assert callable(value)
    return list(arguments(value))


def entry(row: Setting) -> str:
    """A setting as an item of a list."""
    need = f"default {row.default}" if row.default else "required"
    return f"- `{row.name}`: {row.kind}, {need}. {row.meaning}".rstrip()


def with_settings_table(page: str) -> str:
    """The page of an objective with the table between its two markers written anew."""

    def replace(match: re.Match[str]) -> str:
        head, name, end = match.groups()
        objective = imported(OBJECTIVES[name], "objective.name", OBJECTIVES)
        # The objective's own settings first, then the groups that it shares with others.
        by_group = sorted(settings(objective), key=lambda row: "." in row.name)
        rows = [f"| `{row.name}` | {row.default} | {table_cell(row)} |" for row in by_group]
        lines = ["| setting | default | meaning |", "|---|---|---|", *rows]
        return head + "\n".join(lines) + "\n" + end

    return TABLE.sub(replace, page)


def table_cell(row: Setting) -> str:
    """The meaning; for a choice, the choices too."""
    choices = f"O{row.kind[1:]}." if row.kind.startswith("one of") else ""
    return " ".join(filter(None, [row.meaning, choices])).replace("|", "\\|")


def settings(cls: type, prefix: str = "") -> Iterator[Setting]:
    """The settings of a dataclass, those of nested dataclasses with dotted names."""
    yield from _settings(cls, prefix, {})


def _settings(cls: type, prefix: str, values: dict[str, object]) -> Iterator[Setting]:
    hints, meanings = get_type_hints(cls, include_extras=True), field_docs(cls)
    for f in dataclasses.fields(cls):
        if not f.init:
            continue
        default = values.get(f.name, default_of(f))
        if dataclasses.is_dataclass(default) and not isinstance(default, type):
            # Nested sections show the defaults that this section gives them, not their own.
            yield from _settings(type(default), f"{prefix}{f.name}.", vars(default))
        else:
            yield Setting(
                name=f"{prefix}{f.name}",
                kind=kind_words(hints[f.name]),
                default="" if default is dataclasses.MISSING else yaml_words(default),
                meaning=one_line(meanings.get(f.name, "")),
            )


def default_of(f: "dataclasses.Field[object]") -> object:
    """The default of a field, or `dataclasses.MISSING` for a required one."""
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return f.default


def arguments(function: Callable[..., object]) -> Iterator[Setting]:
    """The arguments of a function that have defaults, as settings."""
    hints = get_type_hints(function, include_extras=True)
    for parameter in inspect.signature(function).parameters.values():
        if parameter.default is not parameter.empty:
            yield Setting(
                name=parameter.name,
                kind=kind_words(hints[parameter.name]),
                default=yaml_words(parameter.default),
                meaning="",
            )


def kind_words(kind: object) -> str:
    """A type in plain words: `integer, 1 or more`."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        base, *metadata = inner
        return f"{kind_words(base)}{range_words(metadata)}"
    if origin is Literal:
        return "one of " + ", ".join(f"`{choice}`" for choice in inner)
    if origin is Union or type(kind).__name__ == "UnionType":
        return " or ".join(kind_words(part) for part in inner)
    if origin is list:
        return f"list of {kind_words(inner[0])}"
    if origin is tuple:
        return f"list of {len(inner)} {kind_words(inner[0])}s"
    if origin is dict:
        return "mapping"
    return SIMPLE_TYPES.get(kind, "text")


def range_words(metadata: list[object]) -> str:
    """The limits of a number, with a leading space or comma."""
    # pydantic's Field() wraps the limits, and annotated_types writes them alone.
    parts = itertools.chain.from_iterable(
        entry.metadata if isinstance(entry, FieldInfo) else [entry] for entry in metadata
    )
    limits: dict[str, float] = {}
    for part in parts:
        limits |= {name: getattr(part, name) for name in LIMITS if hasattr(part, name)}
    # An upper limit of a million is there to catch typing errors; readers do not need it.
    limits = {name: limit for name, limit in limits.items() if abs(limit) < UNBOUNDED}
    if set(limits) == {"ge", "le"}:
        return f" from {limits['ge']} to {limits['le']}"
    return "".join(f", {LIMITS[name].format(limit)}" for name, limit in limits.items())


def yaml_words(value: object) -> str:
    """A default as it would be written in YAML."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, float) and math.isinf(value):
        return "`.inf`" if value > 0 else "`-.inf`"
    if isinstance(value, tuple | list):
        return f"`{list(value)}`" if value else "empty"
    # Defaults under assets/ are absolute paths on the machine that writes the page.
    text = str(value).removeprefix(f"{PACKAGE_ROOT}/")
    return f"`{text}`" if value or value == 0 else "empty"


def one_line(text: str) -> str:
    """The text without line breaks, ending with a full stop. Angle brackets are not tags."""
    text = " ".join(text.split()).replace("<", "&lt;")
    return text if not text or text.endswith((".", "?", "!")) else f"{text}."


if __name__ == "__main__":
    main()
