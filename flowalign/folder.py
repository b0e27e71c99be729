"""The run folder: which run may go on in it, its resolved configuration, and what it hands over."""

import fcntl
import json
import resource
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, IO

import torch
import yaml
from safetensors.torch import save_file

from flowalign import checkpoint, processes
from flowalign.batch import Batch
from flowalign.config import Config
from flowalign.data import read_prompts
from flowalign.errors import UserError
from flowalign.pairs import read_examples
from flowalign.policy import Policy
from flowalign.settings import settings_of
from flowalign.tracking import environment, to_json

BEFORE = Path("evaluation") / "before.safetensors"
FAILURES = "failures"
MAY_CHANGE = (
    *("output", "train.steps", "train.save_every", "train.evaluate_every", "train.keep", "train.stop", "train.max_bad_steps"),
    *("train.learning_rate", "train.cooldown", "train.images_per_pass", "model.gradient_checkpointing", "model.attention"),
)
"""Keys that may differ, with all below them, when a run goes on."""
LOCKS: list[IO[bytes]] = []
"""Held, by being open, until this process ends."""


def open_folder(folder: Path, config: Config, learned: checkpoint.Learned) -> checkpoint.State:
    """A new run folder, or the state of the run that is there. UserError when that run was another experiment."""
    resolved = resolve(config)
    on_main(folder, lambda: claim(folder))
    if saved := checkpoint.checkpoints(folder):
        if changed := sorted(key for key in differing(read_config(folder), resolved) if not may_change(key)):
            another = f"{folder} holds a run with another {', '.join(changed)}"
            raise UserError(f"{another}. Choose another folder, output=outputs/NAME, or remove it.")
        try:
            state = checkpoint.load_checkpoint(learned, saved[-1])
        except UserError as error:
            then = f"to go on from {saved[-2]}" if saved[1:] else "to begin again"
            raise UserError(f"{error} Remove {saved[-1]} {then}.") from None
        if other := [key for key, sum_now in named_files(config).items() if state.files.get(key) != sum_now]:
            began = f"the file is not as it was when the run in {folder} began"
            raise UserError(f"{other[0]}: {began}. Choose another folder, output=outputs/NAME.")
        if processes.is_main():
            print(f"Going on from {saved[-1]}.")
    else:
        state = checkpoint.State(files=named_files(config))
    processes.wait()  # until all have read
    on_main(folder, lambda: begin(folder, resolved, anew=not saved))
    processes.wait()
    return state


def named_files(config: Config) -> dict[str, str]:
    """SHA-256 of the files of prompts and pairs, by their keys."""
    data, evaluation = config.data, config.evaluation
    named = {"data.prompts": data.prompts, "data.pairs": data.pairs}
    named |= {"evaluation.prompts": evaluation.prompts, "evaluation.pairs": evaluation.pairs}
    return {key: checkpoint.sha256(Path(path)) for key, path in named.items() if Path(path).is_file()}


def on_main(folder: Path, work: Callable[[], None]) -> None:
    """Let the main process work in the folder; where it cannot, UserError on all."""

    def attempt() -> None:
        try:
            if processes.is_main():
                work()
        except OSError as error:
            raise UserError(f"output: {folder} cannot be written: {error}. Choose another folder, output=FOLDER.") from None

    processes.together(attempt)


def claim(folder: Path) -> None:
    """Take the folder for this process. UserError where it is another's, or holds what no run wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    theirs = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if theirs and "environment.json" not in theirs and not checkpoint.checkpoints(folder):
        raise UserError(f"output: {folder} holds {theirs[0]}, but no run. Choose another folder, output=outputs/NAME.")
    LOCKS.append((folder / ".lock").open("ab"))
    try:
        fcntl.lockf(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another run works in {folder}. Wait until it ends, or choose another folder, output=FOLDER.") from None
    except OSError:
        pass  # a file system without locks


def begin(folder: Path, resolved: dict[str, Any], anew: bool) -> None:
    """Write what a run is started with; environment.json comes first, by which the folder is known to be a run's."""
    if anew:
        (folder / BEFORE).unlink(missing_ok=True)
    checkpoint.clear_unfinished(folder)
    about = environment(processes.device(), processes.count())
    checkpoint.write_file(folder / "environment.json", json.dumps(about, indent=2).encode())
    checkpoint.write_file(folder / "config.yaml", yaml.safe_dump(resolved, sort_keys=False).encode())


