"""Configuration: what merges, what replaces, and what an error tells its reader to type."""

import re
from pathlib import Path

import pytest
import yaml

from flowalign.bundled import CONFIGS
from flowalign.config.load import load_config
from flowalign.config.resolved import resolve
from flowalign.dynamics import cps, flow_sde, ode
from flowalign.errors import UserError
from flowalign.objectives import OBJECTIVES
from flowalign.objectives.flow_grpo import FlowGRPO
from flowalign.objectives.nft import NFT
from flowalign.settings.by_name import imported, RELATIVES
from flowalign.settings.merging import merge, parse_override
from flowalign.settings.yaml_files import parse_yaml, read_yaml

SHIPPED = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent != CONFIGS / "base")
SMALL = """
model: {name: sd3, path: assets/tiny-sd3}
sampler: {steps: 8, dynamics: {name: flow_sde, eta: 0.5}}
objective: {name: flow_grpo, clip_range: 2e-3}
rewards: {scene_match: 1.0}
data: {prompts: prompts.txt}
train: {steps: 7}
"""


def written(tmp_path: Path, text: str, name: str = "small.yaml") -> Path:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def small(tmp_path):
    return written(tmp_path, SMALL)


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_config(path, list(overrides))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_shipped_file_loads(path):
    assert Path(load_config(path).output).parent == Path("outputs")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_a_tiny_configuration_and_stands_in_the_readme(name):
    assert load_config(CONFIGS / "tiny" / f"{name}.yaml").objective_name == name
    assert f"`{name}`" in (CONFIGS.parent / "README.md").read_text()


def test_no_two_shipped_files_write_to_the_same_folder():
    outputs = [load_config(path).output for path in SHIPPED]
    assert len(set(outputs)) == len(outputs)


def test_a_file_becomes_typed_sections(small):
    config = load_config(small)
    assert config.objective == FlowGRPO(clip_range=2e-3)
    assert (config.sampler.dynamics.func, config.sampler.dynamics.keywords) == (
        flow_sde,
        {"eta": 0.5},
    )
    assert (config.train.steps, config.train.prompts_per_step) == (7, 8)
    assert config.advantage.keywords["std"] == "global"


def test_what_a_file_leaves_out_has_its_default(tmp_path):
    path = written(
        tmp_path,
        "model: {name: sd3, path: p}\ndata: {prompts: p.txt}\n"
        "rewards: {brightness: 1}\nobjective: {name: nft}\n",
    )
    config = load_config(path)
    assert config.objective == NFT()
    assert config.sampler.dynamics is ode
    assert config.evaluation.rewards == config.rewards


def test_the_evaluation_samples_by_the_ode_and_its_own_settings(small):
    sampler = load_config(small, ["evaluation.sampler={steps: 20, guidance: 2}"]).evaluation_sampler
    assert (sampler.dynamics, sampler.steps, sampler.guidance) == (ode, 20, 2)


# extends and merging


def test_a_child_merges_over_what_it_extends(tmp_path, small):
    child = load_config(
        written(tmp_path, "extends: small.yaml\ntrain: {learning_rate: 1e-4}\n", "child.yaml")
    )
    assert (child.train.steps, child.train.learning_rate) == (7, 1e-4)
    assert child.objective == FlowGRPO(clip_range=2e-3)


def test_a_parent_is_looked_for_under_configs_too(tmp_path):
    path = written(tmp_path, "extends: base/tiny-sd3.yaml\nrewards: {scene_match: 1}\n")
    assert load_config(path).model.path == "assets/tiny-sd3"


def test_a_file_beside_comes_before_one_under_configs(tmp_path):
    written(tmp_path, SMALL, "base/tiny-sd3.yaml")
    assert load_config(written(tmp_path, "extends: base/tiny-sd3.yaml\n")).train.steps == 7


def test_extends_goes_through_several_files(tmp_path, small):
    written(tmp_path, "extends: small.yaml\ntrain: {steps: 9, seed: 3}\n", "middle.yaml")
    config = load_config(
        written(tmp_path, "extends: middle.yaml\ntrain: {steps: 11}\n", "child.yaml")
    )
    assert (config.train.steps, config.train.seed) == (11, 3)


def test_reward_maps_replace(tmp_path, small):
    child = written(tmp_path, "extends: small.yaml\nrewards: {brightness: 0.5}\n", "child.yaml")
    assert load_config(child).rewards == {"brightness": 0.5}
    assert load_config(small, ["rewards={jpeg_size: 2}"]).rewards == {"jpeg_size": 2}


def test_a_section_whose_name_changes_is_replaced(small):
    dynamics = load_config(small, ["sampler.dynamics={name: cps}"]).sampler.dynamics
    assert (dynamics.func, dynamics.keywords) == (cps, {"eta": 0.7})
    assert (
        load_config(small, ["sampler.dynamics.name=ode", "objective={name: nft}"]).sampler.dynamics
        is ode
    )


def test_a_section_whose_name_stays_merges(small):
    assert load_config(
        small, ["objective={name: flow_grpo, kl_weight: 0.1}"]
    ).objective == FlowGRPO(clip_range=2e-3, kl_weight=0.1)
    assert load_config(small, ["sampler.dynamics.eta=0.9"]).sampler.dynamics.keywords == {
        "eta": 0.9
    }


