"""What a step learns from, and whole runs of objectives that learn from it."""

import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from flowalign.advantages import gdpo, group_advantage
from flowalign.batch import Batch, Examples, Pairs, Rollout
from flowalign.config.load import load_config
from flowalign.data.pictures import load_picture
from flowalign.data.preferences import PAIRS, read_examples
from flowalign.data.prompts import Prompt
from flowalign.disk_cache import DiskCache
from flowalign.dynamics import flow_sde
from flowalign.errors import RunError, UserError
from flowalign.files import read_tensors
from flowalign.models import load_model
from flowalign.objectives.dpo import DPO
from flowalign.objectives.flow_grpo import FlowGRPO
from flowalign.objectives.kto import KTO
from flowalign.objectives.prdp import PRDP
from flowalign.objectives.raft import RAFT
from flowalign.objectives.sft import SFT
from flowalign.objectives.soar import SOAR
from flowalign.policy import Policy, Sampler
from flowalign.reporting.trackers import read_metrics
from flowalign.rewards.base import Reward
from flowalign.rewards.combine import WeightedSum
from flowalign.rewards.pixel_statistics import brightness
from flowalign.rollouts.batch_plan import BatchPlan
from flowalign.rollouts.collect import collect
from flowalign.rollouts.ranking import rank
from flowalign.rollouts.ranking_settings import Ranking
from flowalign.rollouts.scoring import RolloutScorer
from flowalign.rollouts.sources import (
    given_examples,
    given_pairs,
    ranked_pairs,
    scored_rollouts,
    Source,
    source_of,
    SourceContext,
)
from flowalign.rollouts.voted import VotedPictures
from flowalign.runs.checkpoint import checkpoints
from flowalign.training import trainer
from flowalign.training.gradient import compute_gradient, Meter, split
from flowalign.training.setup import assemble, read_inputs
from tests.tiny import make_policy, ROOT, SMALL, stir, TINY, two_groups

CAPTIONS = ["a red circle", "a blue square", "a green triangle", "a circle and a square"]


@pytest.fixture(autouse=True)
def cached_beside(tmp_path, monkeypatch):
    """Configurations name files in the repository; latents stay out of the home directory."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("FLOWALIGN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def pairs(tmp_path) -> Path:
    """Four pairs: bright pictures are better than dark ones."""
    lines = []
    for i, caption in enumerate(CAPTIONS):
        for name, level in (("bright", 200 + 10 * i), ("dark", 20 + 10 * i)):
            Image.new("RGB", (64, 64), (level, level, level)).save(tmp_path / f"{name}{i}.png")
        lines.append(
            json.dumps({"prompt": caption, "chosen": f"bright{i}.png", "rejected": f"dark{i}.png"})
        )
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    return tmp_path / "pairs.jsonl"


def context(
    pairs: Path | None = None, drop_equal_groups: bool = False, **counts: int
) -> SourceContext:
    examples = read_examples(str(pairs), "data.pairs", PAIRS) if pairs else []
    settings = {
        "prompts_per_step": 2,
        "images_per_prompt": 1 if pairs else 3,
        "updates_per_step": 1,
        "max_images_per_pass": 2,
    }
    settings |= counts
    policy = make_policy(Sampler(steps=2, dynamics=flow_sde), snapshots=["old"])
    policy.model.remember(CAPTIONS)
    judged = (
        [Reward("brightness", brightness)],
        WeightedSum(),
        group_advantage,
        settings["max_images_per_pass"],
        torch.device("cpu"),
    )
    judge = RolloutScorer(*judged, drop_equal_groups=drop_equal_groups)
    prompts = [Prompt(caption) for caption in CAPTIONS]
    return SourceContext(
        policy=policy,
        scorer=judge,
        prompts=prompts,
        examples=examples,
        plan=BatchPlan(**settings),
        seed=0,
        sampling_weights="policy",
        steps=100,
        keeps_paths=True,
        null_gradient=True,
        ranking=Ranking(),
        voted=VotedPictures(policy, lambda _: policy.sampler, keeps_paths=True),
    )


def tensors(batch: Batch) -> list[Tensor]:
    return list(batch.tensors().values())


SOURCES = [given_pairs, given_examples, scored_rollouts, ranked_pairs]


@pytest.mark.parametrize("make", SOURCES)
def test_what_a_step_takes_depends_on_the_step_alone(make, pairs):
    given = make in (given_pairs, given_examples)
    source: Source = partial(make, context(pairs if given else None))
    first, third = source(1)[0], source(3)[0]
    again = make(context(pairs if given else None), 3)[0]
    for other in (again, source(3)[0]):
        assert other.prompts == third.prompts
        assert all(torch.equal(a, b) for a, b in zip(tensors(other), tensors(third), strict=True))
    assert not torch.equal(first.keys.table(), third.keys.table())


def test_a_prompt_that_occurs_twice_in_a_step_makes_two_groups():
    """The released code of Flow-GRPO makes one group of its images, by the prompt's text."""
    rollout, _ = scored_rollouts(context(prompts_per_step=8, images_per_prompt=2), 0)
    assert {rollout.prompts.count(caption) for caption in CAPTIONS} == {4}
    assert rollout.group.tolist() == [slot for slot in range(8) for _ in range(2)]
    assert rollout.advantage.abs().max() > 0.1
    assert rollout.advantage.view(8, 2).sum(1).abs().max() < 1e-5


