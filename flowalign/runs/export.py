"""Results of a finished run: the adapter, the summary, the pictures and the report."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from flowalign.bundled import portable
from flowalign.config.sections import Config
from flowalign.data.preferences import read_examples
from flowalign.data.prompts import read_prompts
from flowalign.files import to_json, write_file, write_folder
from flowalign.policy import Policy
from flowalign.reporting.html import write_report
from flowalign.reporting.images import save_sheet
from flowalign.reporting.summary import Summary
from flowalign.runs.adapter import save_adapter
from flowalign.runs.adapter_card import card_head

ADAPTER = "adapter"
"""Name of the exported adapter's folder in a run folder."""
PICTURES = Path("pictures") / "before-after.png"
README = """# A LoRA adapter for {path}

```python
{torch}from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained({path!r}{loading}){move}
pipe.load_lora_weights("{folder}")
pipe({prompt!r}{calling}).images[0].save("picture.png")
```
"""
README_WITHOUT_PIPELINE = """# A LoRA adapter for {path}

It belongs to the model family `{name}`, which diffusers does not load.
`model.load_adapter` of that family reads it from `{folder}`.
"""


def write_summary(run: Path, summary: Summary) -> None:
    """Write `summary.json`."""
    write_file(run / "summary.json", to_json(summary, indent=2).encode())


def write_results(
    run: Path, summary: Summary, pictures: Mapping[str, Tensor], captions: Sequence[str]
) -> None:
    """Write the sheet of pictures, `summary.json` and `report.html`.

    Args:
        run: The run folder.
        summary: The content of `summary.json`.
        pictures: Pictures (B, 3, H, W) in bytes by the label of their row.
        captions: One text per column of pictures.
    """
    save_sheet(pictures, captions, run / PICTURES)
    write_summary(run, summary)
    write_report(run, summary, captions)


def export_adapter(policy: Policy, folder: Path, weights: str, config: Config) -> None:
    """Write an adapter as a LoRA for diffusers, with a README that loads it.

    Args:
        policy: The policy that owns the adapter.
        folder: The target, which is replaced as a whole.
        weights: The adapter: "policy" or a snapshot such as "ema".
        config: The configuration of the run.
    """
    # Built before anything is written: if it fails, the old export stays.
    readme = adapter_readme(policy, folder, config)

    def write(unfinished: Path) -> None:
        save_adapter(policy, unfinished, weights)
        card = card_head(portable(config.model.path)) + readme
        (unfinished / "README.md").write_text(card, encoding="utf-8")

    write_folder(folder, write)


def adapter_readme(policy: Policy, folder: Path, config: Config) -> str:
    """Return a README whose code makes pictures as the evaluation of the run does."""
    model, sampler = config.model, config.evaluation_sampler
    path = portable(model.path)
    call = policy.model.pipeline_call(sampler.steps, sampler.guidance, sampler.embedded_guidance)
    if call is None:
        return README_WITHOUT_PIPELINE.format(path=path, name=model.name, folder=folder)
    half = model.dtype != "float32"
    return README.format(
        path=path,
        torch="import torch\n" if half else "",
        pipeline=call.pipeline,
        loading=keywords(call.loading) + (f", dtype=torch.{model.dtype}" if half else ""),
        move='.to("cuda")' if half else "",
        folder=folder,
        prompt=first_prompt(config),
        calling=keywords(call.calling),
    )


def keywords(arguments: Mapping[str, object]) -> str:
    """Return keyword arguments as code, each after a comma."""
    return "".join(f", {name}={value!r}" for name, value in arguments.items())


def first_prompt(config: Config) -> str:
    """Return a prompt for the README."""
    path = config.evaluation.prompts or config.data.prompts
    if path:
        return read_prompts(path)[0].text
    return read_examples(config.data.pairs, "data.pairs", paired=False)[0].prompt.text
