"""The sections of a configuration as dataclasses: keys, types, defaults and ranges.

This module does not import torch, so that a misspelt key is answered at once. Types of the sections
that need torch are named for type checkers only.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Literal, TYPE_CHECKING

from pydantic import Field

from flowalign.config.changes import Changes
from flowalign.evaluation.early_stopping import StopRule
from flowalign.rewards.registry import reward_name
from flowalign.rollouts.ranking_settings import Ranking
from flowalign.settings.merging import Section
from flowalign.settings.types import Count, CountOrZero, Guidance, Positive, Settings, Share

if TYPE_CHECKING:
    from torch import Tensor

    from flowalign.advantages import RewardTable
    from flowalign.models.config import ModelConfig
    from flowalign.objectives.base import Objective
    from flowalign.policy import Sampler
    from flowalign.rewards.combine import Combine

Source = str | dict[str, object]
"""A file, a folder or a data set: its path, or a mapping with the keys of `DataSource`."""

DEFAULTS: Section = {
    "sampler": {"dynamics": {"name": "ode"}},
    "objective": {"name": "flow_grpo"},
    "advantage": {"name": "group"},
    "combine": {"name": "weighted_sum"},
}
"""The names of sections that a file may leave out."""


@dataclass
class Ema(Settings):
    """An exponential moving average of the adapter, evaluated and exported in its place."""

    decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the old average that stays in an update; 0 turns the average off.

    Otherwise the average is evaluated and exported in place of the adapter.
    """
    every: Count = 1
    """Optimizer updates between two updates of the average."""
    warmup: bool = True
    """True to let that share rise as (1 + n) / (10 + n) over the updates n, up to `decay`.

    Without it, the average holds the weights before training for about 1 / (1 - decay) updates.
    """

    def decay_at(self, updates: int) -> float:
        """Return the share of the old average that stays after this many optimizer updates.

        The warm-up is that of the released code of Flow-GRPO, DiffusionNFT, AWM and DGPO.
        """
        if updates % self.every:
            return 1.0
        return min(self.decay, (1 + updates) / (10 + updates)) if self.warmup else self.decay


@dataclass
class Train(Settings):
    """The training loop.

    Prompts, images and updates per step define the experiment. `images_per_pass` only sets how much
    memory it needs, unless the objective draws for each pass (`alignprop`, `refl`).
    """

    steps: Count = 100
    """Training steps of the run."""
    prompts_per_step: Count = 8
    """Prompts of a step, over all processes; entries of `data.pairs` if those are given."""
    images_per_prompt: Count = 8
    """Images generated for each prompt; 1 with `data.pairs`."""
    updates_per_step: Count = 1
    """Optimizer updates of a step, each on its share of the prompts; later ones are off-policy."""
    images_per_pass: Count = 8
    """Images that are generated, scored and trained on at once; lower it if memory runs out."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """AdamW with moments in float32, or in 8 bits."""
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 3e-4
    """Learning rate of AdamW."""
    warmup: CountOrZero = 0
    """Updates at the start during which the learning rate rises from 0."""
    cooldown: CountOrZero = 0
    """Updates at the end during which the learning rate falls to 0."""
    weight_decay: Share = 1e-4
    """Weight decay of AdamW."""
    max_grad_norm: Positive = 1.0
    """Gradients with a larger norm are scaled down to it."""
    ema: Ema = field(default_factory=Ema)
    """Moving average of the adapter."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seed of every random draw."""
    save_every: Count = 50
    """Steps between two checkpoints."""
    evaluate_every: CountOrZero = 50
    """Steps between two evaluations; 0 evaluates only before and after training."""
    keep: Count = 2
    """Number of newest checkpoints that are kept; the best one stays too."""
    drop_equal_groups: bool = False
    """True to leave out prompts whose images all have one advantage; otherwise they count as 0."""
    max_bad_steps: Count = 3
    """Updates in a row with a loss or gradient that is not finite before the run stops.

    A run whose gradient is exactly 0 in ten steps in a row says so, and stops after this many more.
    """
    stop: dict[str, StopRule] = field(default_factory=dict)
    """Rules for early stopping by metric name; the run then exports its best step."""
    export: Literal["last", "best"] = "last"
    """The step that is exported: the last one, or the best evaluated one.

    The best is chosen on one half of the evaluation prompts. Figures are then those of the other.
    """

    @property
    def exports_best(self) -> bool:
        """True if the best step is exported. Rules for stopping look for it, too."""
        return self.export == "best" or bool(self.stop)


@dataclass
class Evaluation(Settings):
    """Evaluation before, during and after training, on fixed prompts and noise, by the ODE."""

    model: str = ""
    """Folder or hub id of another model of the family and size, to make the pictures with.

    For example the model that was distilled to few steps from `model.path`. It takes a copy of the
    adapter. Empty for the model that trains. A repository is read at its newest revision.
    """
    prompts: Source = ""
    """Prompts, written as `data.prompts`.

    If empty, all training prompts (every caption of `data.pairs`).
    """
    images_per_prompt: Count = 1
    """Images generated for each prompt."""
    rewards: dict[str, object] = field(default_factory=dict)
    """Rewards to report, written as the section `rewards`; the training rewards if empty."""
    pairs: Source = ""
    """Held-out pairs or pictures, written as `data.pairs`; a tenth of `data.pairs` if empty."""
    sampler: dict[str, object] = field(default_factory=dict)
    """Keys that differ from `sampler` in evaluations, as in {guidance: 4.5}.

    They are steps, guidance, embedded_guidance and negative_prompt.
    """
    guidance_sweep: list[Guidance] = field(default_factory=lambda: [2.0, 3.0, 4.5, 7.0])
    """Guidance scales to try without the adapter; the best is a second baseline. Empty for none."""


