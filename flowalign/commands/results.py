"""Commands about trained runs: export and compare."""

import argparse

from flowalign import api
from flowalign.commands.command import Command, Commands


def add_export(commands: Commands) -> None:
    """Add the command `export`."""
    command = Command(
        name="export",
        summary="write the adapter of a step that a run keeps, for other tools",
        examples="  flowalign export outputs/crd --step 50\n"
        "  flowalign export outputs/crd --step 50 --output my_adapter\n"
        "  flowalign export outputs/crd --format comfyui --output my_adapter.safetensors\n"
        "  flowalign export outputs/crd --push my_name/my_adapter",
        action=_export,
    )
    parser = command.add_to(commands)
    parser.add_argument("run", metavar="RUN", help="a run folder")
    parser.add_argument(
        "--step",
        type=int,
        metavar="N",
        help="training step whose checkpoint is kept (default: the last one)",
    )
    parser.add_argument(
        "--format",
        choices=["diffusers", "comfyui", "kohya", "merged"],
        default="diffusers",
        help="a folder for diffusers, a file for ComfyUI or kohya's scripts, or a whole model with "
        "the adapter in its weights (default: diffusers)",
    )
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="the folder or file to write (default: adapter-step-000100 and the like in the run)",
    )
    parser.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="upload it to this repository of the Hugging Face hub (default: no upload)",
    )
    parser.add_argument(
        "--public",
        action="store_true",
        help="with --push: let everybody see a new repository (default: private)",
    )


def _export(options: argparse.Namespace) -> int:
    api.export(
        options.run,
        options.step,
        options.output,
        options.format,
        push=options.push,
        public=options.public,
    )
    return 0


def add_compare(commands: Commands) -> None:
    """Add the command `compare`."""
    command = Command(
        name="compare",
        summary="compare finished runs that were evaluated on the same prompts and noise",
        examples="  flowalign compare outputs/crd outputs/awm\n"
        "  flowalign compare outputs/crd outputs/awm outputs/nft --output comparison.html",
        action=_compare,
    )
    parser = command.add_to(commands)
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run folders; the others are compared with the first",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="the page to write (default: comparison.html beside the first run)",
    )


def _compare(options: argparse.Namespace) -> int:
    api.compare(options.runs, options.output)
    return 0
