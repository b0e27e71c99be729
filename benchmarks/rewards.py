"""What rewards cost: python benchmarks/rewards.py [--repetitions 5] [--output FILE.json]

On the bundled model: the share of a step that each bundled reward takes by itself, and how much longer a rollout takes with a
reward behind HTTP that needs 0.2 s a request, beside both by themselves.
"""

import argparse
import json
import statistics
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import uvicorn
from torch import Tensor

from flowalign.config.load import load_config
from flowalign.config.sections import Config
from flowalign.data.prompts import read_prompts
from flowalign.rewards.adapters import make_reward
from flowalign.rewards.base import Reward
from flowalign.rewards.registry import load_rewards
from flowalign.rewards.remote.server import make_app
from flowalign.rollouts.collect import make_prompts, passes
from flowalign.rollouts.scoring import RolloutScorer
from flowalign.runs.environment import environment
from flowalign.training.run import prepare
from flowalign.training.update import update

ROOT = Path(__file__).parents[1]
SECONDS = 0.2
BUNDLED = (
    "scene_match",
    "scene_match_graded",
    "clip_score",
    "jpeg_size",
    "sharpness",
    "colorfulness",
)


def slow(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    time.sleep(SECONDS)
    return images.mean((1, 2, 3))


@contextmanager
def served(reward: Reward) -> Any:
    """The address of a reward behind HTTP."""
    server = uvicorn.Server(
        uvicorn.Config(make_app(reward, None, 2**26), port=0, log_level="warning")
    )
    thread = Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def timed(action: Any, repetitions: int) -> float:
    """Median seconds."""
    seconds = []
    for _ in range(repetitions):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--images", type=int, default=240, help="a step")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(
        ROOT / "configs" / "tiny" / "flow_grpo.yaml",
        [f"train.prompts_per_step={options.images // 12}"],
    )
    found = measure(config, options)
    if options.output:
        about = {"environment": environment(torch.device("cpu"), 1), "results": found}
        options.output.write_text(json.dumps(about, indent=2))


def measure(config: Config, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        config.output = folder
        run = prepare(config)
        view, each = run.state.policy.at("policy"), config.train.images_per_pass
        texts = read_prompts(config.data.prompts)
        members = [
            (slot, image)
            for slot in range(config.train.prompts_per_step)
            for image in range(config.train.images_per_prompt)
        ]
        prompts = make_prompts(
            view,
            [texts[slot] for slot, _ in members],
            [(0, 0, slot, image) for slot, image in members],
        )
        rollouts = list(passes(view, prompts, each))

        def make_step() -> None:
            batch, _ = run.source(0)
            update(run.state, config.objective, batch, config.train, run.skip_update)

        step = timed(make_step, options.repetitions)
        print(f"a step of {options.images} images: {step:.2f} s")

        def judge(rewards: list[Reward]) -> RolloutScorer:
            return RolloutScorer(
                rewards, config.combine, config.advantage, each, torch.device("cpu")
            )

        shares = {}
        for name in BUNDLED:
            scorer = judge(load_rewards({name: 1.0}))
            shares[name] = timed(partial(scorer.score, rollouts), options.repetitions) / step
            print(f"  {name:24}{shares[name]:7.1%} of a step")

        with served(make_reward("slow", slow)) as url:
            remote = judge(load_rewards({url: 1.0}))
            making = timed(lambda: list(passes(view, prompts, each)), options.repetitions)
            scoring = timed(lambda: remote.score(rollouts), options.repetitions)
            both = timed(lambda: remote.score(passes(view, prompts, each)), options.repetitions)
        print(
            f"a rollout of {len(rollouts)} passes: {making:.2f} s; scoring it behind HTTP, {SECONDS} s a request: {scoring:.2f} s"
        )
        print(
            f"scoring while the next is made: {both:.2f} s, {(making + scoring - both) / scoring:.0%} of the scoring hidden"
        )
        return {"step": step, "shares": shares, "making": making, "scoring": scoring, "both": both}


if __name__ == "__main__":
    main()