@pytest.mark.parametrize("make", SOURCES)
def test_every_entry_comes_once_before_any_comes_again(make, pairs):
    given = make in (given_pairs, given_examples)
    source: Source = partial(make, context(pairs if given else None))
    for lap in (0, 1):
        seen = [set(source(2 * lap + step)[0].prompts) for step in (0, 1)]
        assert seen[0] | seen[1] == set(CAPTIONS)
        assert not seen[0] & seen[1]


def test_given_pairs_are_latents_of_their_pictures(pairs):
    source = context(pairs)
    batch, metrics = given_pairs(source, 0)
    for name, x0 in zip(("bright", "dark"), batch.x0, strict=True):
        files = [pairs.parent / f"{name}{CAPTIONS.index(prompt)}.png" for prompt in batch.prompts]
        pictures = torch.stack([load_picture(file.read_bytes(), 64, 64) for file in files])
        encoded = [source.policy.model.encode_images(picture[None]) for picture in pictures]
        assert torch.equal(x0, torch.cat(encoded))
    assert (metrics, batch.steps, len(batch)) == ({}, range(0), 2)
    assert batch.gap.tolist() == batch.weight.tolist() == [1, 1]


def test_the_scores_of_given_pairs_weigh_their_losses(pairs):
    """score_chosen - score_rejected: 1, 2, 4 and 5 weigh 0.6, 0.8, 1.2 and 1.4."""
    lines = [json.loads(line) for line in pairs.read_text().splitlines()]
    scored = [
        {**line, "score_chosen": gap, "score_rejected": 0}
        for line, gap in zip(lines, (1, 2, 4, 5), strict=True)
    ]
    pairs.write_text("\n".join(map(json.dumps, scored)))
    source = context(pairs, prompts_per_step=4)
    stir(source.policy)
    even, _ = given_pairs(source, 0)
    assert even.weight.tolist() == [1, 1, 1, 1]
    source = replace(source, ranking=Ranking(weighted=True))
    batch, _ = given_pairs(source, 0)
    expected = {"a red circle": 0.6, "a blue square": 0.8, "a green triangle": 1.2}
    weight = torch.tensor([expected.get(prompt, 1.4) for prompt in batch.prompts])
    torch.testing.assert_close(batch.weight, weight)
    for objective in (DPO(beta=50.0), KTO(beta=50.0)):
        by_pair = torch.stack(
            [loss_of(source.policy, objective, even, row) for row in range(len(even))]
        )
        total = loss_of(source.policy, objective, batch)
        torch.testing.assert_close(total, (weight * by_pair).mean(), rtol=1e-4, atol=1e-6)
        assert abs(total - by_pair.mean()) > 1e-5