@dataclass
class Data:
    """The training data: prompts to generate images for, or given pictures."""

    prompts: Source = ""
    """A .txt file with a prompt per line, a .jsonl, .csv, .tsv or .parquet file, or owner/name.

    With details: {path: owner/name, split: train, columns: {prompt: caption}}. Other fields and
    columns than `prompt` are metadata for rewards.
    """
    pairs: Source = ""
    """A file, a folder, or owner/name of chosen and rejected pictures, or of single ones.

    With details, written as `prompts`.
    """
    ranking: Ranking = field(default_factory=Ranking)
    """Which pairs there are, and how much each counts, for objectives that learn from pairs."""


@dataclass
class Distributed(Settings):
    """How several processes share the work of a run."""

    shard: bool = False
    """True to split the frozen weights of the transformer over the processes (FSDP2).

    For models that do not fit one GPU. Each block's weights are gathered when it computes.
    """


@dataclass(kw_only=True)
class PlainSections:
    """The sections that are checked before torch is imported."""

    data: Data
    train: Train
    evaluation: Evaluation
    rewards: dict[str, object]
    distributed: Distributed
    tracking: dict[str, dict[str, object]]
    output: str


Advantage = Callable[["RewardTable", "Tensor"], "Tensor"]
"""Takes rewards and groups, and returns advantages."""


@dataclass(kw_only=True)
class Config:
    """A checked configuration. No weights and no data have been loaded for it."""

    model: "ModelConfig"
    sampler: "Sampler"
    objective: "Objective"
    advantage: Advantage
    combine: "Combine"
    rewards: dict[str, object]
    data: Data
    train: Train
    evaluation: Evaluation
    distributed: Distributed
    tracking: dict[str, dict[str, object]]
    """The settings of trackers by name, besides those that every run has."""
    output: str
    """The run folder."""
    raw: Section
    """The merged YAML with references filled in and files located."""
    notes: list[str] = field(default_factory=list)
    """Sentences on settings for the user to read, such as those without effect in this run."""
    changes: Changes | None = None
    """The differences to the file that the YAML extends; None for the file of a run folder."""

    @property
    def objective_name(self) -> str:
        """The name of the objective, as the YAML writes it."""
        return self.name_of("objective")

    @property
    def advantage_name(self) -> str:
        """The name of the advantage, as the YAML writes it."""
        return self.name_of("advantage")

    @property
    def combine_name(self) -> str:
        """The name of the rule that combines rewards, as the YAML writes it."""
        return self.name_of("combine")

    @property
    def dynamics_name(self) -> str:
        """The name of the sampler's dynamics, as the YAML writes it."""
        return self.name_of("sampler", "dynamics")

    def name_of(self, *sections: str) -> str:
        """Return `name` of a section that was built from the YAML."""
        section: object = self.raw
        for key in sections:
            assert isinstance(section, dict)
            section = section[key]
        assert isinstance(section, dict)
        return str(section["name"])

    @property
    def selection_metric(self) -> tuple[str, int]:
        """The metric that ranks evaluations, and 1 if more of it is better or -1 if less is."""
        # Imported here, because it needs torch and this module must not.
        from flowalign.batch import Pairs

        # A user who stops on a metric's fall or rise has said what "better" means.
        for name, rule in self.train.stop.items():
            if rule.falling:
                return name, 1
            if rule.rising:
                return name, -1
        if self.evaluation.rewards:
            return f"eval/{reward_name(next(iter(self.evaluation.rewards)))}", 1
        if self.objective.learns_from is Pairs:
            return "eval/chosen_preferred", 1
        return "eval/reconstruction_error", -1

    @property
    def target_reward(self) -> tuple[str, int] | None:
        """The evaluated reward that a run is about, and 1 if more of it is better or -1 if less is.

        It is the reward that ranks evaluations, or else the first one; None without a reward.
        """
        metric, sign = self.selection_metric
        names = [reward_name(name) for name in self.evaluation.rewards]
        if metric.removeprefix("eval/") in names:
            return metric.removeprefix("eval/"), sign
        return (names[0], 1) if names else None

    @property
    def evaluation_model(self) -> "ModelConfig":
        """The model that pictures are made with in evaluations, and for users of the adapter."""
        if not self.evaluation.model:
            return self.model
        return dataclasses.replace(
            self.model,
            path=self.evaluation.model,
            revision=None,  # model.revision is one of model.path
            adapter="",
            keep_text_encoders=False,
        )

    @property
    def evaluation_sampler(self) -> "Sampler":
        """The sampler of evaluations: the ODE, with the settings of `evaluation.sampler`."""
        from flowalign.dynamics import ode

        # Evaluations before and after training start from equal noise, and nothing else is random.
        return dataclasses.replace(
            self.sampler, dynamics=ode, same_noise=False, **self.evaluation.sampler
        )
