"""One rank of benchmarks/usp.py: a trainer without its store, in a process of its own, and what is measured there."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchspec.config.schema import OptimizerConfig, TrainingConfig
from torchspec.drafts.eagle3.model import Batch, Eagle3Draft, Eagle3Spec, TargetHead
from torchspec.network import free_port
from torchspec.parallel.mesh import build_mesh, join_ranks, shard_module
from torchspec.store.usp import segment_rows
from torchspec.training.optimizer import build_optimizer
from torchspec.training.setup import usp_backend
from torchspec.training.step import add_gradients, reduce_gradients
from torchspec.training.sums import StepSums

HOST, CPU = "127.0.0.1", torch.device("cpu")
DRAFT = Eagle3Spec(
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

    def step(self, batch: Batch) -> float:
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

    def batch(self, num_tokens: int) -> Batch:
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
            return Batch(hs, lhs, ids, mask_BS, lengths_B)
        shape = formula.window_shape([num_tokens])
        padded = {suffix: x.new_zeros(*shape, *x.shape[1:]) for suffix, x in whole.items()}
        for row, (_, segment) in enumerate(formula.windows([num_tokens], self.rank)):
            for suffix, x in whole.items():
                part = x[segment_rows(suffix, segment)]
                padded[suffix][row, : len(part)] = part
        return Batch(padded["hs"], padded["lhs"], padded["ids"], mask_BS, lengths_B)


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
