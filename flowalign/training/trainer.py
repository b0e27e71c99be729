"""The loop: experience, the loss at each draw, an update, then the snapshots follow."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm

from flowalign import distributed
from flowalign.batch import Batch
from flowalign.config.sections import Config
from flowalign.errors import OutOfMemory, RunError
from flowalign.evaluation.early_stopping import best_step, stop_reason, within
from flowalign.evaluation.results import EvaluationResult
from flowalign.evaluation.statistics import paired_difference
from flowalign.files import to_json, write_file
from flowalign.models import load_model
from flowalign.policy import Policy
from flowalign.reporting.console import print_differences
from flowalign.reporting.html import write_report
from flowalign.reporting.images import save_before_after, save_grid
from flowalign.reporting.trackers import open_trackers, Trackers
from flowalign.rollouts.scoring import NotFinite
from flowalign.runs.checkpoint import (
    checkpoints,
    load_checkpoint,
    checkpoint_folder,
    Progress,
    save_checkpoint,
    TrainState,
)
from flowalign.runs.environment import peak_memory
from flowalign.runs.export import export_adapter
from flowalign.runs.failures import FAILURES, write_failure
from flowalign.runs.folder import BEFORE, open_folder
from flowalign.training.gradient import compute_gradient, Meter
from flowalign.training.preflight import refuse_what_is_wrong
from flowalign.training.setup import advise_on_out_of_memory, assemble, Assembly, read_inputs


def train(config: Config) -> dict[str, Any]:
    """Run a configuration from its last checkpoint, or from the start, to its end. Returns what summary.json holds."""
    with advise_on_out_of_memory(config):
        run = prepare(config)
    with run.writing():
        return run.go()


@dataclass
class Run:
    """A run folder and everything that works on it."""

    assembly: Assembly
    folder: Path
    state: Progress
    interrupted: bool = False
    """Whether this process was asked to stop; the loop ends when all know."""
    scores: EvaluationResult | None = None
    """Of the weights as they stand, where they were evaluated."""
    mid_update: bool = False
    """Whether the weights stand between two steps, so that a checkpoint of them would not go on exactly."""

    @property
    def config(self) -> Config:
        return self.assembly.config

    @property
    def policy(self) -> Policy:
        return self.assembly.policy

    @property
    def learned(self) -> TrainState:
        return self.assembly.learned

    @property
    def makes_images(self) -> bool:
        """Whether training makes pictures, or learns from given ones."""
        return not self.config.data.pairs

    @property
    def best_weights(self) -> str:
        """The weights that are evaluated and handed over."""
        return "ema" if self.config.train.ema.decay else "policy"

    @property
    def best(self) -> int | None:
        """The step whose evaluation was the best so far, of those within the limits of train.stop whose weights are there."""
        there = [
            entry
            for entry in self.state.evaluations
            if entry["step"] == self.state.step
            or checkpoint_folder(self.folder, int(entry["step"])).is_dir()
        ]
        return best_step(*self.config.selection_metric, within(self.config.train.stop, there))

    @property
    def evaluation_due(self) -> bool:
        """Whether this step is to be evaluated and was not yet; after one that failed, when the run goes on."""
        step, every = self.state.step, self.config.train.evaluate_every
        due = step == self.config.train.steps or bool(every and step and step % every == 0)
        return due and step not in [entry["step"] for entry in self.state.evaluations[-1:]]

    @property
    def progress(self) -> dict[str, float]:
        return {"step": self.state.step, "images": self.state.images, "seconds": self.state.seconds}

    def go(self) -> dict[str, Any]:
        with self.interruptible():
            before = self.evaluate_before()
            stopped = self.loop()
        return self.finish(before, stopped)

    def loop(self) -> str:
        """Steps until the last, a rule of train.stop, or until asked to stop: which of these."""
        train = self.config.train
        main = distributed.is_main()
        bar = tqdm(
            total=train.steps,
            initial=self.state.step,
            desc="training",
            unit="step",
            disable=not main,
        )
        with bar, open_trackers(self.folder, self.state.step) if main else Trackers() as tracker:
            if self.evaluation_due:
                self.record(self.progress, tracker)
            while not (stopped := self.stopped()):
                metrics = self.step()
                due = self.evaluation_due
                self.record(metrics, tracker)
                if self.state.bad_steps >= train.max_bad_steps:
                    raise RunError(self.too_many_bad_steps())
                shown = (
                    {"reward": metrics["reward/combined"]}
                    if "reward/combined" in metrics
                    else {"loss": metrics["loss"]}
                )
                bar.set_postfix({**shown, "images_per_s": metrics["images_per_second"]})
                bar.update()
                last = self.state.step == train.steps
                if (
                    self.state.step % train.save_every == 0
                    or last
                    or (due and self.best == self.state.step)
                ):
                    self.save()
        if 0 < self.state.step < train.steps:
            self.save()
        return stopped

    def record(self, metrics: dict[str, float], tracker: Trackers) -> None:
        """Log a step, with its evaluation where it owes one; the step is logged also where the evaluation fails."""
        try:
            if self.evaluation_due:
                metrics |= self.evaluate()
                self.state.evaluations.append(metrics)
        finally:
            tracker.log(self.state.step, metrics)

    def stopped(self) -> str:
        """Why no further step is made: "finished", "interrupted", the rule that stops the run, or nothing."""
        if self.state.step >= self.config.train.steps:
            return "finished"
        if rule := stop_reason(self.config.train.stop, self.state.evaluations):
            return rule
        return (
            "interrupted"
            if distributed.maximum(torch.tensor(float(self.interrupted))).item()
            else ""
        )

    def step(self) -> dict[str, float]:
        """One step of training and its metrics."""
        began, train, policy = time.monotonic(), self.config.train, self.policy
        objective, counts = self.config.objective, self.assembly.counts
        self.scores, meter, norms = None, Meter(), []
        self.mid_update = False
        try:
            batch, metrics = self.assembly.source(self.state.step)
        except NotFinite as error:
            self.refuse(error.rollout, 0, str(error))
            pieces, metrics = [], {}
        else:
            pieces = batch.pieces(len(batch) // train.updates_per_step)
        for update, piece in enumerate(pieces):
            taught = piece.trainable_rows()
            if not distributed.maximum(torch.tensor(float(len(taught)))).item():
                continue  # nothing to learn from on any process
            self.learned.optimizer.zero_grad()
            loss = compute_gradient(policy, objective, taught, train.images_per_pass, meter, update)
            norm = nn.utils.clip_grad_norm_(policy.parameters(), train.max_grad_norm)
            norms.append(norm.item())
            if math.isfinite(norms[-1]) and loss.isfinite():
                self.apply()
            else:
                self.refuse(
                    taught,
                    update,
                    f"the loss was {loss.item():g}, the gradient's norm {norms[-1]:g}",
                )
        for name, decay in objective.snapshots.items():
            policy.update_copy(name, decay(self.state.step * train.updates_per_step))
        self.state.step += 1
        self.state.images += counts.images_per_step if self.makes_images else 0
        self.mid_update = False
        elapsed = time.monotonic() - began
        self.state.seconds += elapsed
        norm_and_speed = {
            "grad_norm": sum(norms) / max(1, len(norms)),
            "images_per_second": counts.images_per_step / elapsed,
        }
        return {**self.progress, "loss": math.nan, **meter.values(), **norm_and_speed, **metrics}

    def too_many_bad_steps(self) -> str:
        return (
            f"{self.state.bad_steps} updates in a row were not finite (train.max_bad_steps) and not applied; they are in "
            f"{self.folder / FAILURES}. Where it was a reward, mend it; else try a lower train.learning_rate, or in a new output "
            "folder model.dtype: float32."
        )

    def apply(self) -> None:
        """The optimiser's update."""
        train = self.config.train
        self.state.bad_steps, self.mid_update = 0, True
        before, left = self.state.updates, train.steps * train.updates_per_step - self.state.updates
        for group in self.learned.optimizer.param_groups:
            group["lr"] = train.learning_rate * min(
                1.0, (before + 1) / max(1, train.warmup), left / (train.cooldown + 1)
            )
        self.learned.optimizer.step()
        self.state.updates += 1
        if train.ema.decay:
            self.policy.update_copy("ema", train.ema.follow(self.state.updates))

    def refuse(self, batch: Batch, update: int, why: str) -> None:
        """Count an update that is not applied, and keep what it takes to repeat it."""
        self.state.bad_steps += 1
        facts = {"why": why, "update": update, **asdict(self.state)}
        where = write_failure(
            self.folder, self.learned, self.state, batch, facts, self.config.train.max_bad_steps
        )
        if distributed.is_main():
            tqdm.write(
                f"Step {self.state.step + 1} was not applied: {why}. Its batch is in {where}."
            )

    def evaluate_before(self) -> EvaluationResult:
        """The model without the adapter, once a run."""
        file = self.folder / BEFORE
        if not file.exists():
            scores = self.assembly.evaluator(self.view("reference"))
            if distributed.is_main():
                scores.save(file)
            distributed.barrier()
        return EvaluationResult.load(file)

    def evaluate(self) -> dict[str, float]:
        self.scores = scores = self.assembly.evaluator(self.view(self.best_weights))
        if distributed.is_main():
            save_grid(
                scores.images,
                self.folder / "pictures" / f"step-{self.state.step:06d}.png",
                columns=6,
            )
        return {f"eval/{name}": value for name, value in (scores.means | scores.figures).items()}

    def view(self, weights: str) -> Policy:
        return self.policy.at(weights).sampling(self.config.evaluation_sampler)

    def save(self) -> None:
        if distributed.is_main():
            save_checkpoint(
                self.learned, self.state, self.folder, self.config.train.keep, self.best
            )
        distributed.barrier()

    def finish(self, before: EvaluationResult, stopped: str) -> dict[str, Any]:
        """Evaluate, hand over the adapter, and write summary, pictures and report."""
        if stopped == "interrupted":
            if distributed.is_main():
                print(f"Stopped after step {self.state.step}; the same command goes on from there.")
            return self._write_summary(self._summary(before, stopped))
        exported_step = self.best if self.config.train.stop else None
        if exported_step not in (None, self.state.step):
            self.load_weights_of_step(exported_step)
        after = self.scores or self.assembly.evaluator(self.view(self.best_weights))
        summary = self._summary(before, stopped)
        summary |= {
            "step": exported_step or self.state.step,
            "after": after.means,
            "difference": paired_difference(before, after),
        }
        if distributed.is_main():
            export_adapter(self.policy, self.folder / "adapter", self.best_weights, self.config)
            labels = [self.assembly.evaluator.prompts[i].text for i in after.shown.tolist()]
            save_before_after(
                before.images, after.images, labels, self.folder / "pictures" / "before-after.png"
            )
            self._write_summary(summary)
            write_report(self.folder, summary)
            if stopped != "finished":
                print(f"Stopped after step {self.state.step} by train.stop: {stopped}.")
            print_differences(
                summary["before"],
                summary["after"],
                summary["difference"],
                prompts=len(self.assembly.evaluator.prompts),
            )
            for what, place in (
                ("Pictures", "pictures/before-after.png"),
                ("Report", "report.html"),
                ("Adapter", "adapter"),
            ):
                print(f"{what + ':':10}{self.folder / place}")
        return summary

    def load_weights_of_step(self, step: int) -> None:
        """Take up the weights of a checkpoint."""
        load_checkpoint(self.learned, checkpoint_folder(self.folder, step))
        self.scores = None

    def _summary(self, before: EvaluationResult, stopped: str) -> dict[str, Any]:
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
            "step": self.state.step,
        }

    def _write_summary(self, summary: dict[str, Any]) -> dict[str, Any]:
        if distributed.is_main():
            write_file(self.folder / "summary.json", to_json(summary, indent=2).encode())
        return summary

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """The first Ctrl-C ends the run after its step, the second at once."""

        def stop(*_: Any) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            if distributed.is_main():
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
            with advise_on_out_of_memory(self.config):
                yield
        except OutOfMemory as error:  # of one process, which the others do not know of
            raise RunError(f"{error}\n{self._where()}") from error
        except RunError as error:
            if self.state.step and not self.mid_update and distributed.is_main():
                save_checkpoint(
                    self.learned, self.state, self.folder, self.config.train.keep, self.best
                )
            distributed.barrier()
            raise RunError(f"{error}\n{self._where()}") from error
        except (OSError, SafetensorError) as error:
            advice = f"Make room in {self.folder} and let it be written to"
            raise RunError(
                f"a file could not be written or read: {error}. {advice}.\n{self._where()}"
            ) from error

    def _where(self) -> str:
        saved = checkpoints(self.folder)
        return (
            f"The steps done are in {saved[-1]}; the same command goes on from there."
            if saved
            else "No step was done."
        )


def prepare(config: Config) -> Run:
    """A run in its folder, from its last checkpoint or from the start. UserError says what to type instead."""
    inputs = distributed.raise_everywhere(lambda: read_inputs(config))
    if distributed.is_main():
        where = f"{distributed.count()} process(es) on {distributed.device()}, {torch.get_num_threads()} threads each"
        print(f"{where}; {inputs.counts.images_per_step} images a step")
    assembly = assemble(inputs, load_model(config.model, str(distributed.device())))
    refuse_what_is_wrong(assembly)
    folder = Path(config.output)
    return Run(assembly, folder, open_folder(folder, config, assembly.learned))
