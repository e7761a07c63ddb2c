"""One rank of benchmarks/usp.py: a trainer without its store, in a process of its own, and what is measured there."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchspec.config.schema import OptimizerConfig, TrainingConfig
from torchspec.drafts.draft import Batch, DraftOptions
from torchspec.drafts.eagle3.model import Eagle3Draft
from torchspec.drafts.eagle3.spec import Eagle3Spec
from torchspec.knobs import found
from torchspec.network import free_port
from torchspec.parallel.mesh import Sharing, build_mesh, join_ranks, shard_module
from torchspec.store.geometry import segment_rows
from torchspec.target.head import TargetHead
from torchspec.target.shape import TargetShape
from torchspec.training.learner import add_gradients, reduce_gradients
from torchspec.training.optimizer import build_optimizer
from torchspec.training.sums import StepSums

HOST, CPU = "127.0.0.1", torch.device("cpu")
TARGET = TargetShape(
    hidden_size=256,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    intermediate_size=768,
    rms_norm_eps=1e-5,
    vocab_size=8192,
    max_position_embeddings=1 << 20,
    rope_parameters={"rope_type": "default", "rope_theta": 1e5},
)
LAYERS, DRAFT_VOCAB = (1, 2, 3), 4096
WAYS = {"Ulysses": (True, True), "ring, gathered": (False, True), "ring, circulating": (False, False)}
"""Whether the ranks are Ulysses ranks, and whether a ring gathers once."""
M_MMAP_THRESHOLD = -3
"""glibc's ``mallopt``."""


class Setup(NamedTuple):
    """A draft, and how its samples are shared."""

    spec: Eagle3Spec
    training: TrainingConfig


def setup_of(way: str, degree: int, ttt_length: int, **changes: Any) -> Setup:
    """The setup of ``degree`` ranks that share one sample; of a plain single rank for 1."""
    ulysses, gather_once = WAYS[way]
    sizes = (
        {"sp_ulysses_size": degree, "sp_ring_size": 1} if ulysses else {"sp_ulysses_size": 1, "sp_ring_size": degree}
    )
    training = TrainingConfig(
        attention_backend="usp" if degree > 1 else "flash",
        sp_gather_once=gather_once,
        batch_size=1,
        micro_batch_size=1,
        dtype="float32",
        loss_chunk_tokens=1024,
        **sizes,
        **changes,
    )
    return Setup(Eagle3Spec(TARGET, LAYERS, DRAFT_VOCAB, ttt_length), training)


