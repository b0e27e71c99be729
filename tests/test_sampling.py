"""Pictures from a run, a checkpoint, an adapter or a model: which are made, and where they go."""

import itertools
import json
import math
import shutil
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import yaml
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms.functional import pil_to_tensor

import flowalign
from flowalign import distributed
from flowalign.cli import main
from flowalign.errors import RunError, UserError
from flowalign.evaluation.evaluator import Evaluator
from flowalign.models.config import Lora
from flowalign.runs.adapter import load_adapter, lora_settings, save_adapter
from flowalign.runs.adapter_card import base_model
from flowalign.sampling.adapters import MixedAdapter, read_mixed
from flowalign.sampling.generate import load_policy, output_folder, SampleSettings
from flowalign.sampling.result import next_folder, SampleResult
from flowalign.sampling.sources import (
    evaluation_prompts,
    find_source,
    from_config,
    is_config_file,
    read_texts,
)
from flowalign.training import trainer
from tests.tiny import make_policy, ROOT, small_config, stir, two_groups

FEW_STEPS = ["--steps", "2"]
PROMPT = "a red circle"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run whose adapter changes pictures visibly."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        trainer.train(small_config(folder, "train.learning_rate=1e-1", "train.ema.decay=0.5"))
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run, so that a test may write into it."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def adapter(trained, tmp_path):
    """Its adapter, far from the run."""
    return shutil.copytree(trained / "adapter", tmp_path / "adapter")


def read_json(file):
    return json.loads(file.read_text())


def test_a_run_gives_a_sheet_single_pictures_and_scores(run, capsys):
    command = ["sample", str(run), PROMPT, "two blue squares", "--images", "2"]
    assert main([*command, "--reward", "scene_match", "--reward", "{brightness: {}}"]) == 0
    folder = run / "samples"
    rewards, scores = (read_json(folder / f"{name}.json") for name in ("rewards", "scores"))
    assert (folder / "before-after.png").exists()
    assert set(rewards) == {"before", "after", "difference", "adapter", "prompts"}
    assert rewards["prompts"] == 2
    assert len(scores) == 2 * 2 * 2
    for entry in scores:
        assert Image.open(folder / entry["file"]).size == (64, 64)
        assert f"image{entry['image']}-seed0" in entry["file"]
        assert set(entry["scores"]) == set(rewards["after"]) == {"scene_match", "brightness"}
    after = [entry["scores"]["scene_match"] for entry in scores if "after/" in entry["file"]]
    assert sum(after) / len(after) == pytest.approx(rewards["after"]["scene_match"])
    out = capsys.readouterr().out
    assert "rest on 2 prompts." in out
    assert f"Pictures: {folder / 'before-after.png'}" in out


def test_pictures_of_an_earlier_call_are_never_replaced(run, tmp_path, capsys):
    command = ["sample", str(run), PROMPT, *FEW_STEPS]
    for name in ("samples", "samples-2", "samples-3"):
        assert main(command) == 0
        assert (run / name / "before-after.png").exists()
    assert main([*command, "--output", str(run / "samples")]) == 2
    assert f"{run / 'samples'} holds before-after.png already" in capsys.readouterr().err


def test_the_next_folder_has_the_first_free_number(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples-2").mkdir()
    assert next_folder(tmp_path / "samples").name == "samples-3"
    assert next_folder(tmp_path / "other").name == "other"


def test_a_checkpoint_is_sampled_with_its_average_and_saved_in_its_run(run):
    checkpoint = run / "checkpoints" / "step-000002"
    assert find_source(str(checkpoint)).adapter == checkpoint / "snapshots" / "ema"
    assert main(["sample", str(checkpoint), PROMPT, *FEW_STEPS]) == 0
    rewards = read_json(run / "samples" / "rewards.json")
    assert rewards["adapter"] == str(checkpoint / "snapshots" / "ema")


def test_the_adapter_of_a_run_knows_its_run(run):
    source = find_source(str(run / "adapter"))
    assert source.config is not None
    assert source.adapter == run / "adapter"
    weights = run / "adapter" / "pytorch_lora_weights.safetensors"
    assert find_source(str(weights)).adapter == run / "adapter"


def test_an_adapter_alone_brings_its_rank_and_makes_the_pictures_of_diffusers(adapter):
    options = {"steps": 4, "guidance": 3.0, "model": "assets/tiny-sd3"}
    samples = flowalign.sample(adapter, [PROMPT], **options)
    assert samples.before is not None
    assert not torch.equal(samples.images, samples.before.images)
    reference = flowalign.sample("assets/tiny-sd3", [PROMPT], steps=4, guidance=3.0)
    assert torch.equal(samples.before.images, reference.images)
    assert samples.scores == {}
    lora = lora_settings(adapter)
    assert (lora.rank, lora.alpha) == (32, 32)
    pipe = StableDiffusion3Pipeline.from_pretrained(
        "assets/tiny-sd3", text_encoder_3=None, tokenizer_3=None
    )
    pipe.load_lora_weights(adapter)
    layers = pipe.transformer.peft_config["default_0"]
    assert (layers.r, layers.lora_alpha) == (lora.rank, lora.alpha)


def test_an_exported_adapter_names_its_base_model(adapter):
    assert base_model(adapter) == "assets/tiny-sd3"
    source = find_source(str(adapter))
    assert source.config is None
    assert source.adapter == adapter
    assert (source.model.path, source.model.lora.rank) == ("assets/tiny-sd3", 32)


def test_an_adapter_without_a_model_is_answered(adapter, capsys):
    (adapter / "README.md").write_text("# An adapter\n")
    assert main(["sample", str(adapter), PROMPT]) == 2
    assert "--model MODEL" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("card", "model"),
    [
        ("---\nbase_model: assets/tiny-sd3\ntags: [lora]\n---\n# Title\n", "assets/tiny-sd3"),
        ("# No head\n", None),
        ("---\nbase_model: [a, b]\n---\n", None),
        ("---\n{ not yaml\n---\n", None),
        ("---\nbase_model: a\n", None),
    ],
)
def test_the_base_model_is_read_from_the_card(card, model, tmp_path):
    (tmp_path / "README.md").write_text(card)
    assert base_model(tmp_path) == model
    assert base_model(tmp_path / "missing") is None