def test_merging_changes_neither_side():
    parent, child = {"a": {"b": 1}}, {"a": {"c": 2}}
    assert merge(parent, child) == {"a": {"b": 1, "c": 2}}
    assert (parent, child) == ({"a": {"b": 1}}, {"a": {"c": 2}})


@pytest.mark.parametrize("text", ["extends: small.yaml\n", "extends: ../here/small.yaml\n"])
def test_a_file_that_extends_itself_is_refused(tmp_path, text):
    assert "extends itself" in refusal(written(tmp_path, text, "here/small.yaml"))


def test_two_files_that_extend_each_other_are_refused(tmp_path):
    written(tmp_path, "extends: b.yaml\n", "a.yaml")
    assert "extends itself" in refusal(written(tmp_path, "extends: a.yaml\n", "b.yaml"))


def test_a_missing_parent_is_named(tmp_path):
    message = refusal(written(tmp_path, "extends: base/tiny-sd.yaml\n"))
    assert "extends: there is no file base/tiny-sd.yaml" in message
    assert "Did you mean 'tiny-sd3.yaml'?" in message


def test_a_missing_file_is_answered_with_the_nearest(small):
    assert "Did you mean 'small.yaml'?" in refusal(small.with_name("smal.yaml"))


# values


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("1e-4", 1e-4),
        ("3E5", 3e5),
        ("-2e3", -2e3),
        ("1.5e-3", 1.5e-3),
        ("10", 10),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ("a b", "a b"),
    ],
)
def test_the_value_of_an_override_is_yaml(value, expected):
    parsed = parse_override(f"train.x={value}", parse_yaml)["train"]["x"]
    assert (parsed, type(parsed)) == (expected, type(expected))


def test_a_small_number_in_a_file_is_a_number(tmp_path):
    path = written(tmp_path, "a: 1e-4\nb: 1e-4x\n")
    assert read_yaml(path).values == {"a": 1e-4, "b": "1e-4x"}


def test_later_overrides_win(small):
    assert (
        load_config(small, ["train.steps=3", "train.steps=4", "train.ema.decay=0.9"]).train.steps
        == 4
    )


@pytest.mark.parametrize("text", ["train.steps", "=3", "train..steps=3", ".steps=3"])
def test_an_override_without_key_or_value_is_answered_with_an_example(small, text):
    assert "write section.key=value, for example train.steps=10" in refusal(small, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1\n", "is not YAML"), ("- a\n", "expected sections"), ("", "expected sections")],
)
def test_a_file_that_is_not_a_mapping_is_refused(tmp_path, text, message):
    assert message in refusal(written(tmp_path, text))


# errors


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("trian.steps=3", "train"),
        ("train.stepz=3", "steps"),
        ("train.ema.decya=0.9", "decay"),
        ("model.lora.rnk=4", "rank"),
        ("sampler.widnow={}", "window"),
        ("sampler.window.sise=2", "size"),
        ("sampler.dynamics.etaa=1", "eta"),
        ("objective.clip_rnge=1e-4", "clip_range"),
        ("objective.steps.fracton=0.5", "fraction"),
        ("advantage={name: group, epsilonn: 1}", "epsilon"),
        ("evaluation.sampler={stps: 4}", "steps"),
        ("rewards={scene_mach: 1}", "scene_match"),
        ("evaluation.rewards={brigthness: 1}", "brightness"),
        ("objective={name: flow_gpro}", "flow_grpo"),
        ("sampler.dynamics={name: flow_sdee}", "flow_sde"),
        ("model.name=sd33", "sd3"),
    ],
)
def test_a_misspelt_key_or_name_is_answered_with_the_right_one(small, override, nearest):
    message = refusal(small, override)
    assert message.startswith(f"{small}: ")
    assert f"Did you mean {nearest!r}?" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rewards={beauty: 1}", "Choose from scene_match, "),
        ("objective={name: magic}", "choose from flow_grpo"),
        ("sampler.dynamics={name: heun}", "choose from ode, flow_sde, dance_sde, cps"),
        ("model.name=unet", "choose from sd3, flux"),
    ],
)
def test_an_unknown_name_is_answered_with_the_known_ones(small, override, expected):
    assert expected in refusal(small, override)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train.steps=many", "train.steps"),
        ("train.steps=1.5", "train.steps"),
        ("train.steps=null", "train.steps"),
        ("train.learning_rate=fast", "train.learning_rate"),
        ("train=3", "train is 3"),
        ("train.ema=3", "train.ema is 3"),
        ("model.dtype=float8", "model.dtype"),
        ("model.lora.targets=3", "model.lora.targets"),
        ("objective.kl=exat", "objective.kl"),
        ("objective.clip_range=narrow", "objective.clip_range"),
        ("sampler.window.range=[1]", "sampler"),
        ("rewards={scene_match: high}", "rewards.scene_match"),
        ("rewards=[scene_match]", "rewards is"),
        ("rewards={}", "rewards is empty"),
        ("evaluation.sampler={steps: few}", "evaluation.sampler.steps"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_its_key(small, override, key):
    assert refusal(small, override).startswith(f"{small}: {key}")


# references


def test_a_reference_is_filled_in_after_overrides(small, monkeypatch):
    monkeypatch.setenv("SEED", "5")
    overrides = [
        "output=outputs/${objective.name}-${train.steps}",
        "train.steps=9",
        "train.save_every=${train.steps}",
        "train.seed=${oc.decode:${oc.env:SEED}}",
    ]
    config = load_config(small, overrides)
    assert config.output == "outputs/flow_grpo-9"
    assert (config.train.save_every, config.train.seed) == (9, 5)


def test_a_reference_of_a_parent_takes_the_child_s_value(tmp_path, small):
    written(tmp_path, "extends: small.yaml\ntrain: {save_every: '${train.steps}'}\n", "mid.yaml")
    child = written(tmp_path, "extends: mid.yaml\ntrain: {steps: 12}\n", "child.yaml")
    assert load_config(child).train.save_every == 12


def test_a_text_with_a_plain_reference_survives_being_resolved(tmp_path, small):
    config = load_config(small, ["output=outputs/a\\${b}"])
    assert config.output == "outputs/a${b}"
    again = written(tmp_path, yaml.safe_dump(resolve(config)), "again.yaml")
    assert load_config(again).output == "outputs/a${b}"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.seed=${a.b}", "train.seed is '${a.b}', but there is no key a.b. Refer to"),
        ("model.path=${oc.env:NOT_SET}", "the environment variable NOT_SET is not set. Set it"),
        ("train.seed=${train.seed}", "train.seed is '${train.seed}', which"),
        ("train.seed=${", "train.seed cannot be used: "),
        ("model.path='???'", "model.path is ???, which stands for a missing value. Write model"),
    ],
)
def test_a_reference_that_cannot_be_filled_in_is_answered_by_file_and_key(
    small, override, expected
):
    message = refusal(small, override)
    assert message.startswith(f"{small}: {override.partition('=')[0]}")
    assert expected in message


