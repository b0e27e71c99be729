"""The card of an adapter: a README with its base model and the code that loads it.

Whatever a user chose (paths, prompts, names) is written as a Python literal or as Markdown code, so
that nothing in it can become code or markup of the card.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from flowalign.bundled import portable
from flowalign.config.sections import Config
from flowalign.data.preferences import ANY, read_examples
from flowalign.data.prompts import read_prompts
from flowalign.errors import UserError
from flowalign.models.base import PipelineCall
from flowalign.models.families import family_of
from flowalign.reporting.console import format_difference, format_mean, interval_note
from flowalign.reporting.summary import baselines, guidance_note, Summary
from flowalign.settings.yaml_files import parse_yaml

EULER = "FlowMatchEulerDiscreteScheduler"
"""The scheduler of diffusers that makes pictures as training does."""
CARD, MERGED, MERGED_FOLDER = "README.md", "merged_adapters", "merged"
LICENCE = ("license", "license_name", "license_link")
"""Entries of a card that say what others may do with a model."""
WITH_PIPELINE = """# A LoRA adapter for {title}

```python
{torch}from diffusers import {classes}

pipe = {pipeline}.from_pretrained({path!r}{loading}){move}
{scheduler}{merging}pipe.load_lora_weights({folder!r})
pipe({prompt!r}{calling}).images[0].save("picture.png")
```
"""
OF_A_MODEL = """# {title} with an adapter in its weights

```python
{torch}from diffusers import {classes}

pipe = {pipeline}.from_pretrained({folder!r}{loading}){move}
{scheduler}pipe({prompt!r}{calling}).images[0].save("picture.png")
```
"""
MERGING = """pipe.load_lora_weights({folder!r}, subfolder={name!r})
pipe.fuse_lora()
pipe.unload_lora_weights()
"""
WITHOUT_PIPELINE = """# A LoRA adapter for {title}