def make_adapter(folder, **settings):
    """An adapter file of one layer of rank 2, with these PEFT settings in its header."""
    folder.mkdir(exist_ok=True)
    names = {"A": torch.zeros(2, 4), "B": torch.zeros(4, 2)}
    tensors = {f"transformer.attn.to_q.lora_{name}.weight": t for name, t in names.items()}
    header = json.dumps({f"transformer.{key}": value for key, value in settings.items()})
    file = folder / "pytorch_lora_weights.safetensors"
    save_file(tensors, file, {"lora_adapter_metadata": header})
    return folder


@pytest.mark.parametrize(("written", "alpha"), [({}, 2), ({"lora_alpha": 16.0}, 16)])
def test_alpha_is_read_from_the_header_and_is_the_rank_without_it(written, alpha, tmp_path):
    lora = lora_settings(make_adapter(tmp_path, **written, use_rslora=False, alpha_pattern={}))
    assert (lora.rank, lora.alpha, lora.targets) == (2, alpha, ["attn.to_q"])


@pytest.mark.parametrize(
    ("key", "value"),
    [("alpha_pattern", {"to_q": 8.5}), *(("lora_alpha", each) for each in (22.6, math.inf, 0))],
)
def test_an_alpha_that_is_no_whole_number_is_refused(key, value, tmp_path):
    with pytest.raises(UserError, match=f"safetensors has {key}"):
        lora_settings(make_adapter(tmp_path, **{"lora_alpha": 2, key: value}))


def test_an_adapter_is_loaded_at_its_own_strength_whatever_alpha_the_policy_has(tmp_path):
    settings = small_config(tmp_path / "run").model.lora
    policy = make_policy(lora=settings)
    stir(policy)
    save_adapter(policy, tmp_path)
    other = make_policy(lora=replace(settings, alpha=settings.rank))
    load_adapter(other, tmp_path)
    first, second = (p.generate(two_groups(p, 1)).x0 for p in (policy, other))
    assert torch.equal(first, second)


def test_an_adapter_is_evaluated_at_its_own_strength(adapter, trained, tmp_path):
    config = small_config(tmp_path / "run", "model.lora.alpha=32")
    means = flowalign.evaluate(config, adapter).means
    assert means == pytest.approx(read_json(trained / "summary.json")["after"], abs=1e-6)


@pytest.mark.parametrize("source", ["assets/tiny-sd3", "nowhere"])
def test_a_base_model_belongs_to_an_adapter_alone(source):
    with pytest.raises(UserError, match=f"{source} is not an adapter, so --model has no effect"):
        find_source(source, "assets/tiny-sd3")


def test_a_configuration_is_any_file_but_that_of_an_adapter(tmp_path):
    weights = make_adapter(tmp_path) / "pytorch_lora_weights.safetensors"
    (tmp_path / "settings").write_text("train: {}")
    assert is_config_file("tiny/crd.yaml")
    assert is_config_file(tmp_path / "missing.yml")
    assert is_config_file(tmp_path / "settings")
    assert not is_config_file(tmp_path)
    assert not is_config_file(weights)


def test_missing_prompts_are_named_by_their_own_key(tmp_path):
    config = small_config(tmp_path / "run")
    config.evaluation.prompts = "nowhere.txt"
    with pytest.raises(UserError, match=r"evaluation\.prompts: there is no file nowhere\.txt"):
        evaluation_prompts(config)


