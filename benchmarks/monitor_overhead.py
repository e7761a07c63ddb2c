"""What monitoring costs: the real controller with simulated engines and ranks, monitoring on against off.

The engines and ranks do nothing but speak to the controller, as fast as it answers, so all time is the controller's:
in a run, where it is idle most of the time, monitoring can only cost less. On and off take turns in pairs; a pair's
overhead is the ratio of the two, and the table shows the median of the pairs, once of throughput and once of the CPU
seconds that a sample took. Reports come as often as in a run from each worker and each rank.

    python benchmarks/monitor_overhead.py [--pairs N] [--samples N]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from torchspec.config.load import parse_config
from torchspec.contracts import RankId, RankReport, SampleRef, SampleTiming, WorkerReport
from torchspec.controller.controller import Controller
from torchspec.controller.spec import ControllerSpec
from torchspec.data.prompt_set import PromptSet
from torchspec.store.client import StoreNode
from torchspec.store.endpoint import StoreEndpoint
from torchspec.store.geometry import SampleGeometry
from torchspec.store.master import MooncakeMaster

RESULTS = Path(__file__).parent / "results" / "monitor_overhead.json"
GEOMETRY = SampleGeometry(num_aux=3, hidden_size=576, dtype="bfloat16")
TOKENS, BATCH, HELD = 256, 8, 8
POOLS = {"2 workers, 1 rank": (2, 1), "8 workers, 4 ranks": (8, 4), "64 workers, 64 ranks": (64, 64)}


def controller_of(endpoint: StoreEndpoint, folder: Path, samples: int, ranks: int, monitored: bool) -> Controller:
    batch = max(BATCH, ranks)
    config = parse_config(
        {
            "run": {"name": folder.name, "dir": str(folder.parent)},
            "target": {"path": "unused"},
            "data": {"cache_dir": str(folder)},
            "training": {"dp_size": ranks, "batch_size": batch, "micro_batch_size": 4},
            "controller": {"reorder_window": 16 * batch},
            "draft": {"vocab_size": 32},
            "checkpoint": {"every_steps": 100},
            "monitor": {} if monitored else {"history_seconds": 0},
        }
    )
    prompts = PromptSet(
        ids=[f"p{i}" for i in range(samples)],
        token_ids=np.tile(np.arange(TOKENS, dtype=np.int32) % 64, samples),
        offsets=np.arange(samples + 1) * TOKENS,
        packed_masks=np.full(samples * (TOKENS // 8), 255, dtype=np.uint8),
        max_answer_tokens=np.zeros(samples, dtype=np.int32),
        rejected=[],
        content_hash=f"bench-{samples}",
    )
    return Controller(
        ControllerSpec(
            config,
            prompts,
            None,
            GEOMETRY,
            None,
            64,
            "target",
            None,
            (0,),
            endpoint,
            credit_bytes=1 << 34,
            run_dir=folder,
        )
    )


async def work(controller: Controller, name: str) -> None:
    """An engine that needs no time."""
    tensors = GEOMETRY.tensors(TOKENS)
    samples = 0
    while leases := await controller.lease(name, HELD, WorkerReport(name, samples=samples)):
        for lease in leases:
            ref = SampleRef(lease.sample, lease.key, TOKENS, lease.loss_mask, tensors, 1 << 20, "post_norm")
            await controller.publish(name, ref, None, SampleTiming(0.1, 0.5, 0.01, 0.02))
        samples += len(leases)


async def train(controller: Controller, rank: int) -> None:
    """A rank that needs no time."""
    me, steps = RankId(1, rank), itertools.count(1)
    while (batch := await controller.next_batch(me, next(steps))) is not None:
        await controller.fetched(me, batch.step, 0, ())
        await controller.step_done(me, batch.step, None)
        if batch.checkpoint and rank == 0:
            await controller.ledger_snapshot(me, batch.step)
            await controller.committed(me, batch.step, f"step_{batch.step}", False, "")


async def report(controller: Controller, workers: int, ranks: int) -> None:
    """What workers and ranks say about themselves, spread over the time between two reports."""
    since = time.monotonic()
    while True:
        seconds = time.monotonic() - since
        for number in range(max(workers, ranks)):
            if number < workers:
                counts = WorkerReport(f"worker-{number}", samples=int(seconds), seconds=seconds, leases=1)
                await controller.worker_report(counts)
            if number < ranks:
                await controller.rank_report(RankId(1, number), RankReport(number, steps=int(seconds), seconds=seconds))
            await asyncio.sleep(controller.config.monitor.history_seconds / max(workers, ranks))


async def run(endpoint: StoreEndpoint, folder: Path, samples: int, pools: tuple[int, int], monitored: bool) -> dict:
    workers, ranks = pools
    controller = controller_of(endpoint, folder, samples, ranks, monitored)
    await controller.begin()
    await controller.open_group()
    reports = asyncio.create_task(report(controller, workers, ranks)) if monitored else None
    started, cpu = time.perf_counter(), time.process_time()
    pool = [asyncio.create_task(work(controller, f"worker-{i}")) for i in range(workers)]
    await asyncio.gather(*(train(controller, rank) for rank in range(ranks)))
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    await controller.finish()
    await asyncio.gather(*pool)
    if reports is not None:
        reports.cancel()
    history = folder / "metrics" / "history.jsonl"
    assert (len(history.read_text().splitlines()) >= seconds / 2) == monitored
    return {"samples_per_s": samples / seconds, "cpu_ms": 1000 * cpu_seconds / samples, "seconds": seconds}


def measure(pairs: int, samples: int) -> dict[str, dict[str, float]]:
    """Name of the pools to the medians over the pairs."""
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        master = MooncakeMaster(folder / "master.log")
        node = StoreNode(master.endpoint, 64 << 20)
        try:
            for name, pools in POOLS.items():
                taken = []
                for pair in range(pairs + 1):  # the first warms up
                    order = (True, False) if pair % 2 else (False, True)
                    arms = {
                        on: asyncio.run(
                            run(master.endpoint, folder / f"{len(taken)}-{pools[0]}-{on}", samples, pools, on)
                        )
                        for on in order
                    }
                    taken.append(arms)
                results[name] = _summary(taken[1:])
        finally:
            node.close()
            master.stop()
    return results


def _summary(taken: list[dict[bool, dict[str, float]]]) -> dict[str, float]:
    def median(name: str, on: bool) -> float:
        return statistics.median(arms[on][name] for arms in taken)

    slower = [arms[False]["samples_per_s"] / arms[True]["samples_per_s"] - 1 for arms in taken]
    more_cpu = [arms[True]["cpu_ms"] / arms[False]["cpu_ms"] - 1 for arms in taken]
    return {
        "off_samples_per_s": median("samples_per_s", False),
        "on_samples_per_s": median("samples_per_s", True),
        "time_overhead": statistics.median(slower),
        "cpu_overhead": statistics.median(more_cpu),
        "cpu_overhead_least": min(more_cpu),
        "cpu_overhead_most": max(more_cpu),
        "cpu_ms_a_second": median("cpu_ms", False) * statistics.median(more_cpu) * median("samples_per_s", False),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--samples", type=int, default=6000)
    options = parser.parse_args()
    results = measure(options.pairs, options.samples)
    table = Table(title="A saturated controller, monitoring on against off")
    for heading in ("pools", "off, samples/s", "on, samples/s", "time", "CPU time", "CPU ms a second"):
        table.add_column(heading, justify="left" if heading == "pools" else "right")
    for name, row in results.items():
        speeds = (f"{row['off_samples_per_s']:.0f}", f"{row['on_samples_per_s']:.0f}")
        overheads = (f"{row['time_overhead']:+.1%}", f"{row['cpu_overhead']:+.1%}")
        table.add_row(name, *speeds, *overheads, f"{row['cpu_ms_a_second']:.1f}")
    Console().print(table)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"pairs": options.pairs, "samples": options.samples, "pools": results}, indent=2))


if __name__ == "__main__":
    main()
