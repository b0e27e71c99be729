"""The sections of a YAML file as dataclasses: what may be written, with defaults and ranges."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from flowalign.batch import Pairs
from flowalign.dynamics import ode
from flowalign.evaluation.early_stopping import StopRule
from flowalign.models.config import ModelConfig
from flowalign.objectives.base import Objective
from flowalign.policy import Decay, Sampler
from flowalign.rewards.combine import Combine
from flowalign.rewards.registry import reward_name
from flowalign.rollouts.ranking import Ranking
from flowalign.settings.types import Count, CountOrZero, Positive, Settings, Share

DEFAULTS: dict[str, Any] = {
    "sampler": {"dynamics": {"name": "ode"}},
    "objective": {"name": "flow_grpo"},
    "advantage": {"name": "group"},
    "combine": {"name": "weighted_sum"},
}


@dataclass
class Ema(Settings):
    """An average of the trained adapter, evaluated and saved instead of it. `decay` 0 for none."""

    decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    every: Count = 1
    """Updates between two steps of the average."""

    @property
    def follow(self) -> Decay:
        return Decay(value=self.decay, every=self.every)


@dataclass
class Train(Settings):
    """The loop. The experiment is prompts, images and updates per step; memory only decides images_per_pass."""

    steps: Count = 100
    prompts_per_step: Count = 8
    images_per_prompt: Count = 8
    updates_per_step: Count = 1
    """Each on its share of the step's prompts; the later ones are off-policy, as published."""
    images_per_pass: Count = 8
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 3e-4
    warmup: CountOrZero = 0
    """Updates at the start in which the learning rate rises from 0."""
    cooldown: CountOrZero = 0
    """Updates at the end in which it falls to 0."""
    weight_decay: Share = 1e-4
    max_grad_norm: Positive = 1.0
    ema: Ema = field(default_factory=Ema)
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    save_every: Count = 50
    evaluate_every: CountOrZero = 50
    """Steps; 0 for only before and after."""
    keep: Count = 2
    """Checkpoints that stay."""
    drop_equal_groups: bool = False
    """Whether images of a prompt whose advantages are all equal are left out, instead of having advantage 0. Ties always are."""
    max_bad_steps: Count = 3
    """Updates with a loss or gradient that is not finite, which are not applied, before the run stops."""
    stop: dict[str, StopRule] = field(default_factory=dict)
    """Of metrics by name, when to stop early; the best evaluated weights are handed over then."""


@dataclass
class Evaluation(Settings):
    """Fixed prompts and noise, before and after, by the ODE."""

    prompts: str = ""
    """A prompt file; empty for the training prompts."""
    images_per_prompt: Count = 1
    rewards: dict[str, Any] = field(default_factory=dict)
    """As the training rewards; none for the training rewards themselves."""
    pairs: str = ""
    """As data.pairs: pictures that are not trained on, for reconstruction_error and, where they are pairs, chosen_preferred."""
    sampler: dict[str, Any] = field(default_factory=dict)
    """What differs from the training sampler: steps, guidance."""


@dataclass
class Data:
    """What there is to learn from: prompts to make images for, or given pictures."""

    prompts: str = ""
    """A .txt file (a prompt a line) or a .jsonl file (objects with `prompt`; other fields are metadata)."""
    pairs: str = ""
    """A .jsonl file, a folder, or a dataset of better and worse pictures, or of single ones."""
    ranking: Ranking = field(default_factory=Ranking)
    """Which pairs are made of ranked images, for objectives that learn from pairs where none are given."""


@dataclass
class Config:
    """A run. `raw` is the merged YAML it was built from."""

    model: ModelConfig
    sampler: Sampler
    objective: Objective
    advantage: Callable[..., Any]
    combine: Combine
    rewards: dict[str, Any]
    data: Data
    train: Train
    evaluation: Evaluation
    output: str
    raw: dict[str, Any]

    @property
    def selection_metric(self) -> tuple[str, int]:
        """The metric by which one evaluation is better than another, and 1 where more of it is better, or -1."""
        for name, rule in self.train.stop.items():
            if rule.falling or rule.rising:
                return name, 1 if rule.falling else -1
        if self.evaluation.rewards:
            return f"eval/{reward_name(next(iter(self.evaluation.rewards)))}", 1
        return (
            ("eval/chosen_preferred", 1)
            if self.objective.learns_from is Pairs
            else ("eval/reconstruction_error", -1)
        )

    @property
    def evaluation_sampler(self) -> Sampler:
        return dataclasses.replace(
            self.sampler, dynamics=ode, same_noise=False, **self.evaluation.sampler
        )
