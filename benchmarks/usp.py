"""What sequence parallelism saves and costs: memory, time, traffic, balance, bytes read.

    python benchmarks/usp.py [--parts stored traffic time memory] [--tokens 4096] [--budget-mib 224] [--ttt-length 7]

Ranks are real processes with one thread each that talk over gloo; they take whole training steps (forward, backward,
reduction, clip, AdamW) on shards of one long sample, and every split's loss is held against that of one rank.

- *Memory* of a rank is what it has at the peak of a step above its start-up (code, process group): weights, optimizer,
  target head, shard and step. It is the peak of the resident set, in processes whose allocator gives every large block
  back at once, so nothing is counted that no longer lives. *planned* is what ``torchspec plan`` expects of the same.
- The *longest* sample is the longest among a few tried whose step stays within the budget, by interpolation.
- *Time* is the slowest rank's wall-clock time of a step, the best of the rounds; SP 1 and SP 2 take turns.
- *Traffic* is what a rank sends in one step for attention, forward and backward; the gradients' reduction is not in it.
- *Work* is a rank's CPU time in the flash kernel.
- *Bytes read* are those of a fetcher, from a real store.

Prints a table for each part and writes benchmarks/results/usp.json, in which parts that are not measured stay.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import multiprocessing
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchspec.config.schema import OptimizerConfig, TrainingConfig
from torchspec.contracts import SampleId, SampleRef, pack_mask
from torchspec.driver.memory import rank_memory
from torchspec.models.eagle3 import Eagle3Batch, Eagle3Config, Eagle3Draft, TargetHead
from torchspec.parallel.mesh import build_mesh, join_ranks, shard_module
from torchspec.parallel.shards import ShardFormula
from torchspec.processes import free_port
from torchspec.store.endpoint import StoreEndpoint
from torchspec.store.geometry import SampleGeometry
from torchspec.store.hidden_state_store import HiddenStateStore
from torchspec.store.layout import sample_tensors
from torchspec.store.master import MooncakeMaster
from torchspec.store.node import StoreNode
from torchspec.store.usp import put_usp_shards, segment_rows
from torchspec.training.fetch import SampleFetcher
from torchspec.training.metrics import StepSums
from torchspec.training.optimizer import build_optimizer
from torchspec.training.setup import usp_backend
from torchspec.training.step import add_gradients, reduce_gradients

RESULTS = Path(__file__).parent / "results" / "usp.json"
HOST, CPU = "127.0.0.1", torch.device("cpu")
DRAFT = Eagle3Config(
    hidden_size=256,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    intermediate_size=768,
    rms_norm_eps=1e-5,
    vocab_size=8192,
    draft_vocab_size=4096,
    max_position_embeddings=1 << 20,
    rope_parameters={"rope_type": "default", "rope_theta": 1e5},
)
WAYS = {"Ulysses": (True, True), "ring, gathered": (False, True), "ring, circulating": (False, False)}
"""Whether the ranks are Ulysses ranks, and whether a ring gathers once."""
DEGREES = (2, 4, 8)
PRELOADED = ["torchspec.training.setup", "torchspec.training.fetch", "torchspec.store.node", "torchspec.driver.memory"]
"""Imported once, by the server that all ranks are forked from."""
M_MMAP_THRESHOLD = -3
"""glibc's ``mallopt``."""


def training_of(way: str, degree: int, ttt_length: int, **changes: Any) -> TrainingConfig:
    """The config of ``degree`` ranks that share one sample; of a plain single rank for 1."""
    ulysses, gather_once = WAYS[way]
    sizes = (
        {"sp_ulysses_size": degree, "sp_ring_size": 1} if ulysses else {"sp_ulysses_size": 1, "sp_ring_size": degree}
    )
    return TrainingConfig(
        attention_backend="usp" if degree > 1 else "flash",
        sp_gather_once=gather_once,
        batch_size=1,
        micro_batch_size=1,
        ttt_length=ttt_length,
        dtype="float32",
        **sizes,
        **changes,
    )


# ---- one rank ----


