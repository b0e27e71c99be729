"""Functions of the Python API: `flowalign.train`, `flowalign.sample` and their kind.

The command line calls the same functions. Everything heavy is imported inside them, so that a
misspelt key in a YAML file is answered before PyTorch's models are imported.
"""

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TYPE_CHECKING, TypedDict, Unpack

from flowalign import progress
from flowalign.bundled import locate
from flowalign.errors import UserError
from flowalign.reporting import console as screen

if TYPE_CHECKING:
    from flowalign.config.sections import Config
    from flowalign.data.prompts import Prompt
    from flowalign.evaluation.comparison import Comparison
    from flowalign.evaluation.results import EvaluationResult
    from flowalign.models.base import FlowModel
    from flowalign.models.config import ModelConfig
    from flowalign.reporting.summary import Summary
    from flowalign.rewards.accuracy import Accuracy
    from flowalign.sampling.result import SampleResult


class SampleOptions(TypedDict, total=False):
    """Keyword arguments of `sample`."""

    images: int
    seed: int
    steps: int | None
    guidance: float | None
    negative_prompt: str | None
    model: str | None
    rewards: Iterable[str]
    adapters: Iterable[str | Path]
    strengths: Iterable[float]


class LabelOptions(TypedDict, total=False):
    """Keyword arguments of `label`."""

    mode: Literal["pair", "group", "thumbs"]
    pictures: int
    questions: int
    prompts: str
    votes: str
    voter: str
    seed: int
    choose: Literal["random", "active"]
    features: str
    stores: bool


Overrides = Iterable[str] | Mapping[str, Any]
"""Settings that replace those of a file: `["train.steps=3"]` or `{"train.steps": 3}`."""


def load_config(path: str | Path, overrides: Overrides = ()) -> "Config":
    """Read and check a YAML file. No weights are loaded.

    Args:
        path: The file. `tiny/crd.yaml` also finds a configuration that comes with the package.
        overrides: Settings that replace those of the file, by dotted key.

    Raises:
        UserError: A key or a value is wrong. The message says what to write instead.

    Example:
        >>> config = flowalign.load_config("configs/tiny/crd.yaml", ["train.steps=3"])
        >>> config.train.steps
        3
        >>> flowalign.load_config("configs/tiny/crd.yaml", {"train.ema.decay": 0.9}).train.ema.decay
        0.9
    """
    from flowalign.config.load import load_config

    return load_config(path, _as_strings(overrides))


def train(config: "Config | str | Path", overrides: Overrides = ()) -> "Summary":
    """Train an adapter and return the content of `summary.json`.

    A run that was interrupted is resumed from its last checkpoint. The adapter, the report and all
    metrics are written to the folder `config.output`.

    Args:
        config: A configuration, or the path of a YAML file.
        overrides: Settings that replace those of the file. Only for a path.

    Returns:
        `before` and `after`: the mean of each evaluation reward. `difference`: low end, mean and
        high end of the 95 % interval of its change. `baseline_guided`: the model without adapter at
        its best guidance, and what training adds to that. Further keys: `prompts`,
        `held_out`, `images`, `seconds`, `peak_memory_bytes`, `stopped`, `weights`, `step`,
        `chosen_by`, `better_step`.

    Raises:
        UserError: The configuration cannot work. The message says what to write instead.
        RunError: The run failed, for example because a reward raised an error.
        SystemExit: SIGTERM stopped the run. Its finished steps are saved.

    Example:
        >>> config = flowalign.load_config(
        ...     "configs/tiny/crd.yaml",
        ...     {
        ...         "train.steps": 1,
        ...         "evaluation.images_per_prompt": 1,
        ...         "evaluation.guidance_sweep": [],
        ...         "output": "outputs/first",
        ...     },
        ... )
        >>> summary = flowalign.train(config)
        >>> summary["stopped"], summary["step"]
        ('finished', 1)
    """
    with screen.shown() as console, _checked_config(config, overrides) as checked:
        with progress.task("importing PyTorch and diffusers"):
            from flowalign import distributed
            from flowalign.reporting.header import run_facts
            from flowalign.training import trainer

            facts = run_facts(checked, distributed.count(), distributed.device())
        screen.print_facts(console, "flowalign train", facts)
        _say_notes(checked)
        return trainer.train(checked)


