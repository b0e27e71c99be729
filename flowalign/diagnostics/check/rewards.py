"""A check of the run's rewards on images that its own model makes."""

from collections.abc import Iterator, Sequence

from flowalign import distributed
from flowalign.data.prompts import Prompt
from flowalign.diagnostics.check.probes import pass_size
from flowalign.rewards.base import Reward
from flowalign.rewards.inspection import Finding, inspect_reward, noise_samples, Samples, score
from flowalign.rollouts.collect import collect
from flowalign.training.preflight import keyed_prompts
from flowalign.training.setup import Assembly

SPREAD = 16
"""Prompts on which a reward is tried that scored none of the model's images."""


def check_rewards(assembly: Assembly) -> Iterator[Finding]:
    """Inspect every reward of training and evaluation on a few images of the model."""
    samples = model_samples(assembly)
    trained = {reward.name: reward for reward in assembly.context.scorer.rewards}
    others = {reward.name: reward for reward in assembly.evaluator.scorer.rewards}
    needs_gradient = assembly.config.objective.takes_reward_gradient
    for name, reward in {**others, **trained}.items():
        scores, findings = inspect_reward(reward, samples)
        prompts = assembly.context.prompts if name in trained else assembly.evaluator.prompts
        if scores.isnan().all() and scores_nothing(reward, prompts, samples):
            yield Finding("reward", f"{name}: scores no image, whatever the prompt", wrong=True)
            continue
        # A few images may well all score the same, so the spread is only shown.
        shown = {"scores", "spread"}
        if not (needs_gradient and name in trained):
            shown.add("gradient")
        wrong = any(finding.wrong for finding in findings if finding.subject not in shown)
        text = "; ".join(finding.text for finding in findings[1:])
        yield Finding("reward", f"{name}: {text}", wrong)


def scores_nothing(reward: Reward, prompts: Sequence[Prompt], samples: Samples) -> bool:
    """Return True if the reward scores no noise for prompts that are spread over the file.

    A reward may be for some kind of prompt only, and the first prompts may be of another kind.
    """
    chosen = list(prompts[:: max(1, len(prompts) // SPREAD)])[:SPREAD]
    height, width = samples.images.shape[-2:]
    noise = noise_samples(chosen, height, width, samples.images.device)
    return bool(score(reward, noise).isnan().all())


def model_samples(assembly: Assembly) -> Samples:
    """Make a few images of the run's first prompts, without adapters."""
    policy = assembly.policy.at("reference")
    batch = keyed_prompts(assembly.context, policy)
    rollout = collect(policy, batch, pass_size(policy, len(batch)), "check")
    pairs = zip(batch.prompts, batch.metadata, strict=True)
    images = rollout.images.to(distributed.device()).float() / 255
    return Samples(images=images, prompts=[Prompt(text, metadata) for text, metadata in pairs])
