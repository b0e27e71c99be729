"""Make pictures with a model, and with an adapter from the same noise: before and after."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from torch import Tensor

from flowalign import distributed
from flowalign.advantages import ADVANTAGES
from flowalign.config.load import load_config
from flowalign.config.sections import Config
from flowalign.data.preferences import read_examples
from flowalign.data.prompts import Prompt, read_prompts
from flowalign.errors import UserError
from flowalign.evaluation.evaluator import Evaluator
from flowalign.evaluation.results import EvaluationResult
from flowalign.evaluation.statistics import paired_difference
from flowalign.files import to_json, write_file
from flowalign.models import load_model
from flowalign.models.config import Lora, ModelConfig
from flowalign.models.families import describe
from flowalign.policy import Policy, Sampler
from flowalign.reporting.header import device_fact, model_fact, plural
from flowalign.reporting.images import save_before_after, save_picture, save_sheet, to_pil
from flowalign.reporting.summary import Interval
from flowalign.rewards.combine import COMBINE
from flowalign.rewards.registry import load_rewards
from flowalign.rollouts.scoring import RolloutScorer
from flowalign.runs.adapter import ADAPTER_FILE, load_adapter
from flowalign.runs.adapter_card import base_model, lora_settings
from flowalign.runs.checkpoint import checkpoints
from flowalign.training.setup import assemble, make_scorer, read_inputs

IMAGES_PER_PASS = 16
"""For a model without a run."""
STEPS = 28
"""Sampler steps for a model without a run."""
DEFAULT_PROMPTS = 18
"""Evaluation prompts of a run that are used if no prompt is given."""
PROMPT_FILES = (".txt", ".jsonl")
BEFORE_AFTER, SHEET, SCORES, REWARDS = (
    *("before-after.png", "pictures.png", "scores.json", "rewards.json"),
)
NAMES = (BEFORE_AFTER, SHEET, SCORES, REWARDS, "before", "after", "pictures")
"""Everything that `SampleResult.save` may write into its folder."""


@dataclass(frozen=True)
class SampleSettings:
    """How many pictures to make, and how."""

    images: int = 1
    """Pictures per prompt."""
    seed: int = 0
    """First part of the key that all noise is drawn from."""
    steps: int | None = None
    """Sampler steps; those of the source if None."""
    guidance: float | None = None
    """Guidance scale; that of the source if None."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model to make pictures with, perhaps with an adapter and the run that trained it."""

    model: ModelConfig
    """The model, with the LoRA settings of the adapter."""
    sampler: Sampler
    """How pictures are made by default."""
    adapter: Path | None = None
    """Folder of the adapter's weights."""
    config: Config | None = None
    """The run, which brings prompts and rewards."""