def check(config: "Config | str | Path", overrides: Overrides = ()) -> bool:
    """Measure on the model itself whether a run would work, and print the findings.

    Returns True if nothing is wrong.
    """
    with screen.shown(), _checked_config(config, overrides) as checked:
        with progress.task("importing PyTorch and diffusers"):
            from flowalign.diagnostics.check import check
        _say_notes(checked)
        return check(checked, progress.say)


def plan(
    config: "Config | str | Path",
    overrides: Overrides = (),
    gpu: str | None = None,
    memory: float | None = None,
) -> list[str]:
    """Predict memory and time of a run without loading weights. Returns lines of text.

    Args:
        config: A configuration, or the path of a YAML file.
        overrides: Settings that replace those of the file. Only for a path.
        gpu: Name of a GPU, such as "h100", whose speed the times are for.
        memory: Memory in GB that `train.images_per_pass` should fit; that of the GPU by default.
    """
    with screen.shown(), _checked_config(config, overrides) as checked:
        from flowalign.diagnostics.plan import report

        _say_notes(checked)
        return list(report(checked, gpu, memory))


def evaluate(
    source: "Config | str | Path", adapter: str | Path | None = None
) -> "EvaluationResult":
    """Score the evaluation prompts of a run or of a configuration.

    The prompts, noise and sampler are those of `evaluation` in the configuration, so results of the
    same configuration can be compared image by image.

    Args:
        source: A run folder, the path of a YAML file, or a configuration.
        adapter: An adapter folder. A run folder brings its own; a configuration without adapter
            evaluates the model as it is.

    Returns:
        The rewards of every image (`rewards`), their means (`means`), and some of the images.

    Raises:
        UserError: The source has no evaluation prompts, or the adapter's rank, layers or alpha
            differ from those of `model.lora`.

    Example:
        >>> small = {"evaluation.images_per_prompt": 1, "evaluation.sampler.steps": 2}
        >>> config = flowalign.load_config("configs/tiny/crd.yaml", small)
        >>> result = flowalign.evaluate(config)
        >>> 0 <= result.means["scene_match"] <= 1
        True
    """
    with screen.shown():
        _import_sampling()
        from flowalign.config.sections import Config
        from flowalign.sampling import generate, sources

        if isinstance(source, Config):
            origin = sources.from_config(source, adapter)
        elif sources.is_config_file(source):
            origin = sources.from_config(load_config(source), adapter)
        else:
            origin = sources.find_source(str(source))
            # A user may compare other weights with those of the run, from the same noise.
            if adapter:
                origin = replace(origin, adapter=Path(adapter).expanduser())
        _check_launch(origin.model)
        return generate.evaluate(origin)


def sample(  # noqa: PLR0913 - keyword arguments, as in the call of a diffusers pipeline
    source: str | Path,
    prompts: "Iterable[str | Prompt] | str | Path | None" = None,
    images: int = 1,
    seed: int = 0,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str | None = None,
    model: str | None = None,
    rewards: Iterable[str] = (),
    adapters: Iterable[str | Path] = (),
    strengths: Iterable[float] = (),
) -> "SampleResult":
    """Make pictures with a model, and with its adapters from the same noise.

    Args:
        source: The folder of a run, checkpoint, adapter or model, or a model on Hugging Face's hub.
        prompts: Texts, or one file of prompts; evaluation prompts of the run by default.
        images: Pictures per prompt.
        seed: The noise depends on it, on the prompt's position and on the picture's number alone.
        steps: Sampler steps; those of the run's evaluation, or 28.
        guidance: Guidance scale; that of the run's evaluation, or the default of the model family.
        negative_prompt: What guidance leads away from; that of the run's evaluation, or nothing.
        model: The base model of an adapter whose model card does not name it.
        rewards: Rewards that score the pictures, as for `load_reward`. No others are loaded.
        adapters: Further adapters, which are added: runs, folders or files of diffusers, PEFT or
            kohya's scripts, such as "style" or "style:0.7" with a strength.
        strengths: Factors of the adapters' effect. Each gives pictures of the same prompts and
            noise, in `result.strip`.

    Returns:
        Pictures, prompts and scores; in `result.before` the same without the adapters, if any. With
        `strengths`, the pictures are those of the last one.

    Raises:
        UserError: The source is none of these, its adapter does not fit, or it needs no `model`.

    Example:
        >>> flowalign.sample("assets/tiny-sd3", ["a red circle"], images=2, steps=4).images.shape
        torch.Size([2, 3, 64, 64])
    """
    with screen.shown() as console:
        _import_sampling()
        from flowalign.sampling import generate, sources
        from flowalign.sampling.adapters import read_mixed

        settings = generate.SampleSettings(
            images=images,
            seed=seed,
            steps=steps,
            guidance=guidance,
            negative_prompt=negative_prompt,
            rewards=tuple(rewards),
            strengths=tuple(dict.fromkeys(strengths)),
        )
        origin, texts = sources.find_source(str(source), model), sources.read_texts(prompts)
        origin = replace(origin, mixed=tuple(map(read_mixed, adapters)))
        _check_launch(origin.model)
        facts = generate.describe_source(origin, texts, settings)
        screen.print_facts(console, "flowalign sample", facts)
        return generate.sample(origin, texts, settings)