def read_config(folder: Path) -> dict[str, Any]:
    """What a run in the folder was started with."""
    file = folder / "config.yaml"
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        found = error
    if not isinstance(found, dict):
        raise UserError(f"{file} is missing or damaged; choose another folder, output=outputs/NAME, or remove {folder}.")
    return found


def may_change(key: str) -> bool:
    return any(key == known or key.startswith(f"{known}.") for known in MAY_CHANGE)


def resolve(config: Config) -> dict[str, Any]:
    """The configuration with every default written out, as a YAML that loads again."""

    def named(section: str, value: Any) -> dict[str, Any]:
        return {**config.raw[section], **settings_of(value)}

    sampler = {**asdict(config.sampler), "dynamics": named_dynamics(config)}
    sampler["window"] = {**sampler["window"], "range": list(sampler["window"]["range"])}
    return {
        "model": asdict(config.model),
        "sampler": sampler,
        "objective": named("objective", config.objective),
        "advantage": named("advantage", config.advantage),
        "combine": named("combine", config.combine),
        "rewards": config.rewards,
        "data": asdict(config.data),
        "train": asdict(config.train),
        "evaluation": asdict(config.evaluation),
        "output": config.output,
    }


def named_dynamics(config: Config) -> dict[str, Any]:
    """The dynamics with its settings."""
    return {**config.raw["sampler"]["dynamics"], **settings_of(config.sampler.dynamics)}


def differing(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys under which two configurations differ."""
    keys = []
    for key in {*a, *b}:
        one, other = a.get(key), b.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            keys += differing(one, other, f"{prefix}{key}.")
        elif one != other:
            keys.append(prefix + key)
    return keys


def hand_over(policy: Policy, folder: Path, weights: str, config: Config) -> None:
    """The adapter folder, with a README that loads it in diffusers."""
    sampler = config.evaluation_sampler
    extra = "".join(
        f", {name}=None" for name in ("text_encoder_3", "tokenizer_3") if policy.model.pipe.components.get(name, name) is None
    )
    guidance = sampler.guidance if config.model.name == "sd3" else sampler.embedded_guidance
    pipeline = policy.model.pipeline_class.__name__
    dtype, move = ("", "") if config.model.dtype == "float32" else (f", dtype=torch.{config.model.dtype}", '.to("cuda")')
    call = (
        f"num_inference_steps={sampler.steps}, guidance_scale={guidance}, height={config.model.height}, "
        f"width={config.model.width}, max_sequence_length={config.model.max_sequence_length}"
    )
    readme = f"""# A LoRA adapter for {config.model.path}

```python
{"import torch" + chr(10) if dtype else ""}from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained({config.model.path!r}{extra}{dtype}){move}
pipe.load_lora_weights("{folder}")
pipe({first_prompt(config)!r}, {call}).images[0].save("picture.png")
```
"""

    def write(beside: Path) -> None:
        checkpoint.save_adapter(policy, beside, weights)
        (beside / "README.md").write_text(readme)

    checkpoint.write_whole(folder, write)


def write_failure(
    run: Path, learned: checkpoint.Learned, state: checkpoint.State, batch: Batch, facts: dict[str, Any], keep: int
) -> Path:
    """failures/step-000012-update-0-process-0: all as before an update that is not applied, its batch, and why; `keep` stay."""
    folder = run / FAILURES / f"step-{state.step:06d}-update-{facts['update']}-process-{processes.rank()}"
    tensors = {f.name: value for f in fields(batch) if isinstance(value := getattr(batch, f.name), torch.Tensor)}

    def write(beside: Path) -> None:
        save_file({name: value.cpu().contiguous().clone() for name, value in tensors.items()}, beside / "batch.safetensors")
        about = {"prompts": batch.prompts, "metadata": batch.metadata, **facts}
        (beside / "failure.json").write_text(to_json(about, indent=2))
        checkpoint.write_learned(learned, state, beside)

    checkpoint.write_whole(folder, write)
    for old in sorted(folder.parent.glob(f"step-*-process-{processes.rank()}"))[:-keep]:
        shutil.rmtree(old)
    return folder


def first_prompt(config: Config) -> str:
    """A prompt for the README."""
    path = config.evaluation.prompts or config.data.prompts
    return read_prompts(path)[0].text if path else read_examples(config.data.pairs, "data.pairs", paired=False)[0].prompt.text


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
