"""Versions, machine and memory of a run."""

import platform
import resource
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import flowalign


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def environment(device: torch.device, processes: int) -> dict[str, Any]:
    """Versions, machine and git state, for environment.json."""
    packages = ("torch", "torchvision", "diffusers", "transformers", "peft", "accelerate")
    git = ""
    if shutil.which("git"):
        command = ["git", "describe", "--always", "--dirty"]
        git = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        ).stdout.strip()
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {
        "versions": {"flowalign": flowalign.__version__}
        | {package: version(package) for package in packages},
        "python": platform.python_version(),
        "device": f"{device} ({name})",
        "processes": processes,
        "threads": torch.get_num_threads(),
        "git": git or None,
    }