def sample_to_folder(
    source: str | Path,
    prompts: "Iterable[str | Prompt] | None",
    output: str | Path | None,
    **settings: Unpack[SampleOptions],
) -> Path:
    """Make pictures as `sample` does, save them, and print the scores. Returns the folder.

    Args:
        source: As for `sample`.
        prompts: As for `sample`.
        output: A folder without such pictures. By default `samples` in the run folder or in
            `outputs`, with a number at its end if it exists.
        settings: Further arguments of `sample`.
    """
    with screen.shown():
        _import_sampling()
    from flowalign.reporting.header import plural
    from flowalign.reporting.summary import Baseline
    from flowalign.sampling import generate

    # The folder is checked first: an hour of sampling must not end with a refusal.
    folder = generate.output_folder(str(source), output)
    result = sample(source, prompts, **settings)
    console = screen.make_console()
    # Every process has gathered all pictures; only the first may write them.
    if console.quiet:
        return folder
    sheet = result.save(folder)
    if result.strip:
        screen.print_strip({s: each.means for s, each in result.strip.items()}, console)
    if result.difference:
        assert result.before is not None
        base = Baseline(label="base", means=result.before.means, difference=result.difference)
        screen.print_differences(result.means, [base], result.prompt_count)
    pictures = plural(len(result.images) * max(1, len(result.strip)), "picture")
    console.print(f"Pictures: {sheet} and {pictures} in {folder}", soft_wrap=True)
    return folder


def export(  # noqa: PLR0913 - keyword arguments, one for each option of the command
    run: str | Path,
    step: int | None = None,
    output: str | Path | None = None,
    format: str = "diffusers",
    *,
    push: str | None = None,
    public: bool = False,
) -> Path:
    """Write the adapter of a step that a run keeps, and print where it is.

    Every loader applies it at full strength, because alpha / rank is part of its weights. The
    adapter in `RUN/adapter` stays as it is.

    Args:
        run: A run folder, finished or not.
        step: The training step; the last one that is kept by default.
        output: A new folder, or a new file for "comfyui" and "kohya". By default a name in the run
            folder with the step, such as `adapter-step-000100`.
        format: "diffusers" is a folder with a README that shows how to load it. "comfyui" and
            "kohya" are single files. "merged" is a whole model that needs no adapter.
        push: A repository of the Hugging Face hub, as owner/name, to upload the folder to.
        public: True to let everybody see a new repository.

    Returns:
        The folder or the file.

    Raises:
        UserError: The step is not kept, the output exists, the format cannot hold the adapter, or
            the upload fails.

    Example:
        >>> flowalign.export("outputs/crd", step=100).name
        'adapter-step-000100'
        >>> flowalign.export("outputs/crd", step=100, format="comfyui").name
        'adapter-step-000100-comfyui.safetensors'
    """
    with screen.shown():
        with progress.task("importing PyTorch and diffusers"):
            from flowalign.runs.export import export_step
            from flowalign.runs.push import check_push, push_adapter
        if push:
            check_push(push, format)
        target = Path(output).expanduser() if output else None
        written = export_step(Path(run).expanduser(), step, target, format)
        label = "Model" if format == "merged" else "Adapter"
        progress.say(f"{label}: {written}")
        if push:
            address = push_adapter(Path(run).expanduser(), step, written, push, public)
            progress.say(f"Hub:     {address}")
        return written