class Rank:
    """A trainer's rank without its store: draft, optimizer, and the step."""

    def __init__(self, rank: int, training: TrainingConfig):
        self.training, self.rank = training, rank
        torch.manual_seed(0)
        self.draft = Eagle3Draft(DRAFT)
        embedding_VH, head_VH = (torch.randn(DRAFT.vocab_size, DRAFT.hidden_size).mul_(0.1) for _ in range(2))
        in_draft, rest = (part.clone() for part in head_VH.split(DRAFT.draft_vocab_size))
        self.target = TargetHead(embedding_VH, in_draft, rest, torch.ones(DRAFT.hidden_size), DRAFT.rms_norm_eps)
        if training.attention_backend == "usp":
            mesh = build_mesh(CPU, training.sp_ulysses_size, training.sp_ring_size)
            self.draft.attention_backend = usp_backend(training, DRAFT, mesh)
        if training.sharding == "fsdp2":
            shard_module(self.draft, CPU)
        self.optimizer = build_optimizer(self.draft.parameters(), OptimizerConfig())
        self.weights = [training.step_decay**t for t in range(training.ttt_length)]

    def step(self, batch: Eagle3Batch) -> float:
        """The mean loss, before the update."""
        training, sums = self.training, StepSums(self.training.ttt_length, CPU)
        add_gradients(
            self.draft,
            [batch],
            lambda b: self.draft(b, self.target, training.ttt_length, self.weights, training.loss_chunk_tokens),
            sums,
            counts_tokens=self.rank == 0,
        )
        reduce_gradients(self.draft, sums, OptimizerConfig().clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss_T, counted_T = sums.flat[:-1].view(-1, training.ttt_length)[:2]
        return (loss_T.sum() / counted_T.sum()).item()

    def batch(self, num_tokens: int) -> Eagle3Batch:
        """This rank's windows of a sample that is the same for every split. All of its tokens have a loss."""
        generator = torch.Generator().manual_seed(num_tokens)
        hidden = DRAFT.hidden_size
        whole = {
            "hs": torch.randn(num_tokens, DRAFT.num_aux * hidden, generator=generator).bfloat16(),
            "lhs": torch.randn(num_tokens, hidden, generator=generator).bfloat16(),
            "ids": torch.randint(DRAFT.vocab_size, (num_tokens,), generator=generator, dtype=torch.int32),
        }
        mask_BS, lengths_B = torch.ones(1, num_tokens, dtype=torch.bool), torch.tensor([num_tokens])
        formula = self.training.shard_formula
        if formula is None:
            hs, lhs, ids = (x.unsqueeze(0) for x in whole.values())
            return Eagle3Batch(hs, lhs, ids, mask_BS, lengths_B)
        shape = formula.window_shape([num_tokens])
        padded = {suffix: x.new_zeros(*shape, *x.shape[1:]) for suffix, x in whole.items()}
        for row, (_, segment) in enumerate(formula.windows([num_tokens], self.rank)):
            for suffix, x in whole.items():
                part = x[segment_rows(suffix, segment)]
                padded[suffix][row, : len(part)] = part
        return Eagle3Batch(padded["hs"], padded["lhs"], padded["ids"], mask_BS, lengths_B)


def warmed_up(rank: int, training: TrainingConfig) -> Rank:
    worker = Rank(rank, training)
    worker.step(worker.batch(32))
    return worker


def resident_mib(field: str) -> float:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process, from Linux."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def peak_mib(rank: int, training: TrainingConfig, num_tokens: int) -> dict[str, float]:
    """Peak of a step, above start-up. A step on a few tokens goes before it, which makes the optimizer's state."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    warmed_up(rank, training)  # the code of a step is in memory from here on
    gc.collect()
    start = resident_mib("VmRSS")
    worker = warmed_up(rank, training)
    batch = worker.batch(num_tokens)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    loss = worker.step(batch)
    return {"mib": resident_mib("VmHWM") - start, "loss": loss}


def step_seconds(rank: int, training: TrainingConfig, num_tokens: int, steps: int) -> dict[str, float]:
    """The fastest of a few steps, after one to warm up."""
    worker = Rank(rank, training)
    batch = worker.batch(num_tokens)
    loss, seconds = worker.step(batch), []
    for _ in range(steps):
        dist.barrier()
        started = time.perf_counter()
        worker.step(batch)
        seconds.append(time.perf_counter() - started)
    return {"seconds": min(seconds), "loss": loss}


class Meter(TorchDispatchMode):
    """What this rank sends, and its CPU seconds in the flash kernel, while it is entered."""

    def __init__(self, group_size: int):
        super().__init__()
        self.peers, self.sent, self.attention_seconds = group_size - 1, 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        started = time.thread_time()
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if "flash_attention" in name:
            self.attention_seconds += time.thread_time() - started
        elif func.namespace == "c10d":
            tensors = [x.nbytes for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
            if name == "send":
                self.sent += sum(tensors)
            elif name in ("_allgather_base_", "_reduce_scatter_base_"):  # one part to each peer
                self.sent += min(tensors) * self.peers
            elif name == "alltoall_base_":
                self.sent += tensors[0] * self.peers // (self.peers + 1)
        return result


def traffic_and_work(rank: int, training: TrainingConfig, num_tokens: int) -> dict[str, float]:
    """Of one step. Weights are replicated here, so that what is gathered and scattered is keys and values."""
    worker = warmed_up(rank, training)
    batch = worker.batch(num_tokens)
    with Meter(training.sp_size) as meter:
        loss = worker.step(batch)
    return {"sent_bytes": meter.sent, "attention_seconds": meter.attention_seconds, "loss": loss}


# ---- all ranks ----


def on_ranks(measure: Callable[..., dict], training: TrainingConfig, *arguments: Any) -> list[dict]:
    """``measure(rank, training, *arguments)`` of every rank of a fresh group."""
    results = multiprocessing.get_context("forkserver").SimpleQueue()
    torch.multiprocessing.start_processes(
        _serve,
        (training.world_size, free_port(HOST), results, measure, training, arguments),
        nprocs=training.world_size,
        start_method="forkserver",
    )
    outcomes = dict(results.get() for _ in range(training.world_size))
    return [outcomes[rank] for rank in range(training.world_size)]


def _serve(rank: int, size: int, port: int, results: Any, measure: Any, training: Any, arguments: tuple) -> None:
    torch.set_num_threads(1)
    join_ranks(rank, size, HOST, port, CPU)
    dist.barrier()
    results.put((rank, measure(rank, training, *arguments)))
    dist.barrier()  # rank 0 serves the rendezvous
    dist.destroy_process_group()


class Losses:
    """Asserts that every split of a sample finds the same loss."""

    def __init__(self) -> None:
        self.known: dict[int, float] = {}

    def check(self, num_tokens: int, outcomes: list[dict]) -> None:
        for outcome in outcomes:
            expected = self.known.setdefault(num_tokens, outcome["loss"])
            assert math.isclose(outcome["loss"], expected, rel_tol=1e-4), f"{num_tokens} tokens: {outcomes}, {expected}"


def measure_memory(training: TrainingConfig, num_tokens: int, losses: Losses) -> float:
    """MiB of the rank that needs most."""
    outcomes = on_ranks(peak_mib, training, num_tokens)
    losses.check(num_tokens, outcomes)
    return max(outcome["mib"] for outcome in outcomes)


def planned_mib(training: TrainingConfig, num_tokens: int) -> float:
    return rank_memory(DRAFT, training, num_tokens, "bfloat16").total / 2**20


def longest(training: TrainingConfig, budget: float, losses: Losses, attempts: int = 3) -> dict[str, float]:
    """The longest sample whose step fits: start from the plan, then follow the line through what was measured."""
    lengths = range(1, 1 << 20)
    low, high = 0, len(lengths)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if planned_mib(training, middle) <= budget else (low, middle)
    points, tried = [(0, planned_mib(training, 1))], low
    for _ in range(attempts):
        points.append((tried, measure_memory(training, tried, losses)))
        (x0, y0), (x1, y1) = points[-2:]
        tried = int(x1 + (0.995 * budget - y1) * (x1 - x0) / (y1 - y0))
    fitting = max(point for point in points if point[1] <= budget)
    return {"tokens": fitting[0], "mib": fitting[1]}


def memory_rows(options: argparse.Namespace) -> list[dict]:
    """Peak for one length, and the longest sample, for each way and degree."""
    rows: list[dict] = []
    losses = Losses()
    for way in WAYS:
        for degree in (1, *DEGREES):
            training = training_of(way, degree, options.ttt_length)
            alone = next((row for row in rows if row["degree"] == degree == 1), None)
            if alone is not None:
                rows.append({**alone, "way": way})
                continue
            fit = longest(training, options.budget_mib, losses)
            one_rank = rows[0]["longest_tokens"] if rows else fit["tokens"]
            rows.append(
                {
                    "way": way,
                    "degree": degree,
                    "peak_mib": measure_memory(training, options.tokens, losses),
                    "planned_mib": planned_mib(training, options.tokens),
                    "longest_tokens": fit["tokens"],
                    "longest_to_one_rank": fit["tokens"] / one_rank,
                    "longest_mib": fit["mib"],
                    "longest_planned_mib": planned_mib(training, fit["tokens"]),
                }
            )
    return rows


def time_rows(options: argparse.Namespace) -> list[dict]:
    losses = Losses()
    setups = {"one rank": training_of("Ulysses", 1, options.ttt_length)}
    setups |= {way: training_of(way, 2, options.ttt_length) for way in WAYS}
    best = dict.fromkeys(setups, math.inf)
    for _ in range(options.rounds):
        for name, training in setups.items():
            outcomes = on_ranks(step_seconds, training, options.tokens, 1)
            losses.check(options.tokens, outcomes)
            best[name] = min(best[name], max(outcome["seconds"] for outcome in outcomes))
    return [{"way": n, "seconds": s, "to_one_rank": s / best["one rank"]} for n, s in best.items()]


def expected_bytes(training: TrainingConfig, num_tokens: int) -> float:
    """What one rank sends in a step of one sample, in float32, by the formulas of docs/usp.md."""
    ulysses, ring, steps = training.sp_ulysses_size, training.sp_ring_size, training.ttt_length
    queries, keys = (4 * 2 * heads * DRAFT.head_dim * num_tokens for heads in (DRAFT.num_heads, DRAFT.num_kv_heads))
    if ulysses > 1:
        return 2 * steps * (queries + keys) / ulysses * (ulysses - 1) / ulysses
    return keys / ring * (2 * (ring - 1) if training.sp_gather_once else steps * (3 * ring - 2))


def traffic_rows(options: argparse.Namespace) -> list[dict]:
    """Traffic and balance, for both layouts."""
    rows, losses = [], Losses()
    for degree in (2, 4):
        for layout in ("contiguous", "zigzag"):
            for way in WAYS:
                training = training_of(way, degree, options.ttt_length, sp_layout=layout, sharding="replicated")
                outcomes = on_ranks(traffic_and_work, training, options.tokens)
                losses.check(options.tokens, outcomes)
                work = [outcome["attention_seconds"] for outcome in outcomes]
                sent = max(outcome["sent_bytes"] for outcome in outcomes)
                assert math.isclose(sent, expected_bytes(training, options.tokens), rel_tol=0.01)
                rows.append(
                    {
                        "way": way,
                        "degree": degree,
                        "layout": layout,
                        "sent_bytes": sent,
                        "attention_seconds": work,
                        "max_over_mean": max(work) * len(work) / sum(work),
                    }
                )
    return rows


# ---- the store ----


def hold_memory(endpoint: StoreEndpoint, segment_bytes: int, pipe: Connection) -> None:
    """The store node's process."""
    node = StoreNode(endpoint, segment_bytes)
    pipe.send("ready")
    pipe.recv()
    node.close()


@contextmanager
def running_store(segment_bytes: int) -> Iterator[StoreEndpoint]:
    with tempfile.TemporaryDirectory() as folder:
        master = MooncakeMaster(Path(folder) / "mooncake_master.log")
        context = multiprocessing.get_context("forkserver")
        ours, theirs = context.Pipe()
        node = context.Process(target=hold_memory, args=(master.endpoint, segment_bytes, theirs), daemon=True)
        node.start()
        theirs.close()
        ours.recv()
        try:
            yield master.endpoint
        finally:
            ours.send("end")
            node.join(30)
            master.stop()


def stored_rows(options: argparse.Namespace) -> list[dict]:
    """Bytes and time of a rank's read, for whole samples and for shards, with the states of a SmolLM2-135M."""
    geometry, tokens = SampleGeometry(3, 576, "bfloat16"), options.stored_tokens
    whole_bytes = geometry.stored_bytes(tokens)
    rows: list[dict] = []
    with running_store((64 << 20) + 4 * whole_bytes) as endpoint:
        store = HiddenStateStore(endpoint, 2 * whole_bytes)
        for degree in (1, *DEGREES):
            for layout in ("contiguous", "zigzag") if degree > 1 else ("whole",):
                sharding = ShardFormula(1, degree, layout, options.ttt_length) if degree > 1 else None
                sharded = replace(geometry, sharding=sharding)
                ref = store_sample(store, sharded, f"{layout}{degree}", tokens)
                read, seconds = zip(*(fetch(store, sharded, rank, ref) for rank in range(degree)), strict=True)
                store.remove(ref.key, sharded.suffixes)
                share = max(read) / (rows[0]["bytes"] if rows else max(read))
                row = {"degree": degree, "layout": layout, "bytes": max(read), "share": share, "seconds": max(seconds)}
                rows.append(row)
        store.close()
    return rows


def store_sample(store: HiddenStateStore, geometry: SampleGeometry, key: str, tokens: int) -> SampleRef:
    tensors = sample_tensors(tokens, geometry.num_aux, geometry.hidden_size, geometry.dtype)
    buffer = store.allocate(tensors)
    for view in buffer.views.values():
        view.zero_()
    sharding = geometry.sharding
    put = store.put(key, buffer) if sharding is None else put_usp_shards(store, key, buffer, sharding)
    packed = pack_mask([True] * tokens)
    return SampleRef(SampleId(0, 0), key, tokens, packed, tensors, put.result(), "post_norm", sharding)


def fetch(store: HiddenStateStore, geometry: SampleGeometry, rank: int, ref: SampleRef) -> tuple[int, float]:
    """Bytes of one read, and seconds of the fastest of three."""
    seconds = []
    for _ in range(3):
        fetcher = SampleFetcher(store, geometry, rank, pin_memory=False)
        started = time.perf_counter()
        _, missing = fetcher.fetch(((ref,),), {})
        seconds.append(time.perf_counter() - started)
        assert not missing
    return fetcher.bytes_read, min(seconds)


# ---- report ----

PARTS: dict[str, Callable[[argparse.Namespace], list[dict]]] = {
    "stored": stored_rows,
    "traffic": traffic_rows,
    "time": time_rows,
    "memory": memory_rows,
}
TITLES = {
    "stored": "Bytes that a rank reads of a sample of {stored_tokens} tokens",
    "traffic": "Bytes that a rank sends in a step for attention, and balance, {tokens} tokens",
    "time": "Time of a step, {tokens} tokens",
    "memory": "Memory of a rank, {tokens} tokens, and the longest sample in {budget_mib} MiB",
}
COLUMNS: dict[str, dict[str, Callable[[dict], str]]] = {
    "stored": {
        "SP": lambda r: str(r["degree"]),
        "layout": lambda r: r["layout"],
        "MB": lambda r: f"{r['bytes'] / 1e6:.2f}",
        "share": lambda r: f"{r['share']:.4f}",
        "s": lambda r: f"{r['seconds']:.3f}",
    },
    "traffic": {
        "way": lambda r: r["way"],
        "SP": lambda r: str(r["degree"]),
        "layout": lambda r: r["layout"],
        "MB sent": lambda r: f"{r['sent_bytes'] / 1e6:.1f}",
        "work, max / mean": lambda r: f"{r['max_over_mean']:.2f}",
    },
    "time": {
        "way": lambda r: r["way"],
        "s": lambda r: f"{r['seconds']:.2f}",
        "to one rank": lambda r: f"{r['to_one_rank']:.2f}",
    },
    "memory": {
        "way": lambda r: r["way"],
        "SP": lambda r: str(r["degree"]),
        "MiB": lambda r: f"{r['peak_mib']:.0f}",
        "planned": lambda r: f"{r['planned_mib']:.0f}",
        "longest": lambda r: f"{r['longest_tokens']:,}",
        "to SP 1": lambda r: f"{r['longest_to_one_rank']:.2f}x",
        "MiB there": lambda r: f"{r['longest_mib']:.0f}",
        "planned there": lambda r: f"{r['longest_planned_mib']:.0f}",
    },
}


def show(part: str, rows: list[dict], options: argparse.Namespace) -> None:
    title = TITLES[part].format(**vars(options))
    table = Table(title=title, min_width=len(title))
    for name in COLUMNS[part]:
        table.add_column(name, justify="left" if name in ("way", "layout") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(cell(row) for cell in COLUMNS[part].values()))
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096, help="length of the sample of all parts but the first")
    parser.add_argument("--budget-mib", type=int, default=224, help="memory of a rank that the longest sample has")
    parser.add_argument("--ttt-length", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=2, help="of the timing")
    parser.add_argument("--stored-tokens", type=int, default=16384, help="length of the sample in the store")
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=list(PARTS), help="measure these again")
    options = parser.parse_args()
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    report = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    report["machine"] = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
    report["draft"] = {name: value for name, value in asdict(DRAFT).items() if isinstance(value, int)}
    RESULTS.parent.mkdir(exist_ok=True)
    for part in options.parts:
        rows = PARTS[part](options)
        show(part, rows, options)
        report[part] = {"options": {k: v for k, v in vars(options).items() if k != "parts"}, "rows": rows}
        RESULTS.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
