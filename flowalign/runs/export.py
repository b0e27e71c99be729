"""Results of a finished run: the adapter, the summary, the pictures and the report."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from flowalign.config.sections import Config
from flowalign.data.preferences import read_examples
from flowalign.data.prompts import read_prompts
from flowalign.evaluation.results import EvaluationResult
from flowalign.files import to_json, write_file, write_folder
from flowalign.policy import Policy
from flowalign.reporting.html import write_report
from flowalign.reporting.images import save_before_after
from flowalign.runs.adapter import save_adapter

ADAPTER = "adapter"
"""Name of the exported adapter's folder in a run folder."""
PICTURES = Path("pictures") / "before-after.png"


class Summary(TypedDict):
    """The content of `summary.json`."""

    before: dict[str, float]
    """Mean of every reward and held-out figure without the adapter."""
    after: dict[str, float]
    """The same with the exported weights; empty for an interrupted run."""
    difference: dict[str, tuple[float, float, float]]
    """Low end, mean and high end of the 95 % interval of the paired difference."""
    images: int
    """Images that were generated for training."""
    seconds: float
    """Seconds spent in training steps."""
    peak_memory_bytes: int
    """Most bytes in use: allocated on a GPU, resident on a CPU."""
    stopped: str
    """Why training ended: "finished", "interrupted" or the rule of train.stop."""
    weights: str
    """The exported weights: "policy" or "ema"."""
    step: int
    """The training step of the exported weights."""


def write_summary(run: Path, summary: Summary) -> None:
    """Write `summary.json`."""
    write_file(run / "summary.json", to_json(summary, indent=2).encode())


def write_results(
    run: Path,
    summary: Summary,
    before: EvaluationResult,
    after: EvaluationResult,
    captions: Sequence[str],
) -> None:
    """Write the sheet of pictures, `summary.json` and `report.html`."""
    save_before_after(before.images, after.images, captions, run / PICTURES)
    write_summary(run, summary)
    write_report(run, summary)


def export_adapter(policy: Policy, folder: Path, weights: str, config: Config) -> None:
    """Write an adapter as a LoRA for diffusers, with a README that loads it.

    Args:
        policy: The policy that owns the adapter.
        folder: The target, which is replaced as a whole.
        weights: The adapter: "policy" or a snapshot such as "ema".
        config: The configuration of the run.
    """
    readme = adapter_readme(policy, folder, config)

    def write(unfinished: Path) -> None:
        save_adapter(policy, unfinished, weights)
        (unfinished / "README.md").write_text(readme, encoding="utf-8")

    write_folder(folder, write)


def adapter_readme(policy: Policy, folder: Path, config: Config) -> str:
    """Return a README whose code makes a picture with the adapter in diffusers."""
    model, sampler, half = config.model, config.evaluation_sampler, config.model.dtype != "float32"
    pipeline = policy.model.pipeline_class
    # Parts that were not saved with the model must be named to load it, unless they are optional.
    absent = [
        name
        for name, part in policy.model.pipe.components.items()
        if part is None and name not in pipeline._optional_components
    ]
    # A pipeline with distilled guidance takes the embedded guidance as its `guidance_scale`.
    distilled = policy.model.has_distilled_guidance
    guidance = sampler.embedded_guidance if distilled else sampler.guidance
    loading = [repr(model.path), *(f"{name}=None" for name in absent)]
    loading += [f"dtype=torch.{model.dtype}"] if half else []
    settings = {
        "num_inference_steps": sampler.steps,
        "guidance_scale": guidance,
        "height": model.height,
        "width": model.width,
        "max_sequence_length": model.max_sequence_length,
    }
    call = ", ".join(f"{name}={value}" for name, value in settings.items())
    lines = [
        f"# A LoRA adapter for {model.path}",
        "",
        "```python",
        *(["import torch"] if half else []),
        f"from diffusers import {pipeline.__name__}",
        "",
        f"pipe = {pipeline.__name__}.from_pretrained({', '.join(loading)})"
        + ('.to("cuda")' if half else ""),
        f'pipe.load_lora_weights("{folder}")',
        f'pipe({first_prompt(config)!r}, {call}).images[0].save("picture.png")',
        "```",
        "",
    ]
    return "\n".join(lines)


def first_prompt(config: Config) -> str:
    """Return a prompt for the README."""
    path = config.evaluation.prompts or config.data.prompts
    if path:
        return read_prompts(path)[0].text
    return read_examples(config.data.pairs, "data.pairs", paired=False)[0].prompt.text
