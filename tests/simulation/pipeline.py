"""A discrete-event simulation of both pools and what lies between them, reporting through the real ``Telemetry``.

    leases (credits, window) -> worker: engine (one at a time) -> puts (two at a time) -> stored
        -> assigned in order, a batch at a time -> ranks: gets (one at a time, ahead) -> step, all together -> freed

All times are virtual seconds. The right answers are known from the parameters: a worker yields at most
``1 / engine_seconds`` samples a second, the ranks take at most ``batch / step_seconds``.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from torchspec.contracts import RankReport, RunStatus, StepReport, WorkerReport
from torchspec.instruments import WINDOW_SECONDS, observe
from torchspec.monitor.record.telemetry import Telemetry
from torchspec.monitor.snapshot import Snapshot

START = 1_700_000_000.0
PUT_THREADS = 2


@dataclass(frozen=True)
class Setup:
    """A pipeline; times are those of one sample, of one step where it says so."""

    workers: int = 2
    engine_seconds: float = 0.2
    put_seconds: float = 0.01
    held: int = 8
    """Samples that one worker works on at a time."""
    ranks: int = 2
    batch: int = 8
    get_seconds: float = 0.005
    step_seconds: float = 0.8
    """Forward, backward, reduction and optimizer of one step."""
    store_samples: int = 64
    """Samples that the credits are enough for."""
    window: int = 256
    prefetch_steps: int = 2
    samples: int = 100_000
    tokens: int = 600
    sample_bytes: int = 4 << 20
    warm_up: float = 30.0
    """Until a new worker takes its first lease."""
    pause_every: int = 200
    """Steps between evaluations and checkpoints."""
    pause_seconds: float = 5.0
    jitter: float = 0.1
    seed: int = 0


class Meter:
    """Adds up the time during which a condition holds."""

    def __init__(self, sim: Simulation):
        self._sim, self.total, self._since = sim, 0.0, None

    _since: float | None

    def set(self, on: bool) -> None:
        if on and self._since is None:
            self._since = self._sim.now
        elif not on and self._since is not None:
            self.total += self._sim.now - self._since
            self._since = None

    @property
    def seconds(self) -> float:
        return self.total + (self._sim.now - self._since if self._since is not None else 0.0)


class Worker:
    """Leases in, stored samples out."""

    def __init__(self, sim: Simulation, name: str):
        self.sim, self.name, self.ready, self.alive = sim, name, False, True
        self.engine: deque[int] = deque()
        self.putting: deque[int] = deque()
        self.puts = 0
        self.began = 0.0
        self.busy, self.computing = Meter(sim), Meter(sim)
        self.report = WorkerReport(name)
        sim.telemetry.worker_started(name)
        sim.after(sim.setup.warm_up, self.begin)

    def begin(self) -> None:
        self.ready, self.began = True, self.sim.now
        self.ask()

    @property
    def leases(self) -> int:
        return len(self.engine) + len(self.putting) + self.puts

    def ask(self) -> None:
        while self.ready and self.alive and self.leases < self.sim.setup.held:
            position = self.sim.grant()
            if position is None:
                break
            self.engine.append(position)
            if len(self.engine) == 1:
                self.compute()
        self.account()

    def compute(self) -> None:
        self.sim.after(self.sim.vary(self.sim.setup.engine_seconds), self.computed)

    def computed(self) -> None:
        if not self.alive:
            return
        self.putting.append(self.engine.popleft())
        if self.engine:
            self.compute()
        self.put()

    def put(self) -> None:
        while self.putting and self.puts < PUT_THREADS:
            self.puts += 1
            position, seconds = self.putting.popleft(), self.sim.vary(self.sim.setup.put_seconds)
            self.sim.after(seconds, lambda p=position, s=seconds: self.stored(p, s))
        self.account()

    def stored(self, position: int, seconds: float) -> None:
        if not self.alive:
            return
        self.puts -= 1
        setup, report = self.sim.setup, self.report
        self.report = replace(
            report,
            samples=report.samples + 1,
            tokens=report.tokens + setup.tokens,
            answer_tokens=report.answer_tokens + setup.tokens // 3,
            put_bytes=report.put_bytes + setup.sample_bytes,
            put_seconds=report.put_seconds + seconds,
            put_histogram=observe(report.put_histogram, seconds),
        )
        self.sim.publish(position)
        self.put()
        self.ask()

    def account(self) -> None:
        self.busy.set(self.leases > 0)
        self.computing.set(bool(self.engine))

    def tell(self) -> None:
        if self.ready and self.alive:
            self.report = replace(
                self.report,
                seconds=self.sim.now - self.began,
                busy_seconds=self.busy.seconds,
                engine_seconds=self.computing.seconds,
                leases=self.leases,
            )
            self.sim.telemetry.worker_report(self.report)

    def die(self) -> list[int]:
        """What it held."""
        self.alive = False
        held, self.puts = [*self.engine, *self.putting], 0
        return held


class Ranks:
    """All training ranks: they fetch by themselves and step together."""

    def __init__(self, sim: Simulation):
        self.sim = sim
        self.assigned: deque[int] = deque()
        self.fetched = 0
        self.fetching = self.stepping = self.pausing = False
        self.step = 0
        self.wait, self.pause = Meter(sim), Meter(sim)
        self.wait.set(True)
        self.began = sim.now
        self.reports = [RankReport(rank) for rank in range(sim.setup.ranks)]

    @property
    def ahead(self) -> int:
        return len(self.assigned) + self.fetching + self.fetched + self.stepping

    def assign(self, samples: int) -> None:
        self.assigned.append(samples)
        self.fetch()

    def fetch(self) -> None:
        limit = max(1, self.sim.setup.prefetch_steps - 1)
        if self.fetching or not self.assigned or self.fetched >= limit:
            return
        self.fetching = True
        samples = self.assigned.popleft()
        gets = [self.sim.vary(self.sim.setup.get_seconds) for _ in range(-(-samples // self.sim.setup.ranks))]
        for rank, report in enumerate(self.reports):
            histogram = report.get_histogram
            for seconds in gets:
                histogram = observe(histogram, seconds)
            self.reports[rank] = replace(
                report,
                get_seconds=report.get_seconds + sum(gets),
                get_bytes=report.get_bytes + len(gets) * self.sim.setup.sample_bytes,
                get_histogram=histogram,
            )
        self.sim.after(sum(gets), self.got)

    def got(self) -> None:
        self.fetching = False
        self.fetched += 1
        self.go()
        self.fetch()

    def go(self) -> None:
        if self.stepping or self.pausing or not self.fetched:
            return
        self.fetched -= 1
        self.stepping = True
        self.wait.set(False)
        seconds = self.sim.vary(self.sim.setup.step_seconds)
        self.sim.after(seconds, lambda: self.done(seconds))
        self.fetch()

    def done(self, seconds: float) -> None:
        self.stepping = False
        self.step += 1
        setup = self.sim.setup
        for rank, report in enumerate(self.reports):
            self.reports[rank] = replace(
                report,
                step=self.step,
                steps=report.steps + 1,
                tokens=report.tokens + setup.batch * setup.tokens // setup.ranks,
                forward_seconds=report.forward_seconds + 0.3 * seconds,
                backward_seconds=report.backward_seconds + 0.55 * seconds,
                reduce_seconds=report.reduce_seconds + 0.05 * seconds,
                optimizer_seconds=report.optimizer_seconds + 0.1 * seconds,
                flops=report.flops + 2e12 * setup.batch / setup.ranks,
                peak_flops=2e13,
            )
        self.sim.trained(self.step)
        if self.step % setup.pause_every == 0:
            self.pausing = True
            self.pause.set(True)
            self.sim.after(setup.pause_seconds, self.resume)
        else:
            self.resume()

    def resume(self) -> None:
        self.pausing = False
        self.pause.set(False)
        self.wait.set(True)
        self.go()

    def tell(self) -> None:
        doing = "training" if self.stepping else "paused" if self.pausing else "waiting"
        for rank, report in enumerate(self.reports):
            self.reports[rank] = replace(
                report,
                seconds=self.sim.now - self.began,
                wait_seconds=self.wait.seconds,
                pause_seconds=self.pause.seconds,
                fetched_steps=self.fetched,
                doing=doing,
            )
            self.sim.telemetry.rank_report(self.reports[rank])


@dataclass
class Simulation:
    """Run it with :meth:`snapshots`; change ``setup`` or the workers between two of them as you like."""

    setup: Setup
    now: float = START
    name: str = "simulated"
    stored: set[int] = field(default_factory=set)
    retries: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.setup.seed)
        self._started = self.now
        self._past: deque[tuple[float, int, int]] = deque()
        self._queue: list[tuple[float, int, Callable[[], object]]] = []
        self._order = itertools.count()
        self.telemetry = Telemetry(lambda: self.now)
        self.used = self.frontier = self.cursor = self.trained_samples = 0
        self.sizes: dict[int, int] = {}
        self.last_step: StepReport | None = None
        self.last_heldout: StepReport | None = None
        self.on_step: Callable[[StepReport], object] = lambda report: None
        self.ranks = Ranks(self)
        self.workers: list[Worker] = []
        self._names = itertools.count()
        self.scale(self.setup.workers)

    # ---- what a test may do ----

    def snapshots(self, seconds: float, interval: float = 1.0) -> Iterator[Snapshot]:
        """Let so much time pass; a snapshot each ``interval``."""
        end = self.now + seconds
        while self.now < end - 1e-9 and not self.finished:
            self._advance(min(end, self.now + interval))
            for worker in self.workers:
                worker.tell()
            self.ranks.tell()
            yield self.telemetry.snapshot(self.status())

    def scale(self, workers: int) -> None:
        while len(self.workers) < workers:
            self.workers.append(Worker(self, f"worker-{next(self._names)}"))
        while len(self.workers) > workers:
            self.telemetry.worker_gone(self._remove(len(self.workers) - 1), "ended")

    def kill(self, number: int) -> str:
        """A worker dies."""
        name = self._remove(number)
        self.telemetry.worker_gone(name, "gone")
        self.telemetry.totals.update(worker_losses=1, faults=1)
        return name

    def _remove(self, number: int) -> str:
        """What a worker had goes to the others."""
        worker = self.workers.pop(number)
        held = worker.die()
        self.retries += held
        self.retries.sort()
        self.used -= len(held)
        self.telemetry.totals["retries"] += len(held)
        self._ask()
        return worker.name

    @property
    def finished(self) -> bool:
        return self.trained_samples >= self.setup.samples

    # ---- the controller's part ----

    def grant(self) -> int | None:
        room = self.used < self.setup.store_samples
        window = self.frontier < self.trained_samples + self.setup.window
        left = self.frontier < self.setup.samples
        self.telemetry.credit_blocked.set(bool(self.retries or (left and window)) and not room)
        self.telemetry.window_blocked.set(left and not window and not self.retries)
        if not room or not (self.retries or (left and window)):
            return None
        self.used += 1
        if self.retries:
            return self.retries.pop(0)
        self.frontier += 1
        return self.frontier - 1

    def publish(self, position: int) -> None:
        self.stored.add(position)
        self.telemetry.totals.update(captured_samples=1, captured_tokens=self.setup.tokens)
        self.assign()

    def assign(self) -> None:
        while self.ranks.ahead < self.setup.prefetch_steps:
            batch = range(self.cursor, min(self.cursor + self.setup.batch, self.setup.samples))
            if not batch or not all(p in self.stored for p in batch):
                return
            self.cursor = batch.stop
            self.sizes[self.ranks.step + self.ranks.ahead + 1] = len(batch)
            self.ranks.assign(len(batch))

    def trained(self, step: int) -> None:
        size = self.sizes.pop(step)
        self.stored -= set(range(self.trained_samples, self.trained_samples + size))
        self.trained_samples += size
        self.used -= size
        self.telemetry.totals.update(trained_samples=size, trained_tokens=size * self.setup.tokens)
        self.last_step = self._report(step, size)
        self.on_step(self.last_step)
        self.assign()
        self._ask()

    def _ask(self) -> None:
        for worker in self.workers:
            worker.ask()

    def _report(self, step: int, size: int) -> StepReport:
        progress = step * self.setup.batch / self.setup.samples
        noise = self._random.gauss(0, 0.02)
        loss = 2.4 + 4.5 / (1 + 12 * progress) + noise
        accuracy = tuple(max(0.01, (0.72 - 0.55 / (1 + 8 * progress) + noise / 4) * 0.82**t) for t in range(5))
        chain = list(itertools.accumulate(accuracy, lambda a, b: a * b))
        seconds = self.setup.step_seconds
        return StepReport(
            step=step,
            loss=loss,
            loss_per_position=tuple(loss + 0.2 * t for t in range(5)),
            accuracy=tuple(min(1.0, a * 1.1) for a in accuracy),
            full_accuracy=accuracy,
            accept_length=1 + sum(chain),
            learning_rate=1e-3 * min(1.0, 30 * progress) * max(0.05, 1 - progress),
            grad_norm=0.4 + abs(noise),
            tokens=size * self.setup.tokens,
            loss_tokens=size * self.setup.tokens // 3,
            wait_seconds=0.0,
            fetch_seconds=size / self.setup.ranks * self.setup.get_seconds,
            compute_seconds=0.9 * seconds,
            optimizer_seconds=0.1 * seconds,
        )

    def status(self) -> RunStatus:
        setup, steps = self.setup, -(-self.setup.samples // self.setup.batch)
        leased = sum(worker.leases for worker in self.workers)
        assigned = sum(self.sizes.values())
        ready = next(i for i in itertools.count() if self.cursor + i not in self.stored)
        trained = self.trained_samples
        committed = trained - trained % (setup.pause_every * setup.batch)
        pending = setup.samples - trained - leased - len(self.stored)
        captured_rate, trained_rate = self._rates()
        return RunStatus(
            run=self.name,
            phase="finished" if self.finished else "training",
            step=self.ranks.step,
            total_steps=steps,
            epoch=0,
            epochs=1,
            samples={
                "pending": pending,
                "leased": leased,
                "stored": len(self.stored) - assigned,
                "assigned": assigned,
                "trained": trained - committed,
                "committed": committed,
                "rejected": 0,
            },
            store_bytes=len(self.stored) * setup.sample_bytes,
            store_capacity=setup.store_samples * setup.sample_bytes,
            credit_bytes=self.used * setup.sample_bytes,
            queue_depth=ready,
            workers=(),
            last_step=self.last_step,
            last_heldout=self.last_heldout,
            inference_tokens_per_s=captured_rate * setup.tokens,
            inference_samples_per_s=captured_rate,
            training_tokens_per_s=trained_rate * setup.tokens,
            training_samples_per_s=trained_rate,
            eta_seconds=(setup.samples - trained) / trained_rate if trained_rate else None,
            uptime_seconds=self.now - self._started,
        )

    def _rates(self) -> tuple[float, float]:
        """Samples captured and trained a second, over the last while."""
        captured = self.telemetry.totals["captured_samples"]
        self._past.append((self.now, captured, self.trained_samples))
        while len(self._past) > 2 and self._past[1][0] < self.now - WINDOW_SECONDS:
            self._past.popleft()
        start, captured_before, trained_before = self._past[0]
        seconds = max(1.0, self.now - start)
        return (captured - captured_before) / seconds, (self.trained_samples - trained_before) / seconds

    # ---- time ----

    def after(self, seconds: float, what: Callable[[], object]) -> None:
        heapq.heappush(self._queue, (self.now + seconds, next(self._order), what))

    def vary(self, seconds: float) -> float:
        return seconds * max(0.1, self._random.gauss(1, self.setup.jitter))

    def _advance(self, until: float) -> None:
        while self._queue and self._queue[0][0] <= until:
            self.now, _, what = heapq.heappop(self._queue)
            what()
        self.now = until