def test_a_tilde_is_the_home_folder_for_pictures_and_adapters(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert output_folder("assets/tiny-sd3", "~/pictures") == tmp_path / "pictures"
    result = SampleResult(
        images=torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        prompts=[PROMPT],
        prompt_numbers=[0],
        image_numbers=[0],
        seed=0,
        scores={},
        means={},
        difference={},
    )
    assert result.save("~/pictures") == tmp_path / "pictures" / "pictures.png"
    config = small_config(tmp_path / "run")
    assert from_config(config, "~/adapter").adapter == tmp_path / "adapter"


def test_prompts_are_read_from_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.txt").write_text(f"{PROMPT}\n")
    assert [prompt.text for prompt in read_texts("~/p.txt")] == [PROMPT]


BOMB = "a: &a {k: 1}\n" + "\n".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 9)}]}}"
    for before, name in itertools.pairwise("abcdefghi")
)


def test_the_card_of_a_stranger_is_measured_before_it_is_read(tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("aliases are written out")

    monkeypatch.setattr(yaml.constructor.SafeConstructor, "flatten_mapping", never)
    (tmp_path / "README.md").write_text(f"---\n{BOMB}\nbase_model: x\n---\n")
    assert base_model(tmp_path) is None


def test_a_damaged_adapter_is_named(tmp_path, capsys):
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"not tensors")
    assert main(["sample", str(tmp_path), PROMPT, "--model", "assets/tiny-sd3"]) == 2
    assert "pytorch_lora_weights.safetensors is damaged" in capsys.readouterr().err