def loss_of(policy: Policy, objective: Any, pairs: Pairs, row: int | None = None) -> Tensor:
    """The loss of one row, or of all, where terms are those of the whole update."""
    (one,) = list(split(policy, objective, pairs, 2 * len(pairs)))
    if row is None:
        return objective.loss(policy, one.batch, one.draw).total.detach()
    draw = one.draw
    part = replace(draw, t=draw.t[row : row + 1], noise=draw.noise[row : row + 1])
    return objective.loss(policy, one.batch[row : row + 1], part).total.detach()


def test_pairs_of_a_small_gap_are_not_trained_on(pairs):
    source = replace(context(pairs, prompts_per_step=4), ranking=Ranking(min_gap=0.5))
    assert len(given_pairs(source, 0)[0].trainable_rows()) == 4
    with pytest.raises(UserError, match=r"data\.ranking\.min_gap is 1, but no pair"):
        given_pairs(replace(source, ranking=Ranking(min_gap=1.0)), 0)


def test_given_examples_are_the_better_pictures(pairs):
    source = context(pairs)
    assert torch.equal(given_examples(source, 0)[0].x0, given_pairs(source, 0)[0].x0[0])


def test_given_pictures_come_before_those_the_policy_would_make(pairs):
    assert type(source_of(Pairs, context(pairs))(0)[0]) is Pairs
    assert type(source_of(Examples, context(pairs))(0)[0]) is Examples
    made = source_of(Pairs, context())(0)[0]
    # Of two steps one is stochastic.
    assert made.chosen_path.shape[1] == 2


def test_objectives_that_learn_from_x0_alone_get_no_path(pairs):
    with_path, without = (
        source_of(Rollout, replace(context(), keeps_paths=keeps))(0)[0] for keeps in (True, False)
    )
    assert with_path.path.shape[1] == 2
    assert without.path.shape[1] == without.log_prob.shape[1] == len(without.steps) == 0
    assert torch.equal(with_path.x0, without.x0)


def test_rollouts_are_made_by_the_weights_that_the_objective_names():
    source = replace(context(), sampling_weights="old")
    with torch.no_grad():
        for parameter in source.policy.parameters("old"):
            parameter.add_(0.1)
    old, policy = (
        scored_rollouts(replace(source, sampling_weights=name), 0)[0].x0
        for name in ("old", "policy")
    )
    expected = collect(source.policy.at("old"), source.step_prompts(0), 2).x0
    assert torch.equal(old, expected)
    assert not torch.equal(old, policy)


def test_ranked_pairs_are_the_brightest_and_the_darkest_of_a_prompt():
    source = context()
    rollout, metrics = scored_rollouts(source, 0)
    pairs, same = ranked_pairs(source, 0)
    assert metrics == same
    reward = rollout.reward.view(2, 3)
    torch.testing.assert_close(pairs.gap, reward.max(1).values - reward.min(1).values)


def test_pairs_by_dominance_compare_each_reward_by_itself():
    """One reward with weights of both signs dominates nothing; with one sign, all pairs."""
    source = context()
    rewards = [Reward("bright", brightness, 2.0), Reward("dark", brightness, -1.0)]
    scorer = replace(source.scorer, rewards=rewards)
    source = replace(source, scorer=scorer, ranking=Ranking(by="dominance"))
    rollout, _ = scored_rollouts(source, 0)
    assert set(rollout.rewards) == {"bright", "dark"}
    torch.testing.assert_close(rollout.rewards["bright"], -2 * rollout.rewards["dark"])
    assert len(ranked_pairs(source, 0)[0].trainable_rows()) == 0
    agreeing = replace(scorer, rewards=[rewards[0], Reward("dark", brightness, 1.0)])
    pairs, _ = ranked_pairs(replace(source, scorer=agreeing), 0)
    assert len(pairs.trainable_rows()) == 2 * 3
    assert pairs.gap.min() > 0


def test_the_noise_of_a_pair_does_not_depend_on_what_other_prompts_there_are():
    source = replace(context(), ranking=Ranking(top=1))
    rollout, _ = scored_rollouts(source, 0)
    second = rollout[list(range(3, 6))]
    assert torch.equal(
        rank(rollout, source.ranking).keys.table()[1:], rank(second, source.ranking).keys.table()
    )


