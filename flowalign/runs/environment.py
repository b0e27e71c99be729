"""Versions, machine and memory use of a run."""

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TypedDict

import torch

import flowalign
from flowalign.bundled import PACKAGE

PACKAGES = ("torch", "torchvision", "diffusers", "transformers", "peft", "accelerate")


class Environment(TypedDict):
    """The content of `environment.json`."""

    versions: dict[str, str]
    python: str
    device: str
    processes: int
    threads: int
    git: str | None


def peak_memory(device: torch.device) -> int:
    """Return the most bytes in use so far: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    # psutil reports no peak on Unix, and `resource` does not exist on Windows.
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, all other systems KiB.
    return largest if sys.platform == "darwin" else largest * 1024


def environment(device: torch.device, processes: int) -> Environment:
    """Describe the versions, the machine and the git state, for `environment.json`."""
    own = {"flowalign": flowalign.__version__}
    return {
        "versions": own | {package: version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "device": f"{device} ({_device_name(device)})",
        "processes": processes,
        "threads": torch.get_num_threads(),
        "git": _git_state(),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def _git_state() -> str | None:
    """Return the commit of a clone, with "-dirty" for local changes, or None outside a clone."""
    if not shutil.which("git"):
        return None
    # An installed package may lie in a repository of the user, whose commit says nothing about it.
    top = _git("rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != PACKAGE.resolve().parent:
        return None
    return _git("describe", "--always", "--dirty") or None


def _git(*arguments: str) -> str:
    """Return what git prints about the folder of the package; nothing if it fails."""
    command = ["git", *arguments]
    result = subprocess.run(command, cwd=PACKAGE, capture_output=True, check=False)
    # As a path, because git writes names in bytes of its own and not in those of the locale.
    return os.fsdecode(result.stdout).strip()
