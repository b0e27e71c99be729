"""Checks of a run's rewards before its model loads: do they fit the objective, and do they work?"""

from collections.abc import Sequence
from dataclasses import replace

from flowalign import distributed
from flowalign.batch import Pairs, Rollout
from flowalign.config.sections import Config
from flowalign.data.prompts import Prompt
from flowalign.errors import RunError, UserError
from flowalign.models.config import ModelConfig
from flowalign.progress import say
from flowalign.rewards import inspection
from flowalign.rewards.base import Reward
from flowalign.rewards.registry import load_rewards, reward_entry
from flowalign.rollouts.batch_plan import BatchPlan


def check_rewards(config: Config, plan: BatchPlan, rewards: Sequence[Reward]) -> None:
    """Check that the objective can use the training rewards. Raises UserError otherwise."""
    learns_from = config.objective.learns_from
    learning = [reward.name for reward in rewards if reward.learner]
    if learning and learns_from not in (Rollout, Pairs):
        raise UserError(
            f"rewards.{learning[0]} learns from whole steps, but the objective "
            f"{config.objective_name} takes each image's gradient. Remove the reward, or "
            "choose an objective that learns from scores."
        )
    comparing = [reward.name for reward in rewards if reward.of_groups]
    if comparing and plan.cuts_groups:
        raise UserError(
            f"rewards.{comparing[0]} compares a prompt's images, but {plan.processes} processes "
            f"share the images of {plan.prompts_per_step // plan.updates_per_step} prompts. Start "
            "a number of processes that divides the prompts of an update."
        )
    passes_cut_groups = plan.images_per_pass % plan.images_per_prompt != 0
    if comparing and config.objective.takes_reward_gradient and passes_cut_groups:
        raise UserError(
            f"Passes have {plan.images_per_pass} images, but rewards.{comparing[0]} compares a "
            "prompt's images, and the objective takes its gradient pass by pass. Set "
            "train.images_per_pass to a multiple of train.images_per_prompt, "
            f"{plan.images_per_prompt}, that divides the images of an update, "
            f"{plan.images_per_update}."
        )


def load_evaluation_rewards(config: Config, rewards: Sequence[Reward]) -> list[Reward]:
    """Return the evaluation's rewards. Those that training also uses are loaded only once."""
    entries = config.evaluation.rewards
    loaded = {
        name: reward
        for name, reward in zip(config.rewards, rewards, strict=True)
        if name in entries and _differ_in_weight_only(name, entries[name], config.rewards[name])
    }
    others = {name: value for name, value in entries.items() if name not in loaded}
    loaded |= dict(zip(others, load_rewards(others, "evaluation.rewards"), strict=True))
    return [loaded[name] for name in entries]


def _differ_in_weight_only(name: str, one: object, other: object) -> bool:
    first, second = reward_entry(name, one), reward_entry(name, other)
    return replace(first, weight=1.0) == replace(second, weight=1.0)


def check_evaluation_rewards(config: Config, rewards: Sequence[Reward]) -> None:
    """Check that the rewards can compare before and after. Raises UserError otherwise."""
    for reward in rewards:
        if reward.learner:
            raise UserError(
                f"{reward.name} changes while it learns, so its scores before and after cannot be "
                "compared. Name other rewards in evaluation.rewards."
            )
        if reward.traits.level == "pairwise":
            raise UserError(
                f"{reward.name} is pairwise: its mean over a prompt's images is always ½, before "
                "and after. Name rewards of single images in evaluation.rewards."
            )
        if reward.of_groups and config.evaluation.images_per_prompt == 1:
            raise UserError(
                f"evaluation.images_per_prompt is 1, but {reward.name} compares a prompt's images. "
                "Write 2 or more, or name other rewards in evaluation.rewards."
            )


def score_noise(
    rewards: Sequence[Reward],
    prompts: list[Prompt],
    model: ModelConfig,
    needs_gradient: bool = False,
    known: Sequence[Reward] = (),
) -> None:
    """Score pictures of noise with each reward, so that mistakes show before the model loads.

    Args:
        rewards: The rewards to try.
        prompts: The prompts that they will be used on.
        model: The section of the model, whose size the pictures have.
        needs_gradient: Whether the objective takes the rewards' gradient.
        known: Rewards that were tried before. Scoring may cost money, so these score only once
            more, for what they need to know of these prompts.

    Raises:
        UserError: A reward raised an error or returned something other than scores.
    """
    samples = inspection.noise_samples(
        prompts[:2] * 2, model.height, model.width, distributed.device()
    )
    for reward in rewards:
        findings = []
        try:
            if reward in known:
                inspection.score(reward, samples)
            else:
                findings = inspection.inspect_scores(reward, samples)[1]
            if needs_gradient:
                findings.append(inspection.inspect_gradient(reward, samples, needed=True))
        except RunError as error:
            raise UserError(str(error)) from error
        for finding in findings:
            # Noise may well score the same everywhere, so equal scores are not worth a message.
            if finding.wrong and finding.subject != "spread" and distributed.is_main():
                say(f"rewards.{reward.name}, {finding.subject}: {finding.text}.")