def test_a_model_gives_pictures_without_scores(tmp_path):
    arguments = ["sample", "assets/tiny-sd3", PROMPT, *FEW_STEPS, "--images", "2", "--seed", "7"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    assert (tmp_path / "pictures.png").exists()
    names = sorted(file.name for file in (tmp_path / "pictures").iterdir())
    assert names == [f"000-a-red-circle-image{i}-seed7.png" for i in range(2)]
    assert [entry["seed"] for entry in read_json(tmp_path / "scores.json")] == [7, 7]


def test_sampling_ends_on_all_ranks_together(monkeypatch):
    """One that fails would otherwise leave the others in a collective, without its message."""
    seen = []

    @contextmanager
    def together():
        try:
            yield
        except RunError as error:
            seen.append(error)
            raise

    def fail(*_):
        raise RunError("the device is gone")

    monkeypatch.setattr(distributed, "ending_together", together)
    monkeypatch.setattr(Evaluator, "sample", fail)
    with pytest.raises(RunError):
        flowalign.sample("assets/tiny-sd3", [PROMPT], steps=2)
    assert len(seen) == 1


def test_the_same_seed_gives_the_same_picture_however_many_are_made():
    one = flowalign.sample("assets/tiny-sd3", [PROMPT], images=1, steps=2)
    three = flowalign.sample("assets/tiny-sd3", [PROMPT], images=3, steps=2)
    other = flowalign.sample("assets/tiny-sd3", [PROMPT], seed=1, steps=2)
    first, again, another = (made.images[0].int() for made in (one, three, other))
    # Some processors round a batch of one in another way.
    assert (first - again).abs().max() <= 1
    assert (first - another).abs().max() > 30


@pytest.mark.parametrize("seed", ["12345678901234567890", "-1"])
def test_a_seed_out_of_range_is_answered_with_the_range(seed, capsys):
    assert main(["sample", "assets/tiny-sd3", PROMPT, f"--seed={seed}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"seed is {seed}; it must be ")
    assert str(2**63 - 1) in error or "equal to 0" in error


def test_the_largest_seed_makes_pictures():
    pictures = flowalign.sample("assets/tiny-sd3", [PROMPT], seed=2**63 - 1, steps=1)
    assert pictures.names == [f"000-a-red-circle-image0-seed{2**63 - 1}"]


def test_a_model_needs_prompts(capsys):
    assert main(["sample", "assets/tiny-sd3"]) == 2
    assert "There are no prompts" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["assets/prompts", "nowhere/at/all"])
def test_a_path_that_is_nothing_to_sample_from_is_answered(source, capsys):
    assert main(["sample", source, PROMPT]) == 2
    assert source in capsys.readouterr().err


def test_a_run_without_weights_is_answered(run):
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="no adapter and no checkpoint yet"):
        find_source(str(run))


def test_a_run_without_an_exported_adapter_uses_its_last_checkpoint(run):
    shutil.rmtree(run / "adapter")
    last = run / "checkpoints" / "step-000002" / "snapshots" / "ema"
    assert find_source(str(run)).adapter == last


def test_prompts_are_texts_or_one_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\na blue square\n")
    assert [prompt.text for prompt in read_texts([str(file)])] == ["a red circle", "a blue square"]
    assert [prompt.text for prompt in read_texts(file)] == ["a red circle", "a blue square"]
    assert [prompt.text for prompt in read_texts("a red circle")] == ["a red circle"]
    assert read_texts([flowalign.Prompt("a", {"b": 1})])[0].metadata == {"b": 1}
    assert read_texts(None) == []


def test_evaluating_a_run_gives_what_its_summary_says(trained):
    result = flowalign.evaluate(trained)
    assert result.means == pytest.approx(read_json(trained / "summary.json")["after"], abs=1e-6)


def test_a_strip_begins_with_the_base_and_reaches_the_run_bit_for_bit(run):
    command = ["sample", str(run), PROMPT, "a square", *FEW_STEPS, "--strength", "0,0.5,1"]
    assert main([*command, "--reward", "brightness"]) == 0
    plain = flowalign.sample(run, [PROMPT, "a square"], steps=2)
    assert plain.before is not None
    folder = run / "samples"
    entries = read_json(folder / "scores.json")
    assert [(entry["strength"], entry["prompt"]) for entry in entries] == [
        (strength, prompt) for strength in (0, 0.5, 1) for prompt in (PROMPT, "a square")
    ]
    pictures = [pil_to_tensor(Image.open(folder / entry["file"])) for entry in entries]
    assert torch.equal(torch.stack(pictures[:2]), plain.before.images)
    assert torch.equal(torch.stack(pictures[4:]), plain.images)
    assert not torch.equal(pictures[2], pictures[0])
    assert not torch.equal(pictures[2], pictures[4])
    # Three rows of pictures that are shown at twice their size.
    assert Image.open(folder / "strengths.png").height > 3 * 128


def latents(source, adapters, strength=1.0):
    """x0 of two images that the sum of adapters makes."""
    origin = replace(find_source(str(source)), mixed=tuple(map(read_mixed, adapters)))
    policy = load_policy(origin, SampleSettings(steps=2))
    with policy.at_strength(strength):
        return policy.at("policy").generate(two_groups(policy, 1)).x0


def test_adapters_are_added_at_their_strengths(adapter, tmp_path):
    model = "assets/tiny-sd3"
    other = make_policy(lora=Lora(rank=2, alpha=8, targets=["attn.to_q", "ff.net.2"]))
    stir(other)
    save_adapter(other, tmp_path / "other")
    one, base = latents(model, [adapter]), latents(model, [f"{adapter}:0"])
    assert torch.equal(base, latents(model, [adapter], strength=0))
    assert (one - base).abs().max() > 1e-2
    halves = latents(model, [f"{adapter}:0.5", f"{adapter}:0.5"])
    assert (halves - one).abs().max() < 1e-4
    # The adapter of the source counts in full.
    both = latents(adapter, [f"{tmp_path / 'other'}:0.7"])
    assert (latents(model, [f"{tmp_path / 'other'}:0.7", adapter]) - both).abs().max() < 1e-4
    assert (both - one).abs().max() > 1e-2


def test_a_mixture_takes_runs_and_every_format_and_says_what_it_is(run, tmp_path):
    file = tmp_path / "kohya.safetensors"
    assert main(["export", str(run), "--format", "kohya", "--output", str(file)]) == 0
    kohya = latents("assets/tiny-sd3", [file])
    assert (kohya - latents("assets/tiny-sd3", [run])).abs().max() < 1e-4
    command = ["sample", "assets/tiny-sd3", PROMPT, "--adapter", f"{run}:0.5", *FEW_STEPS]
    assert main([*command, "--output", str(tmp_path / "pictures")]) == 0
    assert read_json(tmp_path / "pictures" / "rewards.json")["adapter"] == f"{run}/adapter at 0.5"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strength", "0,1"], "There is no adapter whose strength could change"),
        (["--adapter", "nowhere:0.5"], "adapter: there is no adapter nowhere"),
        (["--adapter", "{merged}"], "was trained on a model with other adapters in it"),
    ],
)
def test_a_mixture_that_cannot_be_is_answered(arguments, message, tmp_path, capsys):
    merged = make_adapter(tmp_path / "merged")
    (merged / "README.md").write_text("---\nmerged_adapters: [merged/1]\n---\n")
    filled = [argument.format(merged=merged) for argument in arguments]
    assert main(["sample", "assets/tiny-sd3", PROMPT, *filled]) == 2
    assert message in capsys.readouterr().err


def test_a_strength_follows_the_last_colon_of_a_path():
    for text, strength in (("a:0.5", 0.5), ("a:-1", -1), ("a", 1), ("a:b", 1), ("a:nan", 1)):
        path = text if strength == 1 else "a"
        assert read_mixed(text) == MixedAdapter(path, strength)