@pytest.mark.parametrize("kind", [DPO, KTO, SFT, SOAR, RAFT])
def test_what_is_imitated_or_preferred_is_the_velocity_without_guidance(kind, pairs, monkeypatch):
    """However images are sampled; SOAR alone takes the step that errs under its own."""
    objective = kind()
    source = context(None if objective.learns_from is Rollout else pairs)
    source.policy.sampler = replace(source.policy.sampler, guidance=3.0)
    batch, _ = source_of(objective.learns_from, source)(0)
    assert batch.cond.guidance == 3
    asked, velocity = [], Policy.velocity

    def asking(policy, x, t, cond):
        asked.append(cond.guidance)
        return velocity(policy, x, t, cond)

    monkeypatch.setattr(Policy, "velocity", asking)
    one = next(iter(split(source.policy, objective, batch, len(batch) * batch.images_per_row)))
    objective.loss(source.policy, one.batch, one.draw)
    assert set(asked) == ({1, objective.guidance} if isinstance(objective, SOAR) else {1})


# groups without spread


def flat(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """Equal for the first caption, and otherwise brightness."""
    return images.mean((1, 2, 3)) * torch.tensor(
        [float(prompt != CAPTIONS[0]) for prompt in prompts]
    )


@pytest.mark.parametrize(("drop", "rows"), [(False, 6), (True, 3)])
def test_groups_of_equal_rewards_are_dropped_on_request(drop, rows):
    source = context(drop_equal_groups=drop)
    source = replace(
        source,
        scorer=replace(source.scorer, rewards=[Reward("flat", flat)]),
        prompts=[Prompt(c) for c in CAPTIONS[:2]],
    )
    rollout, metrics = scored_rollouts(source, 0)
    assert metrics["reward/groups_without_spread"] == 0.5
    assert len(rollout) == 6
    assert len(rollout.trainable_rows()) == rows
    assert drop == (set(rollout.trainable_rows().prompts) == {CAPTIONS[1]})


def test_a_prompt_is_dropped_if_its_advantages_are_equal_whatever_its_rewards_are():
    """1 · a + 2 · b is 2 for every image, but GDPO normalises a and b one by one."""

    def looked_up(*scores: float) -> Any:
        return lambda images, prompts, metadata: torch.tensor(scores)[
            (images[:, 0, 0, 0] * 255).round().long()
        ]

    supplied = context(drop_equal_groups=True)
    rollout = scored_rollouts(supplied, 0)[0]
    number = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1)
    rollout = replace(rollout, images=number.expand_as(rollout.images).clone())
    rewards = [
        Reward("a", looked_up(0, 1, 0, 0, 0, 0)),
        Reward("b", looked_up(1, 0.5, 1, 1, 1, 1), weight=2.0),
    ]
    judge = replace(supplied.scorer, rewards=rewards)
    assert judge([rollout])[0].reward.eq(2).all()
    assert len(judge([rollout])[0].trainable_rows()) == 0
    trainable = replace(judge, advantage=gdpo)([rollout])[0].trainable_rows()
    assert trainable.prompts == rollout.prompts[:3]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    "objective", [FlowGRPO(), PRDP(), KTO()], ids=lambda objective: type(objective).__name__
)
def test_an_update_without_trainable_rows_has_no_gradient(objective, dtype):
    policy = make_policy(Sampler(steps=2, dynamics=flow_sde), dtype=dtype)
    policy.images_per_pass = 2
    rollout = collect(policy.at("policy"), two_groups(policy), 6)
    batch = (
        rank(rollout, Ranking())
        if objective.learns_from is Pairs
        else replace(rollout, weight=torch.zeros(6))
    )
    assert len(batch.trainable_rows()) == 0
    assert compute_gradient(policy, objective, batch, 2, meter := Meter()) is None
    assert all(parameter.grad is None for parameter in policy.parameters())
    assert meter.values() == {}