@dataclass(frozen=True, kw_only=True)
class SampleResult:
    """Pictures with their prompts and scores; all lists have one entry per picture."""

    images: Tensor
    """(N, 3, H, W) in bytes, prompt by prompt."""
    prompts: list[str]
    """Text of each picture."""
    prompt_numbers: list[int]
    """Position of each picture's prompt in the list of prompts, from 0."""
    image_numbers: list[int]
    """Number of each picture among those of its prompt, from 0."""
    seed: int
    """Seed of all pictures. Noise is drawn from seed, prompt number and image number."""
    scores: dict[str, list[float]]
    """Each reward of each picture; NaN if a reward gave no score."""
    means: dict[str, float]
    """Mean of each reward."""
    adapter: Path | None = None
    """Folder of the adapter that was used."""
    before: "SampleResult | None" = None
    """The same prompts and noise without the adapter."""
    difference: dict[str, Interval]
    """Low end, mean and high end of the 95 % interval of each reward's change."""

    @property
    def prompt_count(self) -> int:
        """Number of prompts: what the intervals rest on."""
        return len(set(self.prompt_numbers))

    @property
    def names(self) -> list[str]:
        """File names without ending, such as "003-a-red-circle-image0-seed0"."""
        keys = zip(self.prompt_numbers, self.prompts, self.image_numbers, strict=True)
        return [
            f"{number:03d}-{_slug(prompt)}-image{image}-seed{self.seed}"
            for number, prompt, image in keys
        ]

    def pil(self) -> list[Image.Image]:
        """Return the pictures as PIL images."""
        return [to_pil(image) for image in self.images]

    def save(self, folder: str | Path) -> Path:
        """Save single pictures, a labelled sheet and a JSON file of scores.

        Returns the path of the sheet. Raises UserError if the folder holds such files already.
        """
        folder = free_folder(Path(folder))
        if self.before:
            self.before._save_pictures(folder / "before")
            self._save_pictures(folder / "after")
            sheet = folder / BEFORE_AFTER
            save_before_after(self.before.images, self.images, self.prompts, sheet)
            entries = self.before._entries("before") + self._entries("after")
            write_file(folder / REWARDS, to_json(self._rewards(), indent=2).encode())
        else:
            entries = self._entries("pictures")
            self._save_pictures(folder / "pictures")
            sheet = folder / SHEET
            save_sheet({"": self.images}, self.prompts, sheet)
        write_file(folder / SCORES, to_json(entries, indent=2).encode())
        return sheet

    def _save_pictures(self, folder: Path) -> None:
        for name, image in zip(self.names, self.images, strict=True):
            save_picture(image, folder / f"{name}.png")

    def _rewards(self) -> dict[str, object]:
        assert self.before is not None
        return {
            "before": self.before.means,
            "after": self.means,
            "difference": self.difference,
            "adapter": str(self.adapter),
            "prompts": self.prompt_count,
        }

    def _entries(self, folder: str) -> list[dict[str, object]]:
        """Return one entry per picture: its file, what it was made from, and its scores."""
        return [
            {
                "file": f"{folder}/{name}.png",
                "prompt": self.prompts[i],
                "seed": self.seed,
                "image": self.image_numbers[i],
                "scores": {reward: values[i] for reward, values in self.scores.items()},
            }
            for i, name in enumerate(self.names)
        ]


def find_source(source: str, model: str | None = None) -> Source:
    """Find out what a path holds: a run, a checkpoint, an adapter, or a model.

    Args:
        source: A folder, the weights file of an adapter, or a repository on the hub.
        model: The base model of an adapter, if its model card does not name it.

    Raises:
        UserError: The path is none of these.
    """
    folder = Path(source).expanduser()
    folder = folder.parent if folder.name == ADAPTER_FILE else folder
    if (folder / ADAPTER_FILE).is_file():
        run = None if model else enclosing_run(folder)
        return from_run(run, trained_weights(folder)) if run else from_adapter(folder, model)
    if (folder / "config.yaml").is_file():
        return from_run(folder, run_adapter(folder))
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise UserError(
            f"{source} holds no run (config.yaml), adapter ({ADAPTER_FILE}) or model "
            "(model_index.json). Give the folder of one of these."
        )
    return from_model(source)


def from_run(run: Path, adapter: Path) -> Source:
    """Return the source of a run folder with one of its adapters."""
    config = load_config(run / "config.yaml")
    return from_config(config, adapter)


def from_config(config: Config, adapter: str | Path | None = None) -> Source:
    """Return the source of a configuration, with an adapter or without."""
    return Source(
        model=config.model,
        sampler=config.evaluation_sampler,
        adapter=Path(adapter) if adapter else None,
        config=config,
    )


def from_adapter(folder: Path, model: str | None) -> Source:
    """Return the source of an adapter without a run. Raises UserError if its model is unknown."""
    base = model or base_model(folder)
    if base is None:
        raise UserError(
            f"{folder} does not say which model the adapter belongs to. Name it: --model MODEL, or "
            "write base_model: MODEL into the head of its README.md."
        )
    return replace(from_model(base, lora_settings(folder)), adapter=folder)


