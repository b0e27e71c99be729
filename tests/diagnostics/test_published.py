"""Plans of published models, from the configuration files that come with the package."""

from dataclasses import replace
from pathlib import Path

import pytest

from flowalign.config.load import load_config
from flowalign.diagnostics.meta_model import with_bundled_files
from flowalign.diagnostics.rehearsal import rehearse
from flowalign.models.families import family_of, read_model_config
from tests.tiny import ROOT

CONFIGS = ROOT / "configs"
SHIPPED = sorted(
    path
    for folder in ("sd3", "flux", "flux2", "z_image", "qwen_image", "qwen_image21", "sana")
    for path in (CONFIGS / folder).glob("*.yaml")
)
BILLIONS = {
    "stabilityai/stable-diffusion-3.5-medium": 2.24,
    "black-forest-labs/FLUX.1-dev": 11.90,
    "black-forest-labs/FLUX.2-klein-base-4B": 3.88,
    "black-forest-labs/FLUX.2-klein-4B": 3.88,
    "black-forest-labs/FLUX.2-klein-base-9B": 9.08,
    "black-forest-labs/FLUX.2-dev": 32.22,
    "Tongyi-MAI/Z-Image": 6.15,
    "Tongyi-MAI/Z-Image-Turbo": 6.15,
    "Qwen/Qwen-Image-2512": 20.43,
    "Qwen/Qwen-Image-2.1": 7.12,
    "Qwen/Qwen-Image-2.1-Turbo": 7.12,
    "Efficient-Large-Model/Sana_1600M_512px_diffusers": 1.604,
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers": 1.604,
    "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers": 1.605,
}
"""Published numbers of parameters of the transformers."""


@pytest.mark.parametrize("name", BILLIONS)
def test_a_published_transformer_has_its_number_of_parameters(name):
    folder = str(ROOT / "assets" / "published" / name)
    config = read_model_config({"path": folder, "height": 512, "width": 512})
    transformer = family_of(config.name).empty_transformer(config)
    count = sum(parameter.numel() for parameter in transformer.parameters())
    assert count / 1e9 == pytest.approx(BILLIONS[name], abs=0.005)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_file_is_planned_without_a_hub(path):
    model = load_config(path).model
    assert (Path(with_bundled_files(model).path) / "model_index.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_plan_of_every_shipped_file_is_made(path):
    plan = rehearse(load_config(path))
    assert plan.peak > plan.weights["transformer"]
    assert plan.flops > 0


def test_a_model_that_the_package_has_no_copy_of_stays_as_it_is():
    model = load_config(CONFIGS / "sd3" / "crd.yaml").model
    for path in ("nobody/nothing", str(ROOT / "assets" / "tiny-sd3")):
        assert with_bundled_files(replace(model, path=path)).path == path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "room"),
    [
        # PickScore has 2 GB in half precision and 4 in single.
        *((f"{family}/flow_grpo_24gb", 24 - 2) for family in ("flux2", "z_image", "sana")),
        *((f"{family}/crd_24gb", 24 - 2) for family in ("flux2", "z_image", "sana")),
        *((f"qwen_image/{name}_80gb", 80 - 4) for name in ("flow_grpo", "crd")),
        ("qwen_image21/flow_grpo_24gb", 24 - 2),
        *((f"qwen_image21/{name}_80gb", 80 - 4) for name in ("flow_grpo", "crd")),
    ],
)
def test_the_size_in_a_name_is_enough_with_the_reward(name, room):
    plan = rehearse(load_config(CONFIGS / f"{name}.yaml"))
    assert max(plan.peaks.values()) < room * 1e9
