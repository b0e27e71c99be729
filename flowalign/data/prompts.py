"""Prompt files, and which prompts a step takes: a pure function of the step."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from flowalign.errors import similar_file, UserError


@dataclass(frozen=True)
class Prompt:
    """A prompt and what its file says about it."""

    text: str
    metadata: dict[str, Any] = field(default_factory=dict)


def read_prompts(path: str | Path, key: str = "data.prompts") -> list[Prompt]:
    """Prompts of a `.txt` (one a line) or `.jsonl` file (objects with `prompt`). UserError names the file and the line."""
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(
            f"{key}: {path} is neither a .txt nor a .jsonl file; write one of these, with a prompt a line."
        )
    if path.suffix == ".txt":
        prompts = [Prompt(line.strip()) for line, _ in _lines(path, key)]
    else:
        prompts = [_prompt_of(found, where) for found, where in read_objects(path, key)]
    if not prompts:
        raise UserError(f"{key}: {path} has no prompts; write one a line.")
    return prompts


def read_objects(path: Path, key: str) -> list[tuple[dict[str, Any], str]]:
    """The objects of a `.jsonl` file, each with the words that name its line in an error."""
    objects = []
    for line, where in _lines(path, key):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON: {error}") from None
        objects.append((found if isinstance(found, dict) else {}, where))
    return objects


def _lines(path: Path, key: str) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise UserError(f"{key}: there is no file {path}.{similar_file(path)}") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{key}: {path} cannot be read: {error}; give a file of text, saved as UTF-8."
        ) from None
    return [
        (line, f"{key}: {path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]


def _prompt_of(found: dict[str, Any], where: str) -> Prompt:
    if not isinstance(found.get("prompt"), str):
        raise UserError(f'{where} has no "prompt"; write for example {{"prompt": "a red circle"}}.')
    return Prompt(
        found["prompt"], {name: value for name, value in found.items() if name != "prompt"}
    )


def prompts_of_step(count: int, step: int, size: int, seed: int) -> list[int]:
    """`size` indices of `count` prompts for this step: every prompt comes once before any comes again."""
    first = step * size
    order: dict[int, list[int]] = {}
    chosen = []
    for position in range(first, first + size):
        lap, place = divmod(position, count)
        if lap not in order:
            order[lap] = Random(f"{seed}/{lap}").sample(range(count), count)
        chosen.append(order[lap][place])
    return chosen