def from_model(model: str, lora: Lora | None = None) -> Source:
    """Return the source of a model folder or repository."""
    config = describe(model)
    guidance = {guidance_key(config): config.default_guidance}
    sampler = replace(Sampler(steps=STEPS), **guidance)
    return Source(model=replace(config, lora=lora) if lora else config, sampler=sampler)


def guidance_key(model: ModelConfig) -> str:
    """Return the sampler's field that a pipeline's `guidance_scale` stands for."""
    return "embedded_guidance" if model.embeds_guidance else "guidance"


def enclosing_run(folder: Path) -> Path | None:
    """Return the run folder that an adapter or a checkpoint lies in, or None."""
    for parent in folder.absolute().parents[:4]:  # RUN/checkpoints/step-000100/snapshots/ema
        if (parent / "config.yaml").is_file() and (parent / "environment.json").is_file():
            return parent
    return None


def run_adapter(run: Path) -> Path:
    """Return the exported adapter of a run, or that of its last checkpoint.

    Raises UserError if there is neither.
    """
    if (run / "adapter").is_dir():
        return run / "adapter"
    saved = checkpoints(run)
    if not saved:
        raise UserError(
            f"{run} has no adapter and no checkpoint yet. Train it first: python train.py CONFIG."
        )
    return trained_weights(saved[-1])


def trained_weights(checkpoint: Path) -> Path:
    """Return the weights that a run would export: the moving average if there is one."""
    average = checkpoint / "snapshots" / "ema"
    return average if average.is_dir() else checkpoint


def read_texts(prompts: Iterable[str | Prompt] | str | Path | None) -> list[Prompt]:
    """Return prompts: texts, or one file of them. None gives an empty list."""
    if prompts is None:
        return []
    texts = [prompts] if isinstance(prompts, str | Path) else list(prompts)
    if len(texts) == 1 and not isinstance(texts[0], Prompt):
        if Path(texts[0]).suffix in PROMPT_FILES:
            return read_prompts(str(texts[0]), "prompts")
    return [text if isinstance(text, Prompt) else Prompt(str(text)) for text in texts]


def sample(source: Source, prompts: list[Prompt], settings: SampleSettings) -> SampleResult:
    """Make pictures. Without prompts, a run uses some of its evaluation prompts."""
    prompts = prompts or default_prompts(source)
    policy = load_policy(source, settings)
    evaluator = make_evaluator(source, prompts, settings)
    before = evaluator.judged(evaluator.passes(policy.at("reference")))
    if not source.adapter:
        return _result(before, prompts, settings)
    after = evaluator.judged(evaluator.passes(policy.at("policy")))
    return replace(
        _result(after, prompts, settings),
        adapter=source.adapter,
        before=_result(before, prompts, settings),
        difference=paired_difference(before, after),
    )


def evaluate(source: Source) -> EvaluationResult:
    """Evaluate a run as its training does, with its adapter if there is one.

    Raises UserError if the source has no configuration.
    """
    config = source.config
    if config is None:
        raise UserError("The source has no evaluation prompts. Give a run folder or a YAML file.")
    inputs = distributed.raise_everywhere(lambda: read_inputs(config))
    assembly = assemble(inputs, load_model(config.model, str(distributed.device())))
    policy = assembly.state.policy
    if source.adapter:
        load_adapter(policy, source.adapter)
    weights = policy.at("policy" if source.adapter else "reference")
    return assembly.evaluator(weights.sampling(config.evaluation_sampler))


def describe_source(
    source: Source, prompts: list[Prompt], settings: SampleSettings
) -> dict[str, str]:
    """Return what will be sampled, by the name of the fact."""
    sampler = sampler_of(source, settings)
    guidance = getattr(sampler, guidance_key(source.model))
    prompts = prompts or default_prompts(source)
    images = f"{plural(len(prompts), 'prompt')} x {plural(settings.images, 'image')}"
    facts = {
        "model": model_fact(source.model),
        "sampling": f"{images}, {plural(sampler.steps, 'step')}, guidance {guidance:g}",
        "device": device_fact(distributed.count(), distributed.device()),
    }
    return {**facts, "adapter": str(source.adapter)} if source.adapter else facts