def label(
    source: str | Path,
    *,
    model: str | None = None,
    port: int = 0,
    opens: bool = True,
    **settings: Unpack[LabelOptions],
) -> None:
    """Open a page on which people choose among pictures, until Ctrl-C ends it.

    The page is served on this machine alone. Every vote is stored at once, and a later call
    continues with the next question. `data.pairs` trains on the vote file.

    Args:
        source: A run folder, a YAML file, an adapter or a model, which make the pictures; or a
            folder of pictures.
        model: The base model of an adapter whose model card does not name it.
        port: The port on 127.0.0.1; 0 for a free one.
        opens: True to open the page in a browser.
        settings: See `flowalign.labelling.label.LabelSettings`.

    Raises:
        UserError: The source is none of these, there are no prompts, or the vote file belongs to
            other pictures.
    """
    with screen.shown():
        with progress.task("importing PyTorch and diffusers"):
            from flowalign.labelling import label as labelling
        options = labelling.LabelSettings(**settings)
        session = labelling.open_session(str(source), options, model)
        labelling.serve(session, options.voter, port, opens)


def compare(runs: Iterable[str | Path], output: str | Path | None = None) -> "Comparison":
    """Compare finished runs, print the differences, and write a page with plots.

    The runs must share what they were evaluated on: model, prompts, sampler, and `train.seed`, from
    which the noise is drawn. Their files are read, and neither a model nor a reward is loaded.

    Args:
        runs: Two or more run folders. The others are compared with the first.
        output: The page; `comparison.html` beside the first run by default.

    Returns:
        `means[run][score]`, and `difference[run][score]`: low end, mean and high end of the 95 %
        interval of the run minus the first, paired by prompt.

    Raises:
        UserError: A run is not finished, or the runs were not evaluated in the same way.

    Example:
        >>> comparison = flowalign.compare(["outputs/crd", "outputs/awm"])
        >>> comparison.runs
        ['crd', 'awm']
        >>> low, mean, high = comparison.difference["awm"]["scene_match"]
    """
    with screen.shown() as console:
        with progress.task("importing PyTorch"):
            from flowalign.reporting.comparison import print_comparison
            from flowalign.runs.comparable import compare_runs
        page = Path(output).expanduser() if output else None
        comparison, page = compare_runs([Path(run).expanduser() for run in runs], page)
        print_comparison(comparison, console)
        progress.say(f"Page: {page}")
        return comparison


def inspect_reward(spec: str, images: str | Path | None = None) -> bool:
    """Score pictures with a reward and print range, determinism, speed and gradient.

    Args:
        spec: A built-in name, `my_rewards.py:redness`, or a YAML map with settings.
        images: A folder of pictures; bundled samples by default.

    Returns:
        True if no problem was found.
    """
    # Standard output is for the findings alone.
    with screen.shown(screen.make_console(stderr=True)), progress.task(f"loading {spec}"):
        from flowalign.rewards.inspection import bundled_samples, print_inspection, samples_from
        from flowalign.rewards.registry import load_reward

        samples = samples_from(str(images)) if images else bundled_samples()
        reward = load_reward(spec)
    return print_inspection(reward, samples)


def reward_accuracy(rewards: Iterable[str], votes: str | Path) -> "dict[str, Accuracy]":
    """Measure how often rewards agree with people on which of two pictures is better.

    Args:
        rewards: Built-in names, `my_rewards.py:redness`, or YAML maps with settings.
        votes: A vote file with stored pictures, or pairs as `data.pairs` has them.

    Returns:
        By reward: the share of pairs in the same order, with a 95 % interval. Ties of voters do
        not count, and equal scores count as half.

    Example:
        >>> scores = flowalign.reward_accuracy(["scene_match"], "assets/pairs/evaluation.parquet")
        >>> scores["scene_match"].share > 0.9
        True
    """
    # Standard output is for the figures alone.
    with screen.shown(screen.make_console(stderr=True)):
        with progress.task("importing PyTorch"):
            from flowalign.data.preferences import PAIRS, read_examples
            from flowalign.rewards.accuracy import reward_accuracy
            from flowalign.rewards.registry import load_specs

        examples = read_examples(locate(str(votes)), "votes", PAIRS)
        accuracies = {}
        for reward in load_specs(list(rewards)):
            with progress.task(f"scoring with {reward.name}"):
                accuracies[reward.name] = reward_accuracy(reward, examples)
            print(f"{reward.name:24}{accuracies[reward.name]}")
    return accuracies


