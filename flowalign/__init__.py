"""Align text-to-image flow models with rewards and preferences.

    import flowalign

    config = flowalign.load_config("tiny/crd.yaml", ["train.steps=20"])
    summary = flowalign.train(config)
    samples = flowalign.sample(config.output, ["a red circle above a blue square"], images=4)
    samples.save("samples")

Importing the package costs nothing: each name is imported from its module when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

# Type checkers and editors read these imports; at run time the table below replaces them.
if TYPE_CHECKING:
    from flowalign.advantages import RewardTable
    from flowalign.api import (
        compare,
        evaluate,
        export,
        label,
        load_config,
        load_model,
        reward_accuracy,
        sample,
        train,
    )
    from flowalign.batch import Batch, Cond, Examples, Keys, Pairs, Prompts, Rollout
    from flowalign.config.sections import Config
    from flowalign.data.prompts import Prompt
    from flowalign.dynamics import Gaussian
    from flowalign.errors import RunError, UserError
    from flowalign.evaluation.comparison import Comparison
    from flowalign.evaluation.results import EvaluationResult
    from flowalign.models.base import FlowModel
    from flowalign.models.config import Lora, ModelConfig
    from flowalign.objectives.base import Loss, Max, Mean, Objective
    from flowalign.policy import Decay, Policy, Sampler
    from flowalign.rewards.base import LearnedReward, Reward, traits
    from flowalign.rewards.registry import load_reward
    from flowalign.sampling.result import SampleResult
    from flowalign.tracking.base import TrackedRun, Tracker

__version__ = "0.1.0"

_HOMES = {
    "Batch": "batch",
    "Comparison": "evaluation.comparison",
    "Cond": "batch",
    "Config": "config.sections",
    "Decay": "policy",
    "EvaluationResult": "evaluation.results",
    "Examples": "batch",
    "FlowModel": "models.base",
    "Gaussian": "dynamics",
    "Keys": "batch",
    "LearnedReward": "rewards.base",
    "Lora": "models.config",
    "Loss": "objectives.base",
    "Max": "objectives.base",
    "Mean": "objectives.base",
    "ModelConfig": "models.config",
    "Objective": "objectives.base",
    "Pairs": "batch",
    "Policy": "policy",
    "Prompt": "data.prompts",
    "Prompts": "batch",
    "Reward": "rewards.base",
    "RewardTable": "advantages",
    "Rollout": "batch",
    "RunError": "errors",
    "SampleResult": "sampling.result",
    "Sampler": "policy",
    "TrackedRun": "tracking.base",
    "Tracker": "tracking.base",
    "UserError": "errors",
    "compare": "api",
    "evaluate": "api",
    "export": "api",
    "label": "api",
    "load_config": "api",
    "load_model": "api",
    "load_reward": "rewards.registry",
    "reward_accuracy": "api",
    "sample": "api",
    "train": "api",
    "traits": "rewards.base",
}
"""The module that defines each public name. A test compares this table with `__all__`."""

__all__ = [
    "Batch",
    "Comparison",
    "Cond",
    "Config",
    "Decay",
    "EvaluationResult",
    "Examples",
    "FlowModel",
    "Gaussian",
    "Keys",
    "LearnedReward",
    "Lora",
    "Loss",
    "Max",
    "Mean",
    "ModelConfig",
    "Objective",
    "Pairs",
    "Policy",
    "Prompt",
    "Prompts",
    "Reward",
    "RewardTable",
    "Rollout",
    "RunError",
    "SampleResult",
    "Sampler",
    "TrackedRun",
    "Tracker",
    "UserError",
    "__version__",
    "compare",
    "evaluate",
    "export",
    "label",
    "load_config",
    "load_model",
    "load_reward",
    "reward_accuracy",
    "sample",
    "train",
    "traits",
]


def __getattr__(name: str) -> object:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    # Python calls this function only for names that the module lacks, so the next access is direct.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
