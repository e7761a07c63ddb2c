"""Writes a run's folder as a run of the simulated pipeline would leave it, for views to be built and tested on.

    python -m tests.simulation.simulated_run FOLDER --workers 64 --ranks 64 --seconds 10800
    python -m tests.simulation.simulated_run FOLDER --scenario store-bound --live     # goes on in real time

A run of the name of FOLDER: config, steps, history, entities, events, samples, the latest snapshot.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from base64 import b64encode
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from tests.simulation.pipeline import START, Setup, Simulation
from torchspec.config.load import parse_config, save_config
from torchspec.contracts import StepReport
from torchspec.data.masks import pack_mask
from torchspec.monitor.record.recorder import EventLog, Recorder
from torchspec.monitor.record.timeline import SAMPLE_LINES, SAMPLE_RECENT, SampleRecord
from torchspec.monitor.series import Series
from torchspec.monitor.snapshot import Snapshot, to_line
from torchspec.run_folder import RunFolder, this_process

SCENARIOS = {
    "balanced": Setup(workers=4, engine_seconds=0.36, step_seconds=0.75),
    "inference-bound": Setup(workers=2, engine_seconds=0.36, step_seconds=0.75),
    "training-bound": Setup(workers=8, engine_seconds=0.36, step_seconds=0.75),
    "store-bound": Setup(workers=4, engine_seconds=0.36, step_seconds=0.75, store_samples=10),
    "slow-put": Setup(workers=4, engine_seconds=0.36, step_seconds=0.75, put_seconds=1.6),
    "slow-get": Setup(workers=4, engine_seconds=0.36, step_seconds=0.75, get_seconds=0.4),
}


class SimulatedRun:
    """Writes what a simulation measures; ``follow`` it for some virtual time."""

    def __init__(self, folder: Path, simulation: Simulation):
        self.folder, self.simulation = folder, simulation
        simulation.name = folder.name
        RunFolder(folder).latest.parent.mkdir(parents=True)
        training = {"dp_size": simulation.setup.ranks, "batch_size": simulation.setup.batch}
        tree = {"run": {"name": folder.name, "dir": str(folder.parent)}, "target": {"path": "unused"}}
        inference = {"workers": simulation.setup.workers}
        save_config(
            parse_config({**tree, "training": training, "inference": inference, "draft": {"ttt_length": 5}}),
            folder / "config.yaml",
        )
        self._recorder, self._events = Recorder(folder), EventLog(folder)
        self._steps = (folder / "metrics.jsonl").open("a")
        self._samples = Series(RunFolder(folder).samples, SAMPLE_LINES, SAMPLE_RECENT)
        self._random = random.Random(1)
        simulation.on_step = self._step
        for worker in simulation.workers:
            self.event("worker_started", f"{worker.name} is starting", worker=worker.name)

    def follow(self, seconds: float, interval: float = 1.0) -> Snapshot:
        """Let so much virtual time pass."""
        for snapshot in self.simulation.snapshots(seconds, interval):
            self._recorder.write(snapshot)
        self._steps.flush()
        return snapshot

    def event(self, kind, message: str, **detail) -> None:
        self._events.write(self.simulation.now, kind, message, **detail)

    def kill_worker(self, number: int) -> None:
        name = self.simulation.kill(number)
        self.event("worker_lost", f"{name} is gone; 8 of its leases are pending again", worker=name, leases=8)

    def scale(self, workers: int) -> None:
        before = len(self.simulation.workers)
        self.simulation.scale(workers)
        self.event(
            "scaled", f"inference pool: {before} -> {workers} workers", pool="inference", before=before, after=workers
        )

    def _step(self, report: StepReport) -> None:
        now, setup = self.simulation.now, self.simulation.setup
        self._steps.write(json.dumps({"time": now, **asdict(report)}) + "\n")
        if report.step % setup.pause_every == 0:
            heldout = self.simulation.last_heldout = replace(
                report,
                loss=report.loss + 0.15,
                full_accuracy=tuple(0.95 * a for a in report.full_accuracy),
                accept_length=1 + 0.95 * (report.accept_length - 1),
                split="heldout",
            )
            self._steps.write(json.dumps({"time": now, **asdict(heldout)}) + "\n")
            self.event(
                "checkpoint", f"checkpoint checkpoints/step_{report.step} (best so far)", step=report.step, best=True
            )
        if report.step % 3 == 0:
            self._samples.append(to_line(self._sample(report, now)))

    def _sample(self, report: StepReport, now: float) -> SampleRecord:
        setup, chance = self.simulation.setup, self._random
        prompt, answer = self._tokens(chance)
        ids = np.array([*prompt, *answer], dtype="<i4")
        ages = [9.0, 8.5, 8.5 - setup.engine_seconds, 7.9, 7.9 - setup.put_seconds, 3.0, 2.0, 0.1, 0.0]
        names = ("leased", "computing", "computed", "putting", "stored", "assigned", "fetched", "trained", "freed")
        worker = f"worker-{chance.randrange(max(1, len(self.simulation.workers)))}"
        details = {"leased": worker, "assigned": f"step {report.step}"}
        number = report.step * setup.batch
        return SampleRecord(
            time=now,
            sample=f"e0p{number}",
            id=f"train-{number}",
            worker=worker,
            step=report.step,
            attempts=1,
            tokens=len(ids),
            prompt_tokens=len(prompt),
            num_bytes=len(ids) * 4 * 576 * 2,
            timeline=tuple((m, now - age, details.get(m, "")) for m, age in zip(names, ages, strict=True)),
            token_ids=b64encode(ids.tobytes()).decode(),
            loss_mask=b64encode(pack_mask([0] * len(prompt) + [1] * len(answer))).decode(),
        )

    def _tokens(self, chance: random.Random) -> tuple[list[int], list[int]]:
        """A prompt and its answer."""
        prompt, answer = chance.randint(20, 200), chance.randint(20, 300)
        return [chance.randrange(49_000) for _ in range(prompt)], [chance.randrange(49_000) for _ in range(answer)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenario", choices=sorted(SCENARIOS), default="balanced")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--seconds", type=float, default=1800.0, help="virtual time to write at once")
    parser.add_argument("--live", action="store_true", help="then go on in real time until interrupted")
    options = parser.parse_args()
    setup = SCENARIOS[options.scenario]
    workers, ranks = options.workers or setup.workers, options.ranks or setup.ranks
    # Larger pools get larger batches, so that the scenario stays what it is.
    factor = workers / setup.workers
    setup = replace(
        setup,
        workers=workers,
        ranks=ranks,
        batch=round(setup.batch * factor),
        store_samples=round(setup.store_samples * factor),
        window=round(setup.window * factor),
        samples=max(setup.samples, round(options.seconds * 12 * factor)),
    )
    run = SimulatedRun(options.folder, Simulation(setup, now=time.time() - options.seconds if options.live else START))
    interval = max(1.0, options.seconds / 3600)  # of what is older, few points would be kept anyhow
    run.follow(0.4 * options.seconds, interval)
    run.kill_worker(0)
    run.follow(0.02 * options.seconds, interval)
    run.scale(workers)
    run.follow(0.58 * options.seconds, interval)
    if options.live:
        handle = {"address": "simulated", "namespace": "simulated", "auth_mode": "token", **this_process()}
        (options.folder / "handle.json").write_text(json.dumps(handle))
        try:
            while True:
                time.sleep(1)
                run.follow(time.time() - run.simulation.now)
        except KeyboardInterrupt:
            (options.folder / "handle.json").unlink()


if __name__ == "__main__":
    main()
