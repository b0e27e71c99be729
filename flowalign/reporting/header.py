"""Describe a run in a few lines before it starts."""

from collections.abc import Mapping

import torch

from flowalign.config.sections import Config
from flowalign.data.source import data_source
from flowalign.models.config import ModelConfig
from flowalign.rewards.registry import reward_entry


def run_facts(config: Config, processes: int, device: torch.device) -> dict[str, str]:
    """Return what a run will do, by the name of the fact.

    Args:
        config: The run.
        processes: Number of processes that share each step.
        device: Device of the first process.
    """
    return {
        "model": model_fact(config.model),
        "objective": config.objective_name,
        **_data_facts(config),
        "training": _training_fact(config),
        "evaluation": _evaluation_fact(config),
        "device": device_fact(processes, device),
        "output": config.output,
    }


def model_fact(model: ModelConfig) -> str:
    """Return path, family, dtype and size of the pictures."""
    return f"{model.path} ({model.name}, {model.precision}, {model.width} x {model.height} pixels)"


def device_fact(processes: int, device: torch.device) -> str:
    """Return processes, device and threads: the first thing to look at if a run is slow."""
    threads = torch.get_num_threads()
    return f"{plural(processes, 'process')} on {device.type}, {plural(threads, 'thread')} each"


def plural(count: int, noun: str) -> str:
    """Return a count with its noun: "1 image", "6 images"."""
    ending = "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{'' if count == 1 else ending}"


def _data_facts(config: Config) -> dict[str, str]:
    if config.data.pairs:
        return {"data": str(data_source(config.data.pairs, "data.pairs"))}
    prompts = str(data_source(config.data.prompts, "data.prompts"))
    return {"rewards": _weights(config.rewards), "prompts": prompts}


def _weights(rewards: Mapping[str, object]) -> str:
    entries = [reward_entry(name, value) for name, value in rewards.items()]
    return ", ".join(f"{entry.name} {entry.weight:g}" for entry in entries)


def _training_fact(config: Config) -> str:
    train = config.train
    if config.data.pairs:
        return f"{plural(train.steps, 'step')} x {train.prompts_per_step} entries"
    # Images per step, rather than passes, are what a run costs on any number of GPUs.
    images = train.prompts_per_step * train.images_per_prompt
    of_prompts = f"({plural(train.prompts_per_step, 'prompt')} x {train.images_per_prompt})"
    return f"{plural(train.steps, 'step')} x {plural(images, 'image')} {of_prompts}"


def _evaluation_fact(config: Config) -> str:
    every = config.train.evaluate_every
    when = f"before, every {plural(every, 'step')}, after" if every else "before and after"
    images = f"{plural(config.evaluation.images_per_prompt, 'image')} per prompt"
    scales = config.evaluation.guidance_sweep if config.target_reward else []
    tried = ", ".join(f"{scale:g}" for scale in scales)
    model = config.evaluation.model
    where = f" on {model}" if model else ""
    return f"{when}{where}; {images}" + (
        f"; the base at its best guidance of {tried}" if tried else ""
    )
