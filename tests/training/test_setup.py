"""Parts of a run that are made from its configuration."""

from dataclasses import replace

import pytest
import torch

from flowalign.config.load import load_config
from flowalign.rollouts.batch_plan import BatchPlan
from flowalign.training import trainer
from flowalign.training.setup import make_scorer
from tests.rollouts.test_scoring import A, C, grey
from tests.tiny import SMALL, small_config, TINY


@pytest.mark.parametrize(
    "combine", ["{name: normalised}", "{name: constrained, at_least: {scene_match: 1}, rate: 1}"]
)
def test_a_second_run_of_one_configuration_starts_with_the_rewards_of_the_first(combine):
    """Both rules keep statistics of every step, and the second step's scores are others."""
    rewards = "rewards={brightness: 1, scene_match: 1}"
    config = load_config(TINY, [*SMALL, rewards, f"combine={combine}"])
    scores = [
        replace(A, name="brightness"),
        replace(C, name="scene_match"),
    ]
    plan = BatchPlan(
        prompts_per_step=1, images_per_prompt=2, updates_per_step=1, max_images_per_pass=2
    )
    first_run = make_scorer(config, plan, scores)
    first_step = first_run([grey([6, 7])])[0].reward
    first_run([grey([8, 8])])
    continued = first_run([grey([6, 7])])[0].reward
    assert not torch.equal(continued, first_step)

    second_run = make_scorer(config, plan, scores)
    assert torch.equal(second_run([grey([6, 7])])[0].reward, first_step)


def test_an_evaluation_does_not_decide_which_prompts_are_encoded_together(tmp_path):
    """A resumed run has not made the evaluations before it was stopped."""
    run = trainer.prepare(small_config(tmp_path / "run"))
    cache = run.state.policy.model._texts
    kept = set(cache._kept)
    assert {prompt.text for prompt in run.evaluator.prompts} <= kept
    cache._kept.clear()
    run.evaluate_reference()
    assert set(cache._kept) == {""}