class Rank:
    """A trainer's rank without its store: draft, optimizer, and the step."""

    def __init__(self, rank: int, setup: Setup):
        spec, training = setup
        self.rank, self.formula = rank, training.shard_formula(spec.halo)
        sharing = None
        if self.formula is not None:
            mesh = build_mesh(CPU, training.sp_ulysses_size, training.sp_ring_size)
            sharing = Sharing(self.formula, mesh, training.sp_gather_once)
        torch.manual_seed(0)
        self.draft = Eagle3Draft(spec, DraftOptions(found(training.loss_chunk_tokens), sharing=sharing))
        embedding_VH, head_VH = (torch.randn(TARGET.vocab_size, TARGET.hidden_size).mul_(0.1) for _ in range(2))
        in_draft, rest = (part.clone() for part in head_VH.split(DRAFT_VOCAB))
        self.target = TargetHead(embedding_VH, in_draft, rest, torch.ones(TARGET.hidden_size), TARGET.rms_norm_eps)
        if training.sharding == "fsdp2":
            shard_module(self.draft, self.draft.units(), CPU)
        self.optimizer = build_optimizer(self.draft.parameters(), OptimizerConfig())

    def step(self, batch: Batch) -> float:
        """The mean loss, before the update."""
        sums = StepSums(self.draft.spec.positions, CPU)
        add_gradients(
            self.draft,
            [batch],
            lambda b: self.draft(b, self.target),
            sums,
            counts_tokens=self.rank == 0,
        )
        reduce_gradients(self.draft, sums, OptimizerConfig().clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss_T, counted_T = sums.flat[: 2 * sums.positions].view(2, -1)
        return (loss_T.sum() / counted_T.sum()).item()

    def batch(self, num_tokens: int) -> Batch:
        """This rank's windows of a sample that is the same for every split. All of its tokens have a loss."""
        generator = torch.Generator().manual_seed(num_tokens)
        hidden = TARGET.hidden_size
        whole = {
            "hs": torch.randn(num_tokens, len(LAYERS) * hidden, generator=generator).bfloat16(),
            "lhs": torch.randn(num_tokens, hidden, generator=generator).bfloat16(),
            "ids": torch.randint(TARGET.vocab_size, (num_tokens,), generator=generator, dtype=torch.int32),
        }
        mask_BS, lengths_B = torch.ones(1, num_tokens, dtype=torch.bool), torch.tensor([num_tokens])
        formula = self.formula
        if formula is None:
            hs, lhs, ids = (x.unsqueeze(0) for x in whole.values())
            return Batch(hs, lhs, ids, mask_BS, lengths_B, lengths_B)
        shape = formula.window_shape([num_tokens])
        padded = {suffix: x.new_zeros(*shape, *x.shape[1:]) for suffix, x in whole.items()}
        for row, (_, segment) in enumerate(formula.windows([num_tokens], self.rank)):
            for suffix, x in whole.items():
                part = x[segment_rows(suffix, segment)]
                padded[suffix][row, : len(part)] = part
        return Batch(padded["hs"], padded["lhs"], padded["ids"], mask_BS, lengths_B, lengths_B)


def warmed_up(rank: int, setup: Setup) -> Rank:
    worker = Rank(rank, setup)
    worker.step(worker.batch(32))
    return worker


def resident_mib(field: str) -> float:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process, from Linux."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def peak_mib(rank: int, setup: Setup, num_tokens: int) -> dict[str, float]:
    """Peak of a step, above start-up. A step on a few tokens goes before it, which makes the optimizer's state."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    warmed_up(rank, setup)  # the code of a step is in memory from here on
    gc.collect()
    start = resident_mib("VmRSS")
    worker = warmed_up(rank, setup)
    batch = worker.batch(num_tokens)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    loss = worker.step(batch)
    return {"mib": resident_mib("VmHWM") - start, "loss": loss}


def step_seconds(rank: int, setup: Setup, num_tokens: int, steps: int) -> dict[str, float]:
    """The fastest of a few steps, after one to warm up."""
    worker = Rank(rank, setup)
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


def traffic_and_work(rank: int, setup: Setup, num_tokens: int) -> dict[str, float]:
    """Of one step. Weights are replicated here, so that what is gathered and scattered is keys and values."""
    worker = warmed_up(rank, setup)
    batch = worker.batch(num_tokens)
    with Meter(setup.training.sp_size) as meter:
        loss = worker.step(batch)
    return {"sent_bytes": meter.sent, "attention_seconds": meter.attention_seconds, "loss": loss}


def on_ranks(measure: Callable[..., dict], setup: Setup, *arguments: Any) -> list[dict]:
    """``measure(rank, setup, *arguments)`` of every rank of a fresh group."""
    results = multiprocessing.get_context("forkserver").SimpleQueue()
    torch.multiprocessing.start_processes(
        _serve,
        (setup.training.world_size, free_port(HOST), results, measure, setup, arguments),
        nprocs=setup.training.world_size,
        start_method="forkserver",
    )
    outcomes = dict(results.get() for _ in range(setup.training.world_size))
    return [outcomes[rank] for rank in range(setup.training.world_size)]


def _serve(rank: int, size: int, port: int, results: Any, measure: Any, setup: Any, arguments: tuple) -> None:
    torch.set_num_threads(1)
    join_ranks(rank, size, HOST, port, CPU, stuck_seconds=600.0)
    dist.barrier()
    results.put((rank, measure(rank, setup, *arguments)))
    dist.barrier()  # rank 0 serves the rendezvous
    dist.destroy_process_group()
