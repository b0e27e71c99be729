"""The loop: experience, the loss at each draw, an update, then the snapshots follow."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn, Tensor
from tqdm import tqdm

from flowalign import checkpoint, probe, processes
from flowalign.batch import Batch, Pairs, Prompts, Rollout
from flowalign.config import Config, load_rewards, weight_and_settings
from flowalign.data import Prompt, read_prompts
from flowalign.errors import RunError, UserError
from flowalign.evaluation import EVALUATION_STEP, Evaluator, HeldOut, paired_difference, Scores
from flowalign.experience import Counts, Judge
from flowalign.folder import BEFORE, hand_over, open_folder, peak_memory
from flowalign.models import load_model
from flowalign.models.base import ModelConfig
from flowalign.objectives.base import Objective
from flowalign.pairs import read_examples
from flowalign.policy import Policy
from flowalign.report import write_report
from flowalign.rewards.base import Reward
from flowalign.sources import make_examples, make_pairs, Source, source_of, Supplies
from flowalign.tracking import before_after, print_differences, save_grid, to_json, Tracker


def train(config: Config) -> dict[str, Any]:
    """Run a configuration from its last checkpoint, or from the start, to its end. Returns what summary.json holds."""
    run = prepare(config)
    with run.writing():
        return run.go()


@dataclass
class Meter:
    """Means over a step's passes, and of `max_…` statistics the maximum over its first update; nothing waits for a value."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, stats: dict[str, Tensor], update: int = 0) -> None:
        for name, value in stats.items():
            value = value.detach().float()
            if "max_" in name:
                if update == 0:
                    self.sums[name] = torch.maximum(self.sums.get(name, value.max()), value.max())
                    self.counts[name] = 1
                continue
            self.sums[name] = self.sums.get(name, torch.zeros_like(value.sum())) + value.sum()
            self.counts[name] = self.counts.get(name, 0) + value.numel()

    def values(self) -> dict[str, float]:
        """Over all processes, of which some may have had nothing to add."""
        sums = torch.stack(list(self.sums.values())).tolist() if self.sums else []
        found: dict[str, list[tuple[float, int]]] = {}
        for table in processes.gather_objects(dict(zip(self.sums, zip(sums, self.counts.values(), strict=True), strict=True))):
            for name, entry in table.items():
                found.setdefault(name, []).append(entry)
        return {
            name: max(sums)[0] if "max_" in name else sum(entry[0] for entry in sums) / sum(entry[1] for entry in sums)
            for name, sums in found.items()
        }