It belongs to the model family {family}, which diffusers does not load.
`model.load_adapter` of that family reads it from {folder}.
"""


def adapter_card(config: Config, folder: Path) -> str:
    """Return the card of an adapter, whose code makes pictures as the evaluation of the run does.

    Args:
        config: The configuration of the run.
        folder: Where the adapter will stand, as the code of the card names it. Adapters that are
            merged first stand in it too, as `merged_names` says.
    """
    path, merged = portable(config.evaluation_model.path), merged_names(config)
    base = config.model.path
    head = card_head(portable(base), merged, details=_details(config, base))
    if call := _pipeline_call(config):
        merging = "".join(MERGING.format(folder=str(folder), name=name) for name in merged)
        values = _values(config, call, folder)
        return head + WITH_PIPELINE.format(path=path, merging=merging, **values)
    return head + WITHOUT_PIPELINE.format(
        title=markdown_code(path),
        family=markdown_code(config.model.name),
        folder=markdown_code(str(folder)),
    )


def model_card(config: Config, folder: Path) -> str:
    """Return the card of a model with the adapter of a run in its weights.

    `folder` is where the model will stand. The model must be a pipeline of diffusers.
    """
    call = _pipeline_call(config)
    assert call is not None
    base, tags = config.evaluation_model.path, ("text-to-image", "flowalign")
    head = card_head(portable(base), tags=tags, details=_details(config, base))
    return head + OF_A_MODEL.format(**_values(config, call, folder))


def merged_names(config: Config) -> list[str]:
    """Return where an exported adapter keeps its copies of `model.merge`, within its folder."""
    return [f"{MERGED_FOLDER}/{number}" for number in range(1, len(config.model.merge) + 1)]


def card_results(summary: Summary) -> str:
    """Return the end of a card: what training changed, against every baseline of the run."""
    columns, guided = baselines(summary), summary["baseline_guided"]
    labels = [column.label for column in columns]
    rows = [["reward", *labels, "trained", *(f"trained - {label}" for label in labels)]]
    rows.append(["---"] * len(rows[0]))
    for name in summary["difference"]:
        means = [format_mean(column.means, name) for column in columns]
        changes = [format_difference(column.difference, name) for column in columns]
        # A bar would end the cell, also in code.
        cell = markdown_code(name).replace("|", "\\|")
        rows.append([cell, *means, format_mean(summary["after"], name), *changes])
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    note = ""
    if guided:
        note = guidance_note({**guided, "chosen_by": markdown_code(guided["chosen_by"])}) + " "
    intervals = interval_note(summary["prompts"], summary["held_out"])
    return f"\n{table}\nBase is the model without the adapter. {note}{intervals}\n"


def card_head(
    model: str,
    merged: Sequence[str] = (),
    tags: Sequence[str] = ("lora", "text-to-image", "flowalign"),
    details: Mapping[str, str] | None = None,
) -> str:
    """Return the head of an adapter's README: the metadata of a model card of the hub.

    Args:
        model: The base model.
        merged: Adapters that belong to the model, because they were added to its weights.
        tags: What the hub finds it by.
        details: Further entries, such as the licence.
    """
    from huggingface_hub import ModelCardData  # takes a second, and reading a card needs none

    entries = ModelCardData(
        base_model=model,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=[*tags],
        **{**(details or {}), **({MERGED: [*merged]} if merged else {})},
    )
    # Not by its `to_yaml`, which writes every character as it is: some would be read as others.
    return f"---\n{yaml.safe_dump(entries.to_dict(), sort_keys=False)}---\n"


def _details(config: Config, base: str) -> dict[str, str]:
    """Return a prompt for the hub's pages, and the licence that the base model's own card names."""
    path = Path(base)
    entries = _entries(path) if path.is_dir() else {}
    licence = {key: entries[key] for key in LICENCE if isinstance(entries.get(key), str)}
    return {"instance_prompt": _first_prompt(config)} | {k: str(v) for k, v in licence.items()}


def markdown_code(text: str) -> str:
    """Return a text as inline code, in which Markdown and HTML have no meaning."""
    # Line breaks would end the code, and marks that reverse the reading direction would hide text.
    visible = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    runs = re.findall("`+", visible)
    if not runs:
        return f"`{visible}`"
    # Longer than any run of backticks in the text. Markdown removes one space on both sides.
    fence = "`" * (max(map(len, runs)) + 1)
    return f"{fence} {visible} {fence}"


def base_model(folder: Path) -> str | None:
    """Return the model that the card of an adapter names as `base_model`, or None."""
    model = _entries(folder).get("base_model")
    return model if isinstance(model, str) else None


def merged_adapters(folder: Path) -> list[str]:
    """Return the adapters that the card of an adapter says to merge into its model first."""
    merged = _entries(folder).get(MERGED)
    return [path for path in merged if isinstance(path, str)] if isinstance(merged, list) else []


def _entries(folder: Path) -> Mapping[str, object]:
    """Return the entries in the head of an adapter's card; none if it cannot be read."""
    card = folder / CARD
    if not card.is_file():
        return {}
    # The card of the Hugging Face hub begins with YAML between two lines of dashes.
    _, _, rest = card.read_text(encoding="utf-8", errors="replace").partition("---\n")
    header, closing, _ = rest.partition("\n---")
    try:
        # The adapter may come from a stranger, so the limits of every YAML file hold here too.
        entries = parse_yaml(header, str(card)) if closing else None
    except UserError:
        return {}
    return entries if isinstance(entries, dict) else {}


def _pipeline_call(config: Config) -> PipelineCall | None:
    model, sampler = config.evaluation_model, config.evaluation_sampler
    call = family_of(model.name).pipeline_call(
        model, sampler.steps, sampler.guidance, sampler.embedded_guidance
    )
    if not call or not sampler.negative_prompt or sampler.guidance == 1:
        return call
    negative = {"negative_prompt": sampler.negative_prompt}
    return replace(call, calling={**call.calling, **negative})


def _values(config: Config, call: PipelineCall, folder: Path) -> dict[str, str]:
    """Return what the code of a card is made of, by the names in its template."""
    model = config.evaluation_model
    half = model.dtype != "float32"
    classes, scheduler = call.pipeline, ""
    if call.scheduler is not None:
        settings = _keywords(call.scheduler).removeprefix(", ")
        classes, scheduler = f"{EULER}, {classes}", f"pipe.scheduler = {EULER}({settings})\n"
    return {
        "title": markdown_code(portable(model.path)),
        "torch": "import torch\n" if half else "",
        "classes": classes,
        "pipeline": call.pipeline,
        "scheduler": scheduler,
        "loading": _keywords(call.loading) + (f", dtype=torch.{model.dtype}" if half else ""),
        "move": '.to("cuda")' if half else "",
        "folder": str(folder),
        "prompt": _first_prompt(config),
        "calling": _keywords(call.calling),
    }


def _keywords(arguments: Mapping[str, object]) -> str:
    """Return keyword arguments as code, each after a comma."""
    return "".join(f", {name}={value!r}" for name, value in arguments.items())


def _first_prompt(config: Config) -> str:
    path = config.evaluation.prompts or config.data.prompts
    if path:
        return read_prompts(path)[0].text
    return read_examples(config.data.pairs, "data.pairs", ANY)[0].prompt.text
