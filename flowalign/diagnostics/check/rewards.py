"""A check of the run's rewards on images that its own model makes."""

from collections.abc import Iterator

from flowalign import distributed
from flowalign.batch import Prompts
from flowalign.data.prompts import Prompt
from flowalign.diagnostics.check.probes import pass_size
from flowalign.rewards.inspection import Finding, inspect_reward, Samples
from flowalign.rollouts.collect import collect
from flowalign.training.preflight import keyed_prompts
from flowalign.training.setup import Assembly


def check_rewards(assembly: Assembly) -> Iterator[Finding]:
    """Inspect every reward of training and evaluation on a few images of the model."""
    samples = model_samples(assembly)
    trained = {reward.name: reward for reward in assembly.context.scorer.rewards}
    others = {reward.name: reward for reward in assembly.evaluator.scorer.rewards}
    needs_gradient = assembly.config.objective.learns_from is Prompts
    for name, reward in {**others, **trained}.items():
        findings = inspect_reward(reward, samples)[1]
        # A few images may well all score the same, so the spread is only shown.
        shown = {"scores", "spread"}
        if not (needs_gradient and name in trained):
            shown.add("gradient")
        wrong = any(finding.wrong for finding in findings if finding.subject not in shown)
        text = "; ".join(finding.text for finding in findings[1:])
        yield Finding("reward", f"{name}: {text}", wrong)


def model_samples(assembly: Assembly) -> Samples:
    """Make a few images of the run's first prompts, without adapters."""
    policy = assembly.policy.at("reference")
    batch = keyed_prompts(assembly.context, policy)
    rollout = collect(policy, batch, pass_size(policy, len(batch)), "check")
    pairs = zip(batch.prompts, batch.metadata, strict=True)
    images = rollout.images.to(distributed.device()).float() / 255
    return Samples(images=images, prompts=[Prompt(text, metadata) for text, metadata in pairs])
