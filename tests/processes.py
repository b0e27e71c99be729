"""Fresh processes for tests: one, or two that torchrun connects."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.tiny import ROOT

# Two processes need two GPUs, so they run on the CPU, also where the other tests run on a GPU.
CPU = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
ENVIRONMENT = {**os.environ, **CPU, "PYTHONPATH": str(ROOT)}
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


def start_two(script: Path, *arguments: str) -> list[subprocess.CompletedProcess[str]]:
    """Run a script in two connected processes without a launcher, which would end both at once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    connection = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            cwd=ROOT,
            env={**ENVIRONMENT, **connection, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(processes, outputs, strict=True)
    ]
