"""Fresh processes for tests: one, or two that torchrun connects."""

import os
import subprocess
import sys
from pathlib import Path

from tests.tiny import ROOT

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def start(command: list[str], folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        command,
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def run_process(command: list[str], folder: Path = ROOT) -> str:
    """Run a command that must succeed. Returns its output."""
    ended = start(command, folder)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout
