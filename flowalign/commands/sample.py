"""The command that makes pictures: sample."""

import argparse

from flowalign import api
from flowalign.commands.command import Command, Commands, numbers, positive
from flowalign.commands.reward import REWARD_SPEC


def add_sample(commands: Commands) -> None:
    """Add the command `sample`."""
    command = Command(
        name="sample",
        summary="make pictures with a run, a checkpoint, an adapter or a model",
        examples='  flowalign sample outputs/crd "a red circle left of a blue square" --images 4\n'
        "  flowalign sample outputs/crd/checkpoints/step-000050 prompts.txt\n"
        '  flowalign sample my_adapter "a red circle" --model assets/tiny-sd3\n'
        '  flowalign sample assets/tiny-sd3 "a red circle" --steps 10 --output pictures\n'
        '  flowalign sample assets/tiny-sd3 "a red circle" --adapter A:0.7 --adapter B:0.5\n'
        '  flowalign sample outputs/crd "a red circle" --strength 0,0.5,1',
        action=_sample,
    )
    parser = command.add_to(commands)
    parser.add_argument(
        "source",
        metavar="RUN_OR_MODEL_OR_ADAPTER",
        help="a run folder, a checkpoint, an adapter, a model folder, or a model on the hub",
    )
    parser.add_argument(
        "prompts",
        nargs="*",
        metavar="PROMPT",
        help="prompts, or one file of them (default: evaluation prompts of the run)",
    )
    parser.add_argument(
        "--images", type=positive, default=1, metavar="N", help="pictures per prompt (default: 1)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed, from 0 to 2^63 - 1 (default: 0)"
    )
    parser.add_argument(
        "--reward",
        action="append",
        default=[],
        metavar="REWARD",
        help=f"score the pictures: {REWARD_SPEC}; may be repeated (default: no scores)",
    )
    _add_adapter_arguments(parser)
    _add_sampler_arguments(parser)


def _add_adapter_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="ADAPTER[:STRENGTH]",
        help="add an adapter of diffusers, PEFT or kohya's scripts, or of a run, at a strength "
        "which is 1 if left out; may be repeated (default: no further adapter)",
    )
    parser.add_argument(
        "--strength",
        type=numbers,
        default=(),
        metavar="S,S,...",
        help="make the same pictures with the adapters at each of these strengths, as one sheet "
        "(default: before and after)",
    )


def _add_sampler_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steps",
        type=positive,
        metavar="N",
        help="sampler steps (default: those of the run's evaluation, or 28)",
    )
    parser.add_argument(
        "--guidance",
        type=float,
        metavar="SCALE",
        help="guidance scale (default: that of the run's evaluation, or of the model family)",
    )
    parser.add_argument(
        "--negative-prompt",
        metavar="TEXT",
        help="what guidance leads away from (default: that of the run's evaluation, or nothing)",
    )
    parser.add_argument(
        "--model", metavar="MODEL", help="base model of an adapter (default: read from its card)"
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help="where to save; files are never replaced "
        "(default: samples, samples-2, ... in the run folder, or in outputs)",
    )


def _sample(options: argparse.Namespace) -> int:
    api.sample_to_folder(
        options.source,
        options.prompts or None,
        options.output,
        images=options.images,
        seed=options.seed,
        steps=options.steps,
        guidance=options.guidance,
        negative_prompt=options.negative_prompt,
        model=options.model,
        rewards=options.reward,
        adapters=options.adapter,
        strengths=options.strength,
    )
    return 0