def config_schema() -> dict[str, Any]:
    """Return a JSON schema of all sections, with which an editor completes the keys of a YAML."""
    # Standard output is for the schema alone.
    with screen.shown(screen.make_console(stderr=True)):
        with progress.task("reading the settings of every section"):
            from flowalign.config.schema import json_schema

            return json_schema()


def load_model(source: "str | Path | ModelConfig", device: str | None = None) -> "FlowModel":
    """Load a model: from a folder, from the Hugging Face hub, or as a configuration says.

    Args:
        source: A folder in diffusers' layout, the name of a repository, or `config.model`.
        device: Such as "cuda:1"; a GPU if there is one by default.

    Example:
        >>> model = flowalign.load_model("assets/tiny-sd3")
        >>> policy = flowalign.Policy(model, flowalign.Sampler(steps=4))
        >>> policy.encode(["a red circle"]).guidance
        1.0
    """
    from flowalign import distributed
    from flowalign.models import load_model
    from flowalign.models.config import ModelConfig
    from flowalign.models.families import describe

    config = source if isinstance(source, ModelConfig) else describe(locate(str(source)))
    with screen.shown():
        return load_model(config, device or str(distributed.device()))


@contextmanager
def _checked_config(config: "Config | str | Path", overrides: Overrides) -> "Iterator[Config]":
    """Load a configuration if only its path is known, and name the file in every user error."""
    # A configuration that was loaded earlier no longer belongs to one file.
    if not isinstance(config, str | Path):
        if _as_strings(overrides):
            raise UserError(
                "A loaded configuration takes no overrides. Give the overrides to load_config."
            )
        _check_launch(config.model)
        yield config
        return
    from flowalign.errors import naming

    checked = load_config(config, overrides)
    with naming(config):
        _check_launch(checked.model)
        yield checked


def _check_launch(model: "ModelConfig") -> None:
    """Refuse settings of the launcher that would have no effect. Processes connect after this."""
    from flowalign.config.launch import check_launch

    check_launch(model.dtype, os.environ)


def _import_sampling() -> None:
    """Import everything heavy while the display shows that something happens."""
    if "flowalign.sampling.generate" in sys.modules:
        return
    with progress.task("importing PyTorch and diffusers"):
        import flowalign.sampling.generate  # noqa: F401 - imported for what it costs


def _say_notes(config: "Config") -> None:
    """Print which settings have no effect."""
    for note in config.notes:
        progress.say(f"Note: {note}")


def _as_strings(overrides: Overrides) -> list[str]:
    """Return overrides as the command line has them."""
    # One form from here on: errors then quote overrides as they would be typed.
    if isinstance(overrides, Mapping):
        return [f"{key}={_as_yaml(value)}" for key, value in overrides.items()]
    return list(overrides)


def _as_yaml(value: object) -> str:
    """Return a value as YAML on one line, which is JSON but for numbers that JSON lacks."""
    if isinstance(value, Mapping):
        entries = [f"{_as_yaml(str(key))}: {_as_yaml(entry)}" for key, entry in value.items()]
        return f"{{{', '.join(entries)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_as_yaml(entry) for entry in value)}]"
    if isinstance(value, float) and not math.isfinite(value):
        # JSON's own Infinity and NaN would be texts in YAML.
        return f"{'-' if value < 0 else ''}.{'nan' if math.isnan(value) else 'inf'}"
    # YAML reads the two escapes of an emoji as two broken characters, so nothing is escaped.
    return json.dumps(value, ensure_ascii=False, default=os.fspath)