# whole runs


@pytest.fixture
def few_prompts(tmp_path) -> str:
    (tmp_path / "few.txt").write_text("\n".join(CAPTIONS[:2]))
    return str(tmp_path / "few.txt")


def run(folder: Path, objective: str, few_prompts: str, *overrides: str) -> dict[str, Any]:
    changes = [
        f"objective={objective}",
        f"evaluation.prompts={few_prompts}",
        f"output={folder}",
        *overrides,
    ]
    return trainer.train(load_config(TINY, [*SMALL, *changes]))


def test_updates_that_nothing_is_learned_from_move_nothing(few_prompts, tmp_path):
    """Not even by weight decay. If such images are kept, penalty and decay move the weights."""
    (tmp_path / "dull.py").write_text(
        "def dull(images, prompts, metadata):\n    return [0.5] * len(images)\n"
    )
    changes = [
        f"rewards={{'{tmp_path}/dull.py:dull': 1}}",
        "evaluation.rewards={scene_match: 1}",
        "train.save_every=1",
    ]
    for drop in (True, False):
        folder = tmp_path / f"run-{drop}"
        run(
            folder,
            "{name: nft}",
            few_prompts,
            *changes,
            "train.weight_decay=0.5",
            f"train.drop_equal_groups={drop}",
        )
        first, last = (
            read_tensors(saved / "pytorch_lora_weights.safetensors")
            for saved in checkpoints(folder)
        )
        assert all(torch.equal(first[key], last[key]) for key in first) == drop
        assert json.loads((checkpoints(folder)[-1] / "state.json").read_text())["updates"] == (
            0 if drop else 2
        )


GIVEN = ["train.images_per_prompt=1", "train.images_per_pass=2", "train.learning_rate=1e-3"]


@pytest.mark.parametrize(
    "objective",
    [
        "crd",
        "d3po",
        "alignprop",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("nft", "dpo", "prdp")),
    ],
)
def test_an_objective_that_makes_its_images_runs(objective, few_prompts, tmp_path):
    summary = run(
        tmp_path / "run", f"{{name: {objective}}}", few_prompts, "rewards={brightness: 1}"
    )
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["grad_norm"] > 0 for line in lines)
    assert all(isinstance(line["loss"], float) for line in lines)
    assert (lines[-1]["images"], summary["images"]) == (12, 12)
    assert "reward/brightness" in lines[0]
    assert set(summary["after"]) == {"brightness"}


@pytest.mark.parametrize(
    ("objective", "rewards"),
    [
        ("dpo, beta: 1", "{}"),
        ("soar", "{}"),
        pytest.param("kto, beta: 1", "{brightness: 1}", marks=pytest.mark.slow),
        pytest.param("sft", "{}", marks=pytest.mark.slow),
    ],
)
def test_an_objective_that_learns_from_given_pictures_runs(
    objective, rewards, pairs, few_prompts, tmp_path
):
    changes = [f"data.pairs={pairs}", f"rewards={rewards}", f"evaluation.pairs={pairs}", *GIVEN]
    summary = run(tmp_path / "run", f"{{name: {objective}}}", few_prompts, *changes)
    lines = read_metrics(tmp_path / "run")
    assert all(line["grad_norm"] > 0 for line in lines)
    assert all(line["loss"] > 0 for line in lines)
    assert [line["images"] for line in lines] == [0, 0]
    assert summary["images"] == 0
    written = json.loads((tmp_path / "run" / "summary.json").read_text())
    paired = "beta" in objective
    figures = {
        "reconstruction_error",
        *(["chosen_preferred", "margin"] if paired else []),
        *(["brightness"] if rewards != "{}" else []),
    }
    assert set(written["before"]) == set(written["after"]) == set(written["difference"]) == figures
    assert written["before"]["reconstruction_error"] > 0
    if paired:
        assert written["before"]["chosen_preferred"] == 0.5
        assert written["after"]["chosen_preferred"] != 0.5
        assert written["before"]["margin"] == 0
        assert written["after"]["margin"] != 0


