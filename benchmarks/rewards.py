"""Measure what rewards cost.

    python benchmarks/rewards.py [--repetitions 5] [--output FILE.json]

Prints the share of a step of the bundled model that scoring by each bundled reward takes. Then it
scores a rollout by an HTTP server that takes 0.2 s for a request, while the rollout is made and
afterwards, and compares the times.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Thread

import torch
import uvicorn
from torch import Tensor

from flowalign.batch import Keys, Prompts
from flowalign.config.load import load_config
from flowalign.config.sections import Config
from flowalign.data.prompts import Metadata, read_prompts
from flowalign.rewards.adapters import make_reward
from flowalign.rewards.base import Reward
from flowalign.rewards.registry import load_rewards
from flowalign.rewards.remote.server import make_app
from flowalign.rollouts.collect import collect_passes, make_prompts
from flowalign.rollouts.scoring import RolloutScorer
from flowalign.runs.environment import environment
from flowalign.training.run import prepare, Run
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


def slow(images: Tensor, prompts: list[str], metadata: list[Metadata]) -> Tensor:
    """Score by brightness, after a wait."""
    time.sleep(SECONDS)
    return images.mean((1, 2, 3))


@contextmanager
def serve(reward: Reward) -> Iterator[str]:
    """Serve a reward over HTTP, and give its address."""
    app = make_app(reward, None, 2**26)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    # uvicorn stops at its next tick, so the thread is waited for.
    server.should_exit = True
    thread.join()


def median_seconds(action: Callable[[], object], repetitions: int) -> float:
    """Return the median time of an action."""
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    """Print the costs, and write them where --output says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--images", type=int, default=240, help="images of a step")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # The file makes 12 images of each prompt.
    overrides = [f"train.prompts_per_step={options.images // 12}"]
    config = load_config(ROOT / "configs" / "tiny" / "flow_grpo.yaml", overrides)
    with tempfile.TemporaryDirectory() as folder:
        config.output = folder
        run = prepare(config)
        results = measure(run, options.repetitions)
    if options.output:
        record = {"environment": environment(torch.device("cpu"), 1), "results": results}
        options.output.write_text(json.dumps(record, indent=2))


def measure(run: Run, repetitions: int) -> dict[str, float | dict[str, float]]:
    """Time a step, every bundled reward, and a rollout scored over HTTP."""
    config = run.config
    view, images_per_pass = run.state.policy.at("policy"), config.train.images_per_pass
    prompts = prompts_of_a_step(run)
    rollouts = list(collect_passes(view, prompts, images_per_pass))

    def make_step() -> None:
        batch, _ = run.source(0)
        update(run.state, config.objective, batch, config.train, run.skip_update)

    step = median_seconds(make_step, repetitions)
    print(f"a step of {len(prompts)} images: {step:.2f} s")
    shares = {}
    for name in BUNDLED:
        judge = make_judge(config, name)
        shares[name] = median_seconds(partial(judge.score, rollouts), repetitions) / step
        print(f"  {name:24}{shares[name]:7.1%} of a step")
    # Passes are made lazily, so that `score` can score one while the next is made.
    with serve(make_reward("slow", slow)) as url:
        judge = make_judge(config, url)
        time_of = partial(median_seconds, repetitions=repetitions)
        making = time_of(lambda: list(collect_passes(view, prompts, images_per_pass)))
        scoring = time_of(lambda: judge.score(rollouts))
        both = time_of(lambda: judge.score(collect_passes(view, prompts, images_per_pass)))
    hidden = (making + scoring - both) / scoring
    print(f"a rollout of {len(rollouts)} passes: {making:.2f} s")
    print(f"scoring it over HTTP, {SECONDS} s a request: {scoring:.2f} s")
    print(f"scoring while the next pass is made: {both:.2f} s, {hidden:.0%} of the scoring hidden")
    return {"step": step, "shares": shares, "making": making, "scoring": scoring, "both": both}


def make_judge(config: Config, name: str) -> RolloutScorer:
    """Return a scorer of one reward."""
    train, rewards = config.train, load_rewards({name: 1.0})
    return RolloutScorer(
        rewards, config.combine, config.advantage, train.images_per_pass, torch.device("cpu")
    )


def prompts_of_a_step(run: Run) -> Prompts:
    """Return the first prompts of the file, as one step would train on them."""
    train, prompts = run.config.train, read_prompts(run.config.data.prompts)
    texts, members = [], []
    for slot in range(train.prompts_per_step):
        texts += [prompts[slot]] * train.images_per_prompt
        members += [(slot, image) for image in range(train.images_per_prompt)]
    return make_prompts(run.state.policy.at("policy"), texts, Keys.training(0, 0, members))


if __name__ == "__main__":
    main()
