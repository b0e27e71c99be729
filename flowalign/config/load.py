"""Load a configuration: YAML and overrides, merged, filled in, and checked section by section.

Sections without tensors come first. What needs torch is imported only after they are right, so that
a misspelt key is answered in a second.
"""

import dataclasses
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from flowalign.bundled import locate
from flowalign.config.changes import changes_from
from flowalign.config.paths import absolute_files, belongs_to_run, locate_files, started_in
from flowalign.config.sections import (
    Config,
    Data,
    DEFAULTS,
    Distributed,
    Evaluation,
    PlainSections,
    Train,
)
from flowalign.data.source import data_source
from flowalign.errors import did_you_mean, naming, UserError
from flowalign.rewards.registry import checked_rewards
from flowalign.settings.merging import (
    check_written,
    escape,
    interpolate,
    merge,
    overridden,
    Section,
)
from flowalign.settings.types import build
from flowalign.settings.yaml_files import parse_yaml, read_yaml
from flowalign.tracking.registry import checked_tracking

OTHER_FIELDS = ("raw", "notes", "changes")
SECTIONS = tuple(f.name for f in dataclasses.fields(Config) if f.name not in OTHER_FIELDS)
REQUIRED = ("model", "data")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read, merge and check a configuration. No weights are loaded.

    Args:
        path: a YAML file; one that comes with flowalign may be named `tiny/crd.yaml`. That of a
            run folder has this folder as its output.
        overrides: settings as `section.key=value`, which replace those of the file.

    Raises:
        UserError: something in it cannot work. The message names the file, the key and the fix.
    """
    path = Path(locate(str(path)))
    file = read_yaml(path)
    values, folders = file.values, file.folders
    if belongs_to_run(path):
        # The folder may have been moved, or be named from another working directory.
        folder = path.parent if path.parent.name else path.absolute().parent
        values["output"] = escape(str(folder))
        for origin in started_in(path.parent):
            folders = (*folders, origin)
            # Before the working directory, which may hold other files of these names.
            if origin != Path.cwd().resolve():
                values = absolute_files(values, origin)
    with naming(path):
        values = overridden(values, list(overrides or ()), parse_yaml)
        config = build_config(values, path, folders)
    if not belongs_to_run(path):
        config.changes = changes_from(*(file.parent or (path, file.values)), values)
    return config


def build_config(values: Section, path: Path, folders: Sequence[Path] = ()) -> Config:
    """Return a configuration with every section typed and checked.

    Args:
        values: the sections, without defaults.
        path: the file; its name is the default name of the run folder.
        folders: where relative paths are looked up, after the working directory.
    """
    # Names first: a misspelt section must not be answered as one that is missing.
    check_names(values)
    # Before the merge, in which a default would take the place of `???`.
    check_written(values)
    values = interpolate(merge(DEFAULTS, values))
    values = locate_files(values, folders)
    check_sources(values)
    evaluation = build(Evaluation, values.get("evaluation", {}), "evaluation")
    if evaluation.rewards:
        evaluation.rewards = checked_rewards(evaluation.rewards, "evaluation.rewards")
    plain = PlainSections(
        data=build(Data, values["data"], "data"),
        train=build(Train, values.get("train", {}), "train"),
        rewards=checked_rewards(values.get("rewards", {}), "rewards"),
        evaluation=evaluation,
        distributed=build(Distributed, values.get("distributed", {}), "distributed"),
        tracking=checked_tracking(values.get("tracking", {})),
        output=check_output(values.get("output", str(Path("outputs") / path.stem))),
    )
    # Importing torch takes seconds, so it waits until the sections above are right.
    from flowalign.config.build import build_objects

    return build_objects(values, plain)


def check_names(values: Section) -> None:
    """Refuse a section that does not exist, and name one that is missing."""
    for key in values:
        if key == "extends":
            raise UserError("Key 'extends' is not a section. It belongs in the file.")
        if key not in SECTIONS:
            nearest = did_you_mean(key, [*SECTIONS, "extends"])
            raise UserError(
                f"Key {key!r} is not a section.{nearest} The sections are {', '.join(SECTIONS)}."
            )
    for key in REQUIRED:
        if key not in values:
            raise UserError(f"the section {key!r} is missing; write {key}: {{...}}.")


def check_sources(values: Section) -> None:
    """Refuse prompts and pairs that are neither a path nor a mapping with one."""
    for name in ("data", "evaluation"):
        section = values.get(name)
        for key in ("prompts", "pairs"):
            if isinstance(section, dict) and key in section:
                data_source(section[key], f"{name}.{key}")


def check_output(output: object) -> str:
    """Return the run folder, with `~` expanded. UserError if it cannot be a folder."""
    if not isinstance(output, str) or not output:
        raise UserError(
            f"output is {output!r}; write a folder, such as outputs/first, in quotes if it looks "
            "like a number."
        )
    output = os.path.expanduser(output)
    # os.stat and not Path.is_dir, which takes a name that is too long for a missing folder.
    try:
        possible = stat.S_ISDIR(os.stat(output).st_mode)
    except (FileNotFoundError, PermissionError):
        possible = True  # the run folder is made later, where permissions are reported
    except (OSError, ValueError):
        possible = False
    if not possible:
        raise UserError(
            f"output is {output!r}, which cannot be a folder; write another, such as outputs/first."
        )
    return output
