"""A run from start to end: prepare, start the actors, watch them, stop them, clean up.

    prepare        everything that can be wrong with what the user asked for, before anything starts
    launch         janitor -> Ray -> store master -> store node -> controller -> inference workers
    train          once the draft's vocabulary is known: trainer ranks; then watch everybody
    finish         workers leave, files are closed, the cluster goes, the janitor sweeps

An inference worker that dies is replaced and loses nothing. Training ranks form one process group, so the loss of
one ends the run, which then resumes from its last checkpoint.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray

from torchspec.config.load import save_config
from torchspec.config.schema import Config
from torchspec.contracts import RunStatus, StepReport
from torchspec.driver.actors import ActorFactory
from torchspec.driver.cluster import start_cluster
from torchspec.driver.janitor import MARK, Janitor
from torchspec.driver.prepare import Prepared, prepare
from torchspec.monitor.curves import draw_curves
from torchspec.monitor.trackers import open_trackers
from torchspec.store.master import MooncakeMaster
from torchspec.training.checkpoint import latest_checkpoint

WATCH_SECONDS = 0.5
"""How often the view is refreshed; deaths of actors are noticed at once."""
MAX_FRUITLESS_STARTS = 2
"""An inference pool whose workers die so many times in a row without a single sample will never work."""


class RunFailed(Exception):
    """The run cannot go on; the message says why and what to do."""


class View(Protocol):
    """What a run tells a person."""

    def status(self, status: RunStatus) -> None: ...
    def message(self, text: str) -> None: ...


@dataclass(frozen=True)
class RunSummary:
    """How a run ended."""

    run_dir: Path
    steps: int
    samples: int
    rejected: int
    seconds: float
    stopped: bool
    checkpoint: Path | None
    export: Path | None
    last_step: StepReport | None
    last_heldout: StepReport | None


def train(config: Config, *, resume: bool, view: View) -> RunSummary:
    """Run ``config`` to its end, or to a stop.

    Raises:
        ValueError: what the user asked for cannot work; nothing was started.
        RunFailed: the run broke; the message says why.
        KeyboardInterrupt: interrupted twice.
    """
    started = time.monotonic()
    prepared = prepare(config, resume, view.message)
    with _launch(prepared, view) as session:
        stopped = session.watch()
        status: RunStatus = ray.get(session.controller.status.remote())
        ray.get(session.controller.finish.remote())
    return _summary(prepared, status, stopped, time.monotonic() - started)


@contextmanager
def _launch(prepared: Prepared, view: View) -> Iterator[Session]:
    """Everything that must be taken down again, in the reverse order, whatever happens."""
    config, run_dir = prepared.config, prepared.run_dir
    with ExitStack() as stack:
        mark, temp_dir = prepared.mark, Path(tempfile.mkdtemp(prefix="torchspec-"))
        janitor = Janitor(mark, temp_dir)
        stack.callback(janitor.close)
        os.environ[MARK] = mark
        stack.callback(os.environ.pop, MARK)
        interrupts = stack.enter_context(_interrupts(view))
        view.message("starting Ray, the store and the controller")
        # Stopped after the cluster: a store node that ends without its master waits for it.
        master = MooncakeMaster(
            log_path=run_dir / "logs" / "mooncake_master.log",
            host=config.store.host,
            port=config.store.master_port,
            protocol=config.store.protocol,
        )
        stack.callback(master.stop)
        address = stack.enter_context(start_cluster(config, prepared.plan, temp_dir))
        (temp_dir / "actors").mkdir()
        actors = ActorFactory(prepared, master.endpoint, temp_dir / "actors")
        store_node = actors.store_node()
        controller = actors.controller()
        ray.get([store_node.ping.remote(), controller.status.remote()])
        save_config(config, run_dir / "config.yaml")
        handle = {"address": address, "namespace": prepared.namespace, "pid": os.getpid()}
        (run_dir / "handle.json").write_text(json.dumps(handle))
        stack.callback((run_dir / "handle.json").unlink, missing_ok=True)
        trackers = open_trackers(config.monitor, run_dir)
        stack.callback(trackers.close)
        yield Session(prepared, actors, controller, store_node, master, trackers, view, interrupts)


class Interrupts:
    """Counts Ctrl-C: the first asks for an orderly stop, the second raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.count = 0