def test_given_pictures_need_no_prompts(pairs, tmp_path):
    """Evaluation falls back on theirs."""
    changes = [
        f"data={{prompts: '', pairs: {pairs}}}",
        "objective={name: sft}",
        "evaluation.prompts=''",
        "rewards={}",
        *GIVEN,
    ]
    summary = trainer.train(load_config(TINY, [*SMALL, *changes, f"output={tmp_path / 'run'}"]))
    assert summary["stopped"] == "finished"
    assert CAPTIONS[0] in (tmp_path / "run" / "adapter" / "README.md").read_text()


@pytest.fixture
def many_pairs(tmp_path) -> Path:
    """Twenty-four pairs, each with a caption of its own."""
    lines = []
    for i in range(24):
        for name, level in (("bright", 150 + 4 * i), ("dark", 4 * i)):
            Image.new("RGB", (32, 32), (level, level, level)).save(tmp_path / f"{name}{i}.png")
        names = {"chosen": f"bright{i}.png", "rejected": f"dark{i}.png"}
        lines.append(json.dumps({"prompt": f"a circle {i}", **names}))
    (tmp_path / "many.jsonl").write_text("\n".join(lines))
    return tmp_path / "many.jsonl"


@pytest.mark.parametrize("objective", ["dpo, beta: 1", pytest.param("sft", marks=pytest.mark.slow)])
def test_without_held_out_pairs_a_tenth_is_split_off(
    objective, many_pairs, few_prompts, tmp_path, capsys
):
    changes = [f"data.pairs={many_pairs}", "rewards={}", *GIVEN, "train.evaluate_every=1"]
    summary = run(tmp_path / "run", f"{{name: {objective}}}", few_prompts, *changes)
    printed = capsys.readouterr().out
    assert (
        "3 of the 24 entries of data.pairs are held out for evaluations and not trained on, "
        "because evaluation.pairs is not given." in printed
    )
    assert "The 95 % intervals (±) rest on 3 held-out entries." in printed
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Finished after 2 steps" in report
    # Long names may be broken after an underscore.
    assert ">reconstruction_error</td>" in report.replace("<wbr>", "")
    assert 'aria-label="eval/reconstruction_error over step' in report
    paired = "beta" in objective
    figures = {"reconstruction_error", *(["chosen_preferred", "margin"] if paired else [])}
    assert set(summary["before"]) == set(summary["after"]) == set(summary["difference"]) == figures
    assert {f"eval/{name}" for name in figures} <= set(read_metrics(tmp_path / "run")[0])
    if paired:
        assert summary["after"]["chosen_preferred"] * 3 % 0.5 == pytest.approx(0, abs=1e-6)


def test_what_is_held_out_is_never_trained_on(many_pairs, tmp_path):
    changes = [f"data={{prompts: '', pairs: {many_pairs}}}", "rewards={}", *GIVEN]
    overrides = [*SMALL, *changes, "objective={name: sft}", f"output={tmp_path / 'run'}"]
    inputs = read_inputs(load_config(TINY, overrides))
    context = replace(
        assemble(inputs, load_model(inputs.config.model)).context,
        plan=BatchPlan(
            prompts_per_step=24, images_per_prompt=1, updates_per_step=1, max_images_per_pass=8
        ),
    )
    trained = {prompt for step in range(3) for prompt in given_examples(context, step)[0].prompts}
    held_out = {example.prompt.text for example in inputs.held_out}
    assert len(held_out) == 3
    assert len(trained) == 21
    assert not trained & held_out


def given_run(pairs: Path, few_prompts: Path, output: Path, *changes: str) -> Any:
    """A run on given pairs, prepared but not trained."""
    overrides = [
        *SMALL,
        "objective={name: dpo, beta: 1}",
        f"data={{prompts: {few_prompts}, pairs: {pairs}}}",
        f"evaluation={{prompts: {few_prompts}, rewards: {{}}}}",
        "rewards={}",
        *GIVEN,
        "train.learning_rate=1e-2",
        f"output={output}",
        *changes,
    ]
    return trainer.prepare(load_config(TINY, overrides))