def sampler_of(source: Source, settings: SampleSettings) -> Sampler:
    """Return the sampler of a source with the settings of the user."""
    changes = {"steps": settings.steps, guidance_key(source.model): settings.guidance}
    changes = {name: value for name, value in changes.items() if value is not None}
    return replace(source.sampler, **changes)


def load_policy(source: Source, settings: SampleSettings) -> Policy:
    """Load the model and its adapter."""
    model = load_model(source.model, str(distributed.device()))
    policy = Policy(model, sampler_of(source, settings))
    if source.adapter:
        load_adapter(policy, source.adapter)
    return policy


def make_evaluator(source: Source, prompts: list[Prompt], settings: SampleSettings) -> Evaluator:
    """Return an evaluator that makes the pictures of these prompts and scores them."""
    images_per_pass = source.config.train.images_per_pass if source.config else IMAGES_PER_PASS
    count = len(prompts) * settings.images
    return Evaluator(
        prompts,
        settings.images,
        scorer_of(source),
        images_per_pass,
        settings.seed,
        shown=count,
    )


def scorer_of(source: Source) -> RolloutScorer:
    """Return the evaluation rewards of the run; none without a run."""
    config = source.config
    if config:
        return make_scorer(config, load_rewards(config.evaluation.rewards, "evaluation.rewards"))
    # Nothing is combined or compared without rewards, so the two rules are never called.
    combine, advantage = COMBINE["weighted_sum"](), ADVANTAGES["group"]
    return RolloutScorer([], combine, advantage, IMAGES_PER_PASS, distributed.device())


def evaluation_prompts(config: Config) -> list[Prompt]:
    """Return the evaluation prompts of a run, or else its training prompts, each once."""
    path = config.evaluation.prompts or config.data.prompts
    if path:
        return read_prompts(path)
    examples = read_examples(config.data.pairs, "data.pairs", paired=False)
    return [Prompt(text) for text in dict.fromkeys(example.prompt.text for example in examples)]


def default_prompts(source: Source) -> list[Prompt]:
    """Return a few evaluation prompts, spread evenly over the file."""
    if source.config is None:
        raise UserError(
            "There are no prompts. Give some, or a prompt file: "
            'python sample.py MODEL "a red circle left of a blue square".'
        )
    prompts = evaluation_prompts(source.config)
    count = min(DEFAULT_PROMPTS, len(prompts))
    return [prompts[i * len(prompts) // count] for i in range(count)]


def free_folder(folder: Path) -> Path:
    """Return the folder. Raises UserError if pictures of an earlier call are in it."""
    present = [name for name in NAMES if (folder / name).exists()]
    if present:
        raise UserError(f"{folder} holds {present[0]} already. Choose another folder: --output.")
    return folder


def default_folder(source: str) -> Path:
    """Return a new folder for the pictures of a source: in its run folder, or in `outputs`."""
    folder = Path(source).expanduser()
    run = folder if (folder / "config.yaml").is_file() else enclosing_run(folder)
    return next_folder((run or Path("outputs")) / "samples")


def next_folder(folder: Path) -> Path:
    """Return the folder, or the first of folder-2, folder-3, ... that does not exist."""
    number = 2
    candidate = folder
    while candidate.exists():
        candidate, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    return candidate


def _result(
    result: EvaluationResult, prompts: list[Prompt], settings: SampleSettings
) -> SampleResult:
    numbers = [i // settings.images for i in range(len(prompts) * settings.images)]
    return SampleResult(
        images=result.images,
        prompts=[prompts[number].text for number in numbers],
        prompt_numbers=numbers,
        image_numbers=list(range(settings.images)) * len(prompts),
        seed=settings.seed,
        scores={name: values.tolist() for name, values in result.rewards.items()},
        means=result.means,
        difference={},
    )


def _slug(text: str) -> str:
    """Return the start of a text in characters that every file system takes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:40].strip("-")
