"""Find out what a user wants to sample from: a run, a checkpoint, an adapter, or a model."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from flowalign.bundled import locate
from flowalign.config.load import load_config
from flowalign.config.paths import belongs_to_run
from flowalign.config.sections import Config
from flowalign.data import tables
from flowalign.data.preferences import ANY, read_examples
from flowalign.data.prompts import Prompt, read_prompts
from flowalign.errors import UserError
from flowalign.models.config import Lora, ModelConfig
from flowalign.models.families import describe
from flowalign.policy import Sampler
from flowalign.runs.adapter import ADAPTER_FILE, lora_settings
from flowalign.runs.adapter_card import base_model
from flowalign.runs.checkpoint import trained_weights
from flowalign.sampling.adapters import merged_beside, MixedAdapter, run_adapter

STEPS = 28
"""Sampler steps for a model without a run."""
DEFAULT_PROMPTS = 18
"""Evaluation prompts of a run that are used if no prompt is given."""
PROMPT_FILES = (".txt", ".jsonl", *tables.SUFFIXES)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model to make pictures with, perhaps with an adapter and the run that trained it."""

    model: ModelConfig
    """The model, with the LoRA settings of the adapter."""
    sampler: Sampler
    """How pictures are made by default."""
    adapter: Path | None = None
    """Folder of the adapter's weights."""
    mixed: tuple[MixedAdapter, ...] = ()
    """Further adapters, which are added to it."""
    config: Config | None = None
    """The run, which brings prompts and rewards."""

    @property
    def adapters(self) -> list[MixedAdapter]:
        """All adapters, its own at full strength."""
        own = [MixedAdapter(str(self.adapter))] if self.adapter else []
        return [*own, *self.mixed]


def find_source(source: str, model: str | None = None) -> Source:
    """Find out what a path holds: a run, a checkpoint, an adapter, or a model.

    Args:
        source: A folder, the weights file of an adapter, or a repository on the hub.
        model: The base model of an adapter, if its model card does not name it.

    Raises:
        UserError: The path is none of these.
    """
    folder = Path(locate(source))
    folder = folder.parent if folder.name == ADAPTER_FILE else folder
    is_adapter = (folder / ADAPTER_FILE).is_file()
    if model and not is_adapter:
        raise UserError(
            f"{source} is not an adapter, so --model has no effect on it. Leave out --model."
        )
    # Checkpoints and exported adapters hold this file; a run folder itself does not.
    if is_adapter:
        # With a base model by name, the adapter is used apart from the run it may lie in.
        run = None if model else enclosing_run(folder)
        return from_run(run, trained_weights(folder)) if run else from_adapter(folder, model)
    if (folder / "config.yaml").is_file():
        return from_run(folder, run_adapter(folder))
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise UserError(
            f"{source} holds no run (config.yaml), adapter ({ADAPTER_FILE}) or model "
            "(model_index.json). Give the folder of one of these."
        )
    return from_model(str(folder) if folder.is_dir() else source)


def is_config_file(source: str | Path) -> bool:
    """Return True for a YAML file, which need not exist, and for any file but an adapter's."""
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        return True
    return path.name != ADAPTER_FILE and path.expanduser().is_file()


def from_run(run: Path, adapter: Path) -> Source:
    """Return the source of a run folder with one of its adapters."""
    config = load_config(run / "config.yaml")
    # An exported adapter has copies of those that were merged, which nobody can move or change.
    if merge := merged_beside(adapter):
        config = replace(config, model=replace(config.model, merge=merge))
    return from_config(config, adapter)


def from_config(config: Config, adapter: str | Path | None = None) -> Source:
    """Return the source of a configuration, with an adapter or without."""
    return Source(
        model=config.evaluation_model,
        sampler=config.evaluation_sampler,
        adapter=Path(adapter).expanduser() if adapter else None,
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
    # A card may name a folder next to the adapter, or a model that comes with the package.
    source = from_model(locate(base, [folder]), lora_settings(folder))
    model_config = replace(source.model, merge=merged_beside(folder))
    return replace(source, model=model_config, adapter=folder)


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
        if (parent / "config.yaml").is_file() and belongs_to_run(parent / "config.yaml"):
            return parent
    return None


def read_texts(prompts: Iterable[str | Prompt] | str | Path | None) -> list[Prompt]:
    """Return prompts: texts, or one file of them. None gives an empty list."""
    if prompts is None:
        return []
    texts = [prompts] if isinstance(prompts, str | Path) else list(prompts)
    if len(texts) == 1 and not isinstance(texts[0], Prompt):
        if Path(texts[0]).suffix in PROMPT_FILES:
            return read_prompts(locate(str(texts[0])), "prompts")
    return [text if isinstance(text, Prompt) else Prompt(str(text)) for text in texts]


def evaluation_prompts(config: Config) -> list[Prompt]:
    """Return the evaluation prompts of a run, or else its training prompts, each once."""
    if config.evaluation.prompts:
        return read_prompts(config.evaluation.prompts, "evaluation.prompts")
    if config.data.prompts:
        return read_prompts(config.data.prompts)
    examples = read_examples(config.data.pairs, "data.pairs", ANY)
    return [Prompt(text) for text in dict.fromkeys(example.prompt.text for example in examples)]


def default_prompts(source: Source) -> list[Prompt]:
    """Return a few evaluation prompts, spread evenly over the file."""
    if source.config is None:
        raise UserError(
            "There are no prompts. Give some, or a prompt file: "
            'python sample.py MODEL "a red circle left of a blue square".'
        )
    prompts = evaluation_prompts(source.config)
    # The files sort prompts by kind, so the first ones alone would show one kind.
    count = min(DEFAULT_PROMPTS, len(prompts))
    return [prompts[i * len(prompts) // count] for i in range(count)]