@pytest.mark.parametrize("fault", ["removed", "truncated"])
def test_a_picture_that_is_damaged_in_mid_run_costs_no_finished_step(
    fault, pairs, few_prompts, tmp_path
):
    prepared = given_run(pairs, few_prompts, tmp_path / "run", "train.save_every=100")
    in_step = [set(prepared.source(step)[0].prompts) for step in (0, 1)]
    (caption,) = in_step[1] - in_step[0]
    shutil.rmtree(tmp_path / "cache")
    file = pairs.parent / f"bright{CAPTIONS.index(caption)}.png"
    if fault == "removed":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(RunError) as caught:
        trainer.execute(prepared)
    saved = tmp_path / "run" / "checkpoints" / "step-000001"
    line = CAPTIONS.index(caption) + 1
    assert str(caught.value).startswith(f"data.pairs: {pairs}, line {line}")
    assert f"The finished steps are in {saved}." in str(caught.value)
    assert checkpoints(tmp_path / "run") == [saved]


def adapter_of(output: Path) -> bytes:
    return (output / "adapter" / "pytorch_lora_weights.safetensors").read_bytes()


@pytest.mark.parametrize("encoded", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_a_run_that_is_stopped_while_pictures_are_encoded_ends_the_same(
    encoded, pairs, few_prompts, tmp_path, monkeypatch
):
    """What the killed run had encoded is in the cache, and the rest is encoded without it."""
    monkeypatch.setenv("FLOWALIGN_CACHE", str(tmp_path / "whole-cache"))
    trainer.execute(given_run(pairs, few_prompts, tmp_path / "whole"))
    monkeypatch.setenv("FLOWALIGN_CACHE", str(tmp_path / "part-cache"))
    with monkeypatch.context() as killed:
        killed.setattr(DiskCache, "write", stopping_after(encoded))
        with pytest.raises(KeyboardInterrupt):
            trainer.execute(given_run(pairs, few_prompts, tmp_path / "killed"))
    trainer.execute(given_run(pairs, few_prompts, tmp_path / "killed", "train.save_every=1"))
    assert adapter_of(tmp_path / "killed") == adapter_of(tmp_path / "whole")


def stopping_after(count: int) -> Any:
    """A way to write latents that is stopped after some of them, as by a kill."""
    write, written = DiskCache.write, []

    def limited(cache: DiskCache, content: bytes, tensors: dict[str, Tensor]) -> None:
        if len(written) == count:
            raise KeyboardInterrupt
        written.append(content)
        write(cache, content, tensors)

    return limited


def test_captions_are_encoded_before_the_first_step(pairs, few_prompts, tmp_path, monkeypatch):
    """Encoded in a step, they would be in a batch that depends on which are known already."""
    prepared = given_run(pairs, few_prompts, tmp_path / "run")
    model = prepared.state.policy.model
    monkeypatch.setattr(type(model), "encode_texts", None)
    assert [len(prepared.source(step)[0]) for step in (0, 1)] == [2, 2]


@pytest.mark.filterwarnings("error:Attempting to set identical low and high xlims")
def test_the_curves_of_a_run_that_makes_no_images_have_an_axis(pairs, few_prompts, tmp_path):
    run(tmp_path / "run", "{name: sft}", few_prompts, f"data.pairs={pairs}", "rewards={}", *GIVEN)


def test_imitating_pictures_brings_them_nearer(pairs, few_prompts, tmp_path):
    changes = [
        f"data.pairs={pairs}",
        "rewards={}",
        f"evaluation.pairs={pairs}",
        *GIVEN,
        "train.steps=10",
        "train.learning_rate=5e-3",
    ]
    summary = run(tmp_path / "run", "{name: sft}", few_prompts, *changes)
    assert (
        summary["after"]["reconstruction_error"] < 0.9 * summary["before"]["reconstruction_error"]
    )


@pytest.mark.parametrize(
    ("objective", "images"),
    [
        pytest.param("{name: crd}", True, marks=pytest.mark.slow),
        ("{name: dpo, beta: 100, reference: {every: 2}}", False),
    ],
)
def test_stopping_and_going_on_equals_never_stopping(
    objective, images, pairs, few_prompts, tmp_path
):
    changes = [
        "rewards={brightness: 1}",
        "train.learning_rate=1e-2",
        *([] if images else [f"data.pairs={pairs}", *GIVEN]),
    ]
    run(tmp_path / "whole", objective, few_prompts, *changes, "train.steps=3")
    for steps in (2, 3):
        run(tmp_path / "parts", objective, few_prompts, *changes, f"train.steps={steps}")
    whole, parts = (checkpoints(tmp_path / name)[-1] for name in ("whole", "parts"))
    files = sorted(
        path.relative_to(whole) for path in whole.rglob("pytorch_lora_weights.safetensors")
    )
    assert {file.parent.name for file in files} == {
        "",
        "ema",
        *(["old", "sampler"] if images else ["moving_reference"]),
    }
    for file in files:
        one, other = read_tensors(whole / file), read_tensors(parts / file)
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_reference_is_renewed_after_so_many_updates(pairs, few_prompts, tmp_path):
    """After a hard copy the policy is the reference, and the loss is log 2 again."""
    changes = [
        f"data.pairs={pairs}",
        "rewards={brightness: 1}",
        *GIVEN,
        "train.learning_rate=1e-2",
        "train.steps=5",
    ]
    run(tmp_path / "run", "{name: dpo, beta: 100, reference: {every: 2}}", few_prompts, *changes)
    losses = [line["loss"] for line in read_metrics(tmp_path / "run")]
    at_reference = [loss == pytest.approx(math.log(2), abs=1e-7) for loss in losses]
    assert at_reference == [True, False, True, False, True]


def test_a_reward_without_gradient_is_refused_before_training(few_prompts, tmp_path):
    with pytest.raises(UserError, match=r"rewards\.jpeg_size carries no gradient"):
        run(tmp_path / "run", "{name: alignprop}", few_prompts, "rewards={jpeg_size: 1}")


# what an objective is given


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["objective={name: nft}", "data.pairs=p.jsonl"],
            "the objective nft learns from images it makes itself; remove data.pairs",
        ),
        (
            ["objective={name: alignprop}", "data.pairs=p.jsonl"],
            "the objective alignprop learns from images it makes itself",
        ),
        (
            ["objective={name: sft}"],
            "data.pairs is missing: the objective sft learns from given pictures",
        ),
        (
            ["objective={name: dpo}", "data.pairs=p.jsonl"],
            "train.images_per_prompt is 3, but a step takes train.prompts_per_step",
        ),
        (["objective={name: nft}", "data.prompts=''"], "data.prompts is missing"),
        (["objective={name: nft}", "rewards={}"], "rewards is empty; name at least one"),
        (["objective={name: dpo}", "rewards={}"], "rewards is empty; name at least one"),
        (
            ["objective={name: dpo}", "train.images_per_prompt=1"],
            "images of the same prompt are compared; use 2 or more",
        ),
        (
            ["objective={name: prdp}", "sampler.dynamics={name: ode}"],
            "The objective learns from stochastic steps, but sampler",
        ),
    ],
)
def test_an_objective_that_is_not_given_what_it_learns_from_is_answered(overrides, message):
    with pytest.raises(UserError) as caught:
        load_config(TINY, [*SMALL, *overrides])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective={name: alignprop}", "train.images_per_prompt=1", "rewards={brightness: 1}"],
        [
            "objective={name: dpo}",
            "data.pairs=p.jsonl",
            "train.images_per_prompt=1",
            "rewards={}",
            "data.prompts=''",
        ],
        ["objective={name: nft}"],
        [
            "objective={name: nft}",
            "sampler={steps: 8, dynamics: {name: ode}, window: {range: [0, 0]}}",
        ],
        ["objective={name: sft}", "data.pairs=p.jsonl", "train.images_per_prompt=1"],
    ],
)
def test_an_objective_that_is_given_what_it_learns_from_is_not(overrides):
    load_config(TINY, [*SMALL, *overrides])