def test_one_image_a_prompt_is_refused(small):
    message = (
        "train.images_per_prompt is 1, but images of the same prompt are compared; use 2 or more."
    )
    assert refusal(small, "train.images_per_prompt=1") == f"{small}: {message}"


@pytest.mark.parametrize(
    "override",
    [
        "train.steps=0",
        "train.learning_rate=0",
        "train.ema.decay=1",
        "sampler.steps=0",
        "sampler.guidance=0.5",
    ],
)
def test_a_value_out_of_range_is_refused(small, override):
    key, _, value = override.partition("=")
    message = refusal(small, override)
    assert key.rsplit(".", 1)[0] in message
    assert value in message


@pytest.mark.parametrize("section", ["model", "data", "rewards"])
def test_a_missing_section_is_named(tmp_path, section):
    text = "".join(line for line in SMALL.splitlines(keepends=True) if not line.startswith(section))
    assert f"the section {section!r} is missing" in refusal(written(tmp_path, text))


@pytest.mark.parametrize(
    ("section", "key"), [("model: {name: sd3}", "model.path"), ("data: {}", "data.prompts")]
)
def test_a_missing_setting_is_named(tmp_path, section, key):
    name = section.partition(":")[0]
    text = (
        "".join(line for line in SMALL.splitlines(keepends=True) if not line.startswith(name))
        + section
    )
    assert f"{key} is missing" in refusal(written(tmp_path, text))


@pytest.mark.parametrize("written", RELATIVES.values())
def test_what_a_method_is_called_here_can_be_written_so(written):
    """The parts `section: {...}` of the answer, each as an override."""
    sections = re.findall(r"(\w+): (\{.*\})", written.replace("K}", "2}").replace(" with ", "\n"))
    counts = ["train.prompts_per_step=4", "train.images_per_prompt=16", "train.images_per_pass=16"]
    overrides = [f"{section}={settings}" for section, settings in sections]
    assert overrides
    load_config(CONFIGS / "base" / "tiny-online.yaml", [*counts, *overrides])


def test_an_objective_of_ones_own_is_named_by_its_path(tmp_path, small):
    head = "from dataclasses import dataclass\nfrom flowalign.objectives.base import Objective\n\n"
    code = head + "@dataclass\nclass Mine(Objective):\n    strength: float = 1.0\n"
    mine = written(tmp_path, code, "mine.py")
    assert (
        load_config(small, [f"objective={{name: '{mine}:Mine', strength: 2}}"]).objective.strength
        == 2
    )
    assert "Did you mean 'Mine'?" in refusal(small, f"objective={{name: '{mine}:Mime'}}")
    assert "there is no file nowhere.py" in refusal(small, "objective={name: 'nowhere.py:Mine'}")


def test_a_file_that_ends_the_program_when_it_is_imported_is_named(tmp_path):
    (tmp_path / "script.py").write_text("raise SystemExit(2)\n")
    with pytest.raises(UserError, match=r"rewards: .*script\.py cannot be imported: SystemExit: 2"):
        imported(f"{tmp_path}/script.py:score", "rewards", {})
