"""The exported adapter, read by diffusers without this package."""

import sys

from safetensors.torch import load_file, save_file

from flowalign.runs.adapter import save_adapter
from flowalign.training import trainer
from tests.processes import run_process
from tests.tiny import make_policy, small_config, stir, two_groups

DIFFUSERS_ALONE = """
import sys
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

adapter, noise, pictures, *prompts = sys.argv[1:]
pipe = StableDiffusion3Pipeline.from_pretrained(
    "assets/tiny-sd3", text_encoder_3=None, tokenizer_3=None
)
pipe.load_lora_weights(adapter)
images = pipe(
    prompts,
    latents=load_file(noise)["noise"],
    num_inference_steps=4,
    guidance_scale=1.0,
    height=64,
    width=64,
    max_sequence_length=0,
    output_type="pt",
).images
save_file({"images": images}, pictures)
assert "flowalign" not in sys.modules
"""


def test_diffusers_alone_makes_our_pictures_from_the_adapter(tmp_path):
    policy = make_policy()
    stir(policy)
    save_adapter(policy, tmp_path / "adapter")
    batch = two_groups(policy, 1)
    path = policy.at("policy").generate(batch).x
    save_file({"noise": path[:, 0].clone()}, tmp_path / "noise.safetensors")
    files = [
        str(tmp_path / name) for name in ("adapter", "noise.safetensors", "images.safetensors")
    ]
    run_process([sys.executable, "-c", DIFFUSERS_ALONE, *files, *batch.prompts])
    images = load_file(tmp_path / "images.safetensors")["images"]
    assert (policy.decode(path[:, -1]) - images).abs().max() <= 1e-4


def test_the_lines_of_the_adapters_readme_run(tmp_path):
    trainer.train(small_config(tmp_path / "run", "train.steps=1"))
    readme = (tmp_path / "run" / "adapter" / "README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    run_process([sys.executable, "-c", code.replace("picture.png", str(tmp_path / "picture.png"))])
    assert (tmp_path / "picture.png").exists()