@contextmanager
def _interrupts(view: View) -> Iterator[Interrupts]:
    interrupts = Interrupts()

    def on_signal(signum: int, frame: object) -> None:
        interrupts.count += 1
        if interrupts.count > 1:
            raise KeyboardInterrupt
        view.message("interrupted: stopping with a checkpoint; press Ctrl-C again to stop at once")

    before = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Session:
    """A running run, seen from the driver: futures of actors, and what to do when one ends."""

    def __init__(
        self,
        prepared: Prepared,
        actors: ActorFactory,
        controller: Any,
        store_node: Any,
        master: MooncakeMaster,
        trackers: Any,
        view: View,
        interrupts: Interrupts,
    ):
        self.prepared, self.actors, self.view = prepared, actors, view
        self.controller, self.store_node, self.master = controller, store_node, master
        self.trackers, self.interrupts = trackers, interrupts
        self.workers: dict[ray.ObjectRef, tuple[str, Any]] = {}
        self.trainers: dict[ray.ObjectRef, int] = {}
        self.stopping = False
        self._samples_at_start: dict[str, int] = {}
        self._fruitless = 0
        self._messages_seen: list[str] = []
        for _ in range(prepared.config.inference.workers):
            self._start_worker()

    def watch(self) -> bool:
        """Until training has ended; returns whether it was stopped early."""
        vocabulary = self.controller.draft_vocab.remote()
        trainers_done = 0
        while True:
            waiting = [*self.workers, *self.trainers, *([vocabulary] if vocabulary is not None else [])]
            done, _ = ray.wait(waiting, timeout=WATCH_SECONDS) if waiting else ([], [])
            for ref in done:
                if ref == vocabulary:
                    self._start_trainers(ray.get(ref))
                    vocabulary = None
                elif ref in self.workers:
                    self._worker_ended(ref)
                else:
                    self._trainer_ended(ref)
                    trainers_done += 1
            self._look()
            if trainers_done and not self.trainers:
                return self.stopping
            if self.stopping and vocabulary is not None:
                return True  # nothing has been trained yet

    def _start_worker(self) -> None:
        name, actor = self.actors.worker(self.controller)
        self._samples_at_start[name] = 0
        self.workers[actor.run.remote()] = (name, actor)

    def _start_trainers(self, vocabulary: Any) -> None:
        self.view.message(
            f"draft vocabulary: {len(vocabulary)} of {vocabulary.vocab_size} tokens, {vocabulary.coverage:.1%} of what "
            "was counted; starting the trainer"
        )
        for rank, actor in enumerate(self.actors.trainers(vocabulary)):
            self.trainers[actor.run.remote(self.controller)] = rank

    def _worker_ended(self, ref: ray.ObjectRef) -> None:
        name, actor = self.workers.pop(ref)
        try:
            ray.get(ref)
            return  # it was told that it is no longer needed
        except ray.exceptions.RayError as error:
            reason = _root_cause(error)
        reports = {w.worker: w.samples for w in ray.get(self.controller.status.remote()).workers}
        self._fruitless = 0 if reports.get(name, 0) else self._fruitless + 1
        ray.kill(actor)
        ray.get(self.controller.worker_lost.remote(name))
        if self._fruitless >= MAX_FRUITLESS_STARTS:
            raise RunFailed(f"{name} cannot work: {reason} (log: {self.actors.log_path(name)})")
        self.view.message(f"{name} died ({reason}; log: {self.actors.log_path(name)}); starting another")
        self._start_worker()

    def _trainer_ended(self, ref: ray.ObjectRef) -> None:
        rank = self.trainers.pop(ref)
        try:
            ray.get(ref)
        except ray.exceptions.RayError as error:
            where = self.actors.log_path(f"trainer-{rank}")
            raise RunFailed(
                f"trainer rank {rank} failed: {_root_cause(error)} (log: {where}); "
                f"continue with: torchspec resume {self.prepared.run_dir}"
            ) from None

    def _look(self) -> None:
        """Refresh the view, pass on messages and a pending interrupt, check the store's master."""
        if self.interrupts.count and not self.stopping:
            self.stopping = True
            ray.get(self.controller.request_stop.remote("interrupted"))
        if not self.master.alive():
            raise RunFailed(
                f"the store's master died (log: {self.prepared.run_dir}/logs/mooncake_master.log); "
                f"continue with: torchspec resume {self.prepared.run_dir}"
            )
        try:
            status: RunStatus = ray.get(self.controller.status.remote())
        except ray.exceptions.RayError as error:
            raise RunFailed(
                f"the controller failed: {_root_cause(error)}; continue with: torchspec resume {self.prepared.run_dir}"
            ) from None
        self.stopping = self.stopping or status.phase == "stopping"
        for text in new_messages(self._messages_seen, status.messages):
            self.view.message(text)
        self._messages_seen = list(status.messages)
        self.view.status(status)
        self.trackers.log(status, ray.get(self.controller.steps_since.remote(self.trackers.steps_seen)))


def new_messages(seen: list[str], now: tuple[str, ...]) -> list[str]:
    """What ``now``, a sliding window of recent messages, has after ``seen``, the same window earlier."""
    for overlap in range(min(len(seen), len(now)), -1, -1):
        if seen[len(seen) - overlap :] == list(now[:overlap]):
            return list(now[overlap:])
    raise AssertionError("an overlap of nothing always fits")


def _root_cause(error: ray.exceptions.RayError) -> str:
    """One line for a person: the remote exception itself, or how its process ended."""
    cause = getattr(error, "cause", None)
    if cause is None:
        return "its process ended" if isinstance(error, ray.exceptions.ActorDiedError) else type(error).__name__
    return " ".join(f"{type(cause).__name__}: {cause}".split())[:400]


def _summary(prepared: Prepared, status: RunStatus, stopped: bool, seconds: float) -> RunSummary:
    run_dir = prepared.run_dir
    if status.last_step is not None:
        draw_curves(run_dir)
    export = run_dir / "export"
    return RunSummary(
        run_dir=run_dir,
        steps=status.step,
        samples=status.samples.get("trained", 0) + status.samples.get("committed", 0),
        rejected=status.samples.get("rejected", 0) + len(prepared.train.rejected),
        seconds=seconds,
        stopped=stopped,
        checkpoint=latest_checkpoint(run_dir),
        export=export if export.exists() else None,
        last_step=status.last_step,
        last_heldout=status.last_heldout,
    )
