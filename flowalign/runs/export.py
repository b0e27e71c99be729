"""Export the trained adapter with a README that loads it."""

from pathlib import Path

from flowalign.config.sections import Config
from flowalign.data.preferences import read_examples
from flowalign.data.prompts import read_prompts
from flowalign.files import write_folder
from flowalign.policy import Policy
from flowalign.runs.adapter import save_adapter


def export_adapter(policy: Policy, folder: Path, weights: str, config: Config) -> None:
    """The adapter folder, with a README that loads it in diffusers."""
    sampler = config.evaluation_sampler
    extra = "".join(
        f", {name}=None"
        for name in ("text_encoder_3", "tokenizer_3")
        if policy.model.pipe.components.get(name, name) is None
    )
    guidance = sampler.guidance if config.model.name == "sd3" else sampler.embedded_guidance
    pipeline = policy.model.pipeline_class.__name__
    dtype, move = (
        ("", "")
        if config.model.dtype == "float32"
        else (f", dtype=torch.{config.model.dtype}", '.to("cuda")')
    )
    call = (
        f"num_inference_steps={sampler.steps}, guidance_scale={guidance}, height={config.model.height}, "
        f"width={config.model.width}, max_sequence_length={config.model.max_sequence_length}"
    )
    readme = f"""# A LoRA adapter for {config.model.path}

```python
{"import torch" + chr(10) if dtype else ""}from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained({config.model.path!r}{extra}{dtype}){move}
pipe.load_lora_weights("{folder}")
pipe({first_prompt(config)!r}, {call}).images[0].save("picture.png")
```
"""

    def write(beside: Path) -> None:
        save_adapter(policy, beside, weights)
        (beside / "README.md").write_text(readme)

    write_folder(folder, write)


def first_prompt(config: Config) -> str:
    """A prompt for the README."""
    path = config.evaluation.prompts or config.data.prompts
    return (
        read_prompts(path)[0].text
        if path
        else read_examples(config.data.pairs, "data.pairs", paired=False)[0].prompt.text
    )