def compute_gradient(
    policy: Policy, objective: Objective, batch: Batch, images_per_pass: int, meter: Meter, update: int = 0
) -> None:
    """Fill the policy's gradients with those of the mean loss over the batch's rows and draws, over all processes."""
    batch = objective.prepare(policy, batch)
    passes = batch.passes(images_per_pass)
    scale = policy.loss_scale(len(passes))
    rows = processes.mean(torch.tensor(float(len(batch)))).item()  # processes may hold different numbers of them
    for piece in passes:
        draws = list(objective.draws(piece))
        for t in draws:
            loss = objective.loss(policy, piece, t)
            (loss.total * (scale * len(piece) / rows / len(draws))).backward()
            meter.add({"loss": loss.total, **loss.stats}, update)
    parameters = policy.parameters()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    joined = processes.mean(torch.cat([gradient.flatten() for gradient in gradients])) / scale
    for parameter, part in zip(parameters, joined.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


@dataclass
class Run:
    """A run folder and everything that works on it."""

    config: Config
    folder: Path
    learned: checkpoint.Learned
    source: Source
    evaluator: Evaluator
    counts: Counts
    state: checkpoint.State
    interrupted: bool = False
    """Whether this process was asked to stop; the loop ends when all know."""

    @property
    def policy(self) -> Policy:
        return self.learned.policy

    @property
    def makes_images(self) -> bool:
        """Whether training makes pictures, or learns from given ones."""
        return not self.config.data.pairs

    @property
    def best_weights(self) -> str:
        """The weights that are evaluated and handed over."""
        return "ema" if self.config.train.ema.decay else "policy"

    def go(self) -> dict[str, Any]:
        with self.interruptible():
            before = self.evaluate_before()
            self.loop()
        return self.finish(before)

    def loop(self) -> None:
        """Steps until the last, or until asked to stop."""
        train = self.config.train
        main = processes.is_main()
        bar = tqdm(total=train.steps, initial=self.state.step, desc="training", unit="step", disable=not main)
        with bar, Tracker(self.folder, self.state.step) if main else nullcontext() as tracker:
            while self.state.step < train.steps and not self.stopping():
                metrics = self.step()
                if train.evaluate_every and self.state.step % train.evaluate_every == 0 and self.state.step < train.steps:
                    metrics |= self.evaluate()
                if tracker:
                    tracker.log(metrics)
                shown = {"reward": metrics["reward/combined"]} if "reward/combined" in metrics else {"loss": metrics["loss"]}
                bar.set_postfix({**shown, "images_per_s": metrics["images_per_second"]})
                bar.update()
                if self.state.step % train.save_every == 0 or self.state.step == train.steps:
                    self.save()
        if self.state.step < train.steps and self.state.step % train.save_every:
            self.save()

    def stopping(self) -> bool:
        """Whether any process was asked to stop."""
        return bool(processes.maximum(torch.tensor(float(self.interrupted))).item())

    def step(self) -> dict[str, float]:
        """One step of training and its metrics."""
        began, train, policy = time.monotonic(), self.config.train, self.policy
        objective = self.config.objective
        batch, metrics = self.source(self.state.step)
        meter, norms = Meter(), []
        for update, piece in enumerate(batch.pieces(len(batch) // train.updates_per_step)):
            self.learned.optimizer.zero_grad()
            compute_gradient(policy, objective, piece.taught(), train.images_per_pass, meter, update)
            norms.append(nn.utils.clip_grad_norm_(policy.parameters(), train.max_grad_norm).item())
            self.apply(norms[-1])
        for name, decay in objective.snapshots.items():
            policy.follow(name, decay(self.state.step))
        self.state.step += 1
        self.state.images += self.counts.images_per_step if self.makes_images else 0
        elapsed = time.monotonic() - began
        self.state.seconds += elapsed
        if self.state.bad_steps >= train.max_bad_steps:
            raise RunError(
                f"the gradient was not finite {self.state.bad_steps} times in a row (train.max_bad_steps); try a lower "
                "train.learning_rate, or in a new output folder model.dtype: float32."
            )
        progress = {"step": self.state.step, "images": self.state.images, "seconds": self.state.seconds}
        figures = {"grad_norm": sum(norms) / len(norms), "images_per_second": self.counts.images_per_step / elapsed}
        return {**progress, "loss": math.nan, **meter.values(), **figures, **metrics}

    def apply(self, norm: float) -> None:
        """The optimiser's update, unless the gradient is not finite."""
        train = self.config.train
        if not math.isfinite(norm):
            self.state.bad_steps += 1
            return
        self.state.bad_steps = 0
        for group in self.learned.optimizer.param_groups:
            group["lr"] = train.learning_rate * min(1.0, (self.state.updates + 1) / max(1, train.warmup))
        self.learned.optimizer.step()
        self.state.updates += 1
        if train.ema.decay:
            self.policy.follow("ema", train.ema.follow(self.state.updates))

    def evaluate_before(self) -> Scores:
        """The model without the adapter, once a run."""
        file = self.folder / BEFORE
        if not file.exists():
            scores = self.evaluator(self.view("reference"))
            if processes.is_main():
                scores.save(file)
            processes.wait()
        return Scores.load(file)

    def evaluate(self) -> dict[str, float]:
        scores = self.evaluator(self.view(self.best_weights))
        if processes.is_main():
            save_grid(scores.images, self.folder / "pictures" / f"step-{self.state.step:06d}.png", columns=6)
        return {f"eval/{name}": mean for name, mean in scores.means.items()}

    def view(self, weights: str) -> Policy:
        return self.policy.at(weights).sampling(self.config.evaluation_sampler)

    def save(self) -> None:
        if processes.is_main():
            checkpoint.save_checkpoint(self.learned, self.state, self.folder, self.config.train.keep)
        processes.wait()

    def finish(self, before: Scores) -> dict[str, Any]:
        """Evaluate, hand over the adapter, and write summary, pictures and report."""
        if self.state.step < self.config.train.steps:
            if processes.is_main():
                print(f"Stopped after step {self.state.step}; the same command goes on from there.")
            return self._write_summary(self._summary(before, "interrupted"))
        after = self.evaluator(self.view(self.best_weights))
        summary = self._summary(before, "finished")
        summary |= {"after": after.means, "difference": paired_difference(before, after)}
        if processes.is_main():
            hand_over(self.policy, self.folder / "adapter", self.best_weights, self.config)
            labels = [self.evaluator.prompts[i].text for i in after.shown.tolist()]
            before_after(before.images, after.images, labels, self.folder / "pictures" / "before-after.png")
            self._write_summary(summary)
            write_report(self.folder, summary)
            print_differences(summary["before"], summary["after"], summary["difference"])
            for what, place in (("Pictures", "pictures/before-after.png"), ("Report", "report.html"), ("Adapter", "adapter")):
                print(f"{what + ':':10}{self.folder / place}")
        return summary

    def _summary(self, before: Scores, stopped: str) -> dict[str, Any]:
        """What summary.json holds, without an evaluation after."""
        return {
            "before": before.means,
            "after": {},
            "difference": {},
            "images": self.state.images,
            "seconds": round(self.state.seconds, 1),
            "peak_memory_bytes": peak_memory(self.policy.model.device),
            "stopped": stopped,
            "weights": self.best_weights,
        }

    def _write_summary(self, summary: dict[str, Any]) -> dict[str, Any]:
        if processes.is_main():
            (self.folder / "summary.json").write_text(to_json(summary, indent=2))
        return summary

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """The first Ctrl-C ends the run after its step, the second at once."""

        def stop(*_: Any) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            if processes.is_main():
                tqdm.write("Finishing this step, then saving. Press Ctrl-C again to stop at once.")

        previous = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """On a failure while running, keep the steps done and say where they are."""
        try:
            yield
        except RunError as error:
            if self.state.step and processes.is_main():
                checkpoint.save_checkpoint(self.learned, self.state, self.folder, self.config.train.keep)
            processes.wait()
            raise RunError(f"{error}\n{self._where()}") from error
        except torch.OutOfMemoryError as error:
            advice = f"lower train.images_per_pass (now {self.config.train.images_per_pass}), which changes no result"
            if not self.config.model.gradient_checkpointing:
                advice += ", or set model.gradient_checkpointing: true"
            raise RunError(f"the device is out of memory: {advice}.\n{self._where()}") from error

    def _where(self) -> str:
        saved = checkpoint.checkpoints(self.folder)
        return f"The steps done are in {saved[-1]}; the same command goes on from there." if saved else "No step was done."


def prepare(config: Config) -> Run:
    """Everything a run needs, checked in the order of what is cheap. Raises UserError."""
    train, objective, data = config.train, config.objective, config.data
    counts = Counts(
        train.prompts_per_step, train.images_per_prompt, train.updates_per_step, train.images_per_pass, processes.count()
    )
    examples = read_examples(data.pairs, "data.pairs", objective.learns_from is Pairs) if data.pairs else []
    prompts = (
        read_prompts(data.prompts)
        if data.prompts
        else [Prompt(text) for text in dict.fromkeys(example.prompt.text for example in examples)]
    )
    evaluation_prompts = read_prompts(config.evaluation.prompts, "evaluation.prompts") if config.evaluation.prompts else prompts
    rewards, evaluation_rewards = rewards_of(config)
    look_at(rewards, prompts[:2] * 2, config.model, with_gradient=objective.learns_from is Prompts)
    look_at(evaluation_rewards, evaluation_prompts[:2] * 2, config.model)
    if processes.is_main():
        where = f"{processes.count()} process(es) on {processes.device()}, {torch.get_num_threads()} threads each"
        print(f"{where}; {counts.images_per_step} images a step")
    model = load_model(config.model, str(processes.device()))
    torch.manual_seed(train.seed)
    snapshots = [*objective.snapshots, *(["ema"] if train.ema.decay else [])]
    policy = Policy(model, config.sampler, snapshots, train.images_per_pass)
    model.remember([prompt.text for prompt in prompts])
    judging = config.combine, config.advantage, train.images_per_pass, processes.device()
    judge = Judge(rewards, *judging, drop_equal_groups=train.drop_equal_groups)
    supplies = Supplies(policy, judge, prompts, examples, counts, train.seed, objective.rollout_with, data.ranking)
    evaluator = Evaluator(
        evaluation_prompts,
        config.evaluation.images_per_prompt,
        Judge(evaluation_rewards, *judging),
        train.images_per_pass,
        train.seed,
        held_out=held_out(config, supplies),
    )
    optimizer = torch.optim.AdamW(policy.parameters(), lr=train.learning_rate, weight_decay=train.weight_decay)
    folder = Path(config.output)
    learned = checkpoint.Learned(policy, optimizer, judge)
    state = open_folder(folder, config, learned)
    return Run(config, folder, learned, source_of(objective.learns_from, supplies), evaluator, counts, state)


def rewards_of(config: Config) -> tuple[list[Reward], list[Reward]]:
    """The rewards to train on and those to evaluate by; what stands in both is made once. UserError where they do not fit."""
    rewards = load_rewards(config.rewards)
    learning = [reward.name for reward in rewards if reward.learner]
    if learning and config.objective.learns_from is not Rollout and config.objective.learns_from is not Pairs:
        name = config.raw["objective"]["name"]
        raise UserError(f"rewards.{learning[0]} learns from whole steps, but the objective {name} takes each image's gradient.")
    comparing, train = [reward.name for reward in rewards if reward.of_groups], config.train
    if comparing and config.objective.learns_from is Prompts and train.images_per_pass % train.images_per_prompt:
        raise UserError(
            f"train.images_per_pass is {train.images_per_pass}, but rewards.{comparing[0]} compares a prompt's images, and the "
            f"objective takes its gradient pass by pass; use a multiple of train.images_per_prompt, {train.images_per_prompt}."
        )
    asked = config.evaluation.rewards
    made = dict(zip(config.rewards, rewards, strict=True))
    made = {name: made[name] for name in asked if name in made and same_settings(asked[name], config.rewards[name])}
    others = {name: value for name, value in asked.items() if name not in made}
    made |= dict(zip(others, load_rewards(others, "evaluation.rewards"), strict=True))
    evaluation = [made[name] for name in asked]
    if moving := [reward.name for reward in evaluation if reward.learner]:
        raise UserError(
            f"{moving[0]} learns as training goes, so before and after could not be compared by it; "
            "name rewards that do not in evaluation.rewards."
        )
    return rewards, evaluation


def same_settings(one: Any, other: Any) -> bool:
    """Whether two entries of reward maps differ in weight at most."""
    return weight_and_settings(one)[1] == weight_and_settings(other)[1]


def held_out(config: Config, supplies: Supplies) -> HeldOut | None:
    """This process's share of `evaluation.pairs`, where it is given."""
    if not config.evaluation.pairs:
        return None
    paired = config.objective.learns_from is Pairs
    examples = read_examples(config.evaluation.pairs, "evaluation.pairs", paired)
    mine = {i: i for i in range(processes.rank(), len(examples), processes.count())}
    return HeldOut((make_pairs if paired else make_examples)(supplies, examples, mine, EVALUATION_STEP))


def look_at(rewards: list[Reward], prompts: list[Prompt], model: ModelConfig, with_gradient: bool = False) -> None:
    """Ask every reward about pictures of noise, so that what is wrong with it shows before the model loads."""
    samples = probe.noise_samples(prompts, model.height, model.width, processes.device())
    for reward in rewards:
        try:
            scores = probe.ask(reward, samples)
            if with_gradient:
                images, texts, metadata = samples.some(samples.groups[0]).inputs
                reward.with_gradient(images.clone().requires_grad_(), texts, metadata)
            again = probe.ask(reward, samples)
        except RunError as error:
            raise UserError(str(error)) from error
        if processes.is_main() and (off := (scores - again).abs().nan_to_num(nan=0).max()) > 0:
            print(f"rewards.{reward.name} is not deterministic: about the same pictures it differs by up to {off:.3g}.")
