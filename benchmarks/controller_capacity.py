"""How much the controller can hand out, and how long a training rank waits for samples that are there.

The controller is the real actor on a real Ray cluster, with the calls that real workers and ranks make: lease,
publish, next_batch, fetched, step_done. Engines and ranks are simulated; all engines share one process and all ranks
another. The store's master is a real one. Nothing is ever put, so that each removal is its real call and finds nothing.

    saturated   nobody computes: as many samples a second as the controller can pass on
    loaded      ranks compute for as long as makes up the given load, and engines for as long as yields half as much
                again; ranks fetch the next step while they make one, as real ones do

Three waits are taken. ``starved`` is what passes in a rank's step loop between two steps. It is short because ranks ask
for a step, and tell that one is made, while they make another. ``handed`` is what passes from when a step is there and
asked for to when the rank has it, and ``told`` until the controller knows that one is made.

    python benchmarks/controller_capacity.py [--seconds N] [--load SAMPLES_PER_SECOND]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("RAY_AUTH_MODE", "token")  # read when ray is imported

import ray
from rich.console import Console
from rich.table import Table

from torchspec.config.schema import Config
from torchspec.contracts import Lease, RankBatch, RankId, SampleRef, WorkerReport
from torchspec.controller.controller import Controller
from torchspec.controller.spec import ControllerSpec
from torchspec.data.prompt_set import PromptSet
from torchspec.driver.actors import LONG_POLLS
from torchspec.store.endpoint import StoreEndpoint
from torchspec.store.geometry import SampleGeometry
from torchspec.store.master import MooncakeMaster

RESULTS = Path(__file__).parent / "results" / "controller_capacity.json"
POOLS = (1, 4, 16, 64)
PROMPTS, TOKENS, VOCAB = 20_000, 256, 32_000
BATCH_PER_RANK = 4
WARM_UP_STEPS, LEAST_STEPS = 3, 20
HELD = 8
"""Samples that one engine works on at a time."""
GEOMETRY = SampleGeometry(num_aux=3, hidden_size=4096, dtype="bfloat16")


class TimedController(Controller):
    def __init__(self, spec: ControllerSpec):
        super().__init__(spec)
        self._formed_at: dict[int, float] = {}
        assign = self.buffer.ledger.assign

        def noted() -> int | None:
            step = assign()
            if step is not None:
                self._formed_at[step] = time.time()
            return step

        self.buffer.ledger.assign = noted  # type: ignore[method-assign]

    async def cpu_seconds(self) -> float:
        return time.process_time()

    async def formed_at(self) -> dict[int, float]:
        """When each step was there. Unix seconds."""
        return self._formed_at


@ray.remote(num_cpus=0, max_concurrency=1000)
class Engines:
    """Inference workers whose engines take a given time for each sample, which varies by a tenth."""

    async def run(self, controller: Any, count: int, sample_seconds: float) -> None:
        self._sample_seconds = sample_seconds
        await asyncio.gather(*(self._worker(controller, f"worker-{i}") for i in range(count)))

    async def _worker(self, controller: Any, name: str) -> None:
        under_way: set[asyncio.Task[None]] = set()
        while leases := await controller.lease.remote(name, HELD - len(under_way), WorkerReport(name)):
            under_way |= {asyncio.create_task(self._publish(controller, name, lease)) for lease in leases}
            if len(under_way) == HELD:
                _, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)

    async def _publish(self, controller: Any, name: str, lease: Lease) -> None:
        tensors = GEOMETRY.tensors(TOKENS)
        size = GEOMETRY.stored_bytes(TOKENS)
        ref = SampleRef(lease.sample, lease.key, TOKENS, lease.loss_mask, tensors, size, "post_norm")
        await _busy(self._sample_seconds)
        await controller.publish.remote(name, ref, None)


@dataclass(frozen=True)
class Got:
    """A step that a rank has got. Unix seconds."""

    step: int
    asked: float
    received: float
    wanted: float
    """When the rank had made the step before."""
    had: float
    """When the rank could begin this one: all ranks have fetched it, and the one before is made."""


@ray.remote(num_cpus=0, max_concurrency=1000)
class Ranks:
    """Training ranks that compute for a given time, which varies by a tenth."""

    async def run(
        self, controller: Any, count: int, step_seconds: float
    ) -> tuple[list[Got], list[tuple[float, float]]]:
        """Until the controller has no more. Returns steps, and when each was made and how long telling of it took."""
        self._told = list[tuple[float, float]]()
        got = await asyncio.gather(*(self._rank(controller, RankId(1, rank), step_seconds) for rank in range(count)))
        return [step for steps in got for step in steps], self._told

    async def _rank(self, controller: Any, rank: RankId, step_seconds: float) -> list[Got]:
        steps = list[Got]()
        ahead, telling = asyncio.create_task(self._fetch(controller, rank, 1)), asyncio.create_task(asyncio.sleep(0))
        wanted = time.time()
        while True:
            asked, received, batch = await ahead
            if batch is None:
                await telling
                return steps
            steps.append(Got(batch.step, asked, received, wanted, time.time()))
            ahead = asyncio.create_task(self._fetch(controller, rank, batch.step + 1))
            await _busy(step_seconds)
            wanted = time.time()
            await telling
            telling = asyncio.create_task(self._tell(controller, rank, batch.step))
            if batch.checkpoint and rank.rank == 0:
                await controller.ledger_snapshot.remote(rank, batch.step)
                await controller.committed.remote(rank, batch.step, "folder", False, "")

    async def _tell(self, controller: Any, rank: RankId, step: int) -> None:
        made = time.time()
        await controller.step_done.remote(rank, step, None)
        self._told.append((made, time.time() - made))

    async def _fetch(self, controller: Any, rank: RankId, step: int) -> tuple[float, float, RankBatch | None]:
        asked = time.time()
        batch = await controller.next_batch.remote(rank, step)
        received = time.time()
        if batch is not None:
            assert await controller.fetched.remote(rank, batch.step, 0, ()) is None
        return asked, received, batch


async def _busy(seconds: float) -> None:
    if seconds:
        await asyncio.sleep(seconds * random.uniform(0.9, 1.1))


@dataclass(frozen=True)
class Measured:
    samples_per_s: float
    starved_p50_ms: float
    starved_p99_ms: float
    handed_p50_ms: float
    handed_p99_ms: float
    told_p50_ms: float
    told_p99_ms: float
    controller_cpu: float
    """Cores."""
    controller_cpu_ms_per_sample: float


def prompts() -> PromptSet:
    """Answered conversations: nothing waits for the vocabulary."""
    tokens = np.arange(PROMPTS * TOKENS, dtype=np.int32) % VOCAB
    return PromptSet(
        ids=[f"p{i}" for i in range(PROMPTS)],
        token_ids=tokens,
        offsets=np.arange(PROMPTS + 1) * TOKENS,
        packed_masks=np.full(PROMPTS * TOKENS // 8, 0xFF, dtype=np.uint8),
        max_answer_tokens=np.zeros(PROMPTS, dtype=np.int32),
        rejected=[],
        content_hash="benchmark",
    )


def spec(run_dir: Path, endpoint: StoreEndpoint, data: PromptSet, pool: int) -> ControllerSpec:
    batch = BATCH_PER_RANK * pool
    config = Config.model_validate(
        {
            "run": {"name": run_dir.name},
            "target": {"path": "unused"},
            "data": {"cache_dir": run_dir},
            "inference": {"workers": pool},
            "training": {"dp_size": pool, "batch_size": batch, "epochs": 100},
            "controller": {"reorder_window": max(256, 4 * batch)},
        }
    )
    return ControllerSpec(
        config, data, None, GEOMETRY, None, VOCAB, "target", None, (0,), endpoint, credit_bytes=1 << 40, run_dir=run_dir
    )


def measure(
    endpoint: StoreEndpoint, data: PromptSet, pool: int, sample_seconds: float, step_seconds: float, seconds: float
) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / f"run{random.getrandbits(32):x}"
        controller = (
            ray.remote(TimedController)
            .options(num_cpus=0, max_concurrency=LONG_POLLS)
            .remote(spec(run_dir, endpoint, data, pool))
        )
        ray.get(controller.begin.remote())
        ray.get(controller.open_group.remote())
        ray.get(controller.draft_vocab.remote())
        engines, ranks = Engines.remote(), Ranks.remote()
        working = [
            engines.run.remote(controller, pool, sample_seconds),
            ranks.run.remote(controller, pool, step_seconds),
        ]
        while trained(controller) < WARM_UP_STEPS * BATCH_PER_RANK * pool:  # connections, and a full window
            time.sleep(0.1)
        before, started, cpu = trained(controller), time.time(), ray.get(controller.cpu_seconds.remote())
        while time.time() < started + seconds or trained(controller) < before + LEAST_STEPS * BATCH_PER_RANK * pool:
            time.sleep(0.5)
        cpu = ray.get(controller.cpu_seconds.remote()) - cpu
        elapsed, samples = time.time() - started, trained(controller) - before
        ray.get(controller.request_stop.remote("measured"))
        steps, told = ray.get(working[1])
        formed_at = ray.get(controller.formed_at.remote())
        ray.get(controller.finish.remote())
        ray.get(working[0])
        for actor in (controller, engines, ranks):
            ray.kill(actor)
    steps = [step for step in steps if started <= step.asked < started + elapsed]
    handed = [step.received - max(step.asked, formed_at[step.step]) for step in steps]
    starved = [step.had - step.wanted for step in steps]
    told = [seconds for made, seconds in told if started <= made < started + elapsed]
    waits_ms = (float(p) * 1e3 for waits in (starved, handed, told) for p in np.percentile(waits, [50, 99]))
    return Measured(samples / elapsed, *waits_ms, cpu / elapsed, cpu / max(1, samples) * 1e3)


def trained(controller: Any) -> int:
    counts = ray.get(controller.status.remote()).samples
    return counts.get("trained", 0) + counts.get("committed", 0)


def show(rows: dict[str, dict[int, Measured]], load: float) -> None:
    table = Table(title=f"Controller, simulated workers and ranks (loaded: {load:g} samples/s)")
    for column in (
        "",
        "workers, ranks",
        "samples/s",
        "starved p50, p99, ms",
        "handed",
        "told",
        "CPU, cores",
        "CPU, ms a sample",
    ):
        table.add_column(column, justify="right")
    for mode, pools in rows.items():
        for pool, m in pools.items():
            waits = (
                f"{m.starved_p50_ms:.1f}, {m.starved_p99_ms:.1f}",
                f"{m.handed_p50_ms:.1f}, {m.handed_p99_ms:.1f}",
                f"{m.told_p50_ms:.1f}, {m.told_p99_ms:.1f}",
            )
            figures = (
                f"{m.samples_per_s:.0f}",
                *(waits if mode == "loaded" else ("", "", "")),
                f"{m.controller_cpu:.2f}",
                f"{m.controller_cpu_ms_per_sample:.2f}",
            )
            table.add_row(mode, str(pool), *figures)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement")
    parser.add_argument("--load", type=float, default=200.0, help="samples a second that loaded ranks take")
    parser.add_argument("--pools", type=int, nargs="+", default=POOLS)
    args = parser.parse_args()
    rows: dict[str, dict[int, Measured]] = {"saturated": {}, "loaded": {}}
    with tempfile.TemporaryDirectory(prefix="ts") as folder:
        master = MooncakeMaster(Path(folder) / "master.log")
        ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", _temp_dir=f"{folder}/ray")
        data = prompts()
        for pool in args.pools:
            times = {
                "saturated": (0.0, 0.0),
                "loaded": (HELD * pool / args.load / 1.5, BATCH_PER_RANK * pool / args.load),
            }
            for mode, (sample_seconds, step_seconds) in times.items():
                rows[mode][pool] = measure(master.endpoint, data, pool, sample_seconds, step_seconds, args.seconds)
        ray.shutdown()
        master.stop()
    show(rows, args.load)
    machine = {"cores": os.cpu_count(), "load_samples_per_s": args.load, "batch_per_rank": BATCH_PER_RANK}
    measured = {mode: {str(pool): asdict(m) for pool, m in pools.items()} for mode, pools in rows.items()}
    RESULTS.write_text(json.dumps(machine | measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
