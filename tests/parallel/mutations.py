"""Mistakes that the checks of this folder must notice, each of which real projects have made or could."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

from tests.mutation import Mutation
from torchspec.drafts.eagle3.model import Eagle3Draft
from torchspec.nn.chain_attention import ChainAttention
from torchspec.parallel import mesh, ring, ulysses, usp
from torchspec.shards import ShardFormula
from torchspec.training import learner

KERNEL, GATHERED = ring.RingKernel, ring._Gathered
MISTAKES: dict[str, Mutation] = {
    "zeros": Mutation(ChainAttention, "forward", "return o_RQE.to(q_RQE.dtype)", "return q_RQE * 0"),
    "halo dropped": Mutation(ShardFormula, "_segment", "stop + self.halo", "stop"),
    "halo one short": Mutation(ShardFormula, "_segment", "stop + self.halo", "stop + self.halo - 1"),
    "two ranks swapped": Mutation(usp.UspBackend, "__init__", "self.rank = ", "self.rank = 1 ^ "),
    "ring order reversed": Mutation(usp.UspBackend, "plan", "ring_rank - i", "ring_rank + i"),
    "heads in another order": Mutation(usp, "join_heads", ".transpose(0, 1)", ".flip(0).transpose(0, 1)"),
    "other ranks' keys unseen": Mutation(usp, "tiles", "if k.start < before", "if k.start < before - 10**6"),
    "parts not merged": Mutation(ring, "merge_", "o_LQE.lerp_(", "o_LQE.copy_(part_o_LQE); o_LQE.clone().lerp_("),
    "positions of a shard": Mutation(usp, "_local_rows", "starts.append(start)", "starts.append(0)"),
    "other ranks' gradients lost (gathered)": Mutation(
        GATHERED, "backward", "dist.reduce_scatter_single(dkv_GKX, dall, group=ctx.group)",
        "dkv_GKX.copy_(dall[: ctx.slots])"),
    "other ranks' gradients lost (circulating)": Mutation(
        KERNEL, "gradients", "dblock += travelling.wait()", "travelling.wait()"),
    "gradients stay one rank off": Mutation(
        KERNEL, "gradients", "else travelling.wait()", "else (travelling.wait(), dblock)[1]"),
    "mean over ranks (FSDP2)": Mutation(mesh, "shard_module", "factor(1.0)", "factor(float(dist.get_world_size()))"),
    "gradients not summed (replicated)": Mutation(learner, "sum_over_ranks", "dist.all_reduce(parameter.grad)", "pass"),
    "local counts": Mutation(learner, "reduce_gradients", "dist.all_reduce(sums.flat)", "pass"),
    "norm of one shard (FSDP2)": Mutation(
        learner, "scale_and_clip", "group is not None", "group is None and square < 0"),
}  # fmt: skip
"""Every one lets all ranks issue the same collectives, so the step ends and only its numbers are wrong."""

SKIPS: dict[str, Mutation] = {
    "no loss, no graph": Mutation(
        Eagle3Draft, "_unroll", "torch.stack(residuals)",
        "torch.stack(residuals if len(rows.teacher_flat_N) else [x.detach() for x in residuals])"),
    "nothing to send, no all-to-all": Mutation(
        ulysses, "_exchange", "dist.all_to_all_single(", "x.any() and dist.all_to_all_single("),
    "no queries, no ring": Mutation(
        KERNEL, "attend", "zip(self._blocks(kv_GKX), self.schedule, strict=True)",
        "(zip(self._blocks(kv_GKX), self.schedule) if self.query_slots else ())"),
    "no gradient, no all-reduce": Mutation(
        learner, "sum_over_ranks", "dist.all_reduce(parameter.grad)",
        "parameter.grad.any() and dist.all_reduce(parameter.grad)"),
}  # fmt: skip
"""Collectives that depend on what a rank's own mask holds. The first is that of TorchSpec's pull request 93."""

MUTATIONS = MISTAKES | SKIPS


@contextmanager
def mutated(name: str | None) -> Iterator[None]:
    """Run with one of :data:`MUTATIONS`, or with none."""
    if name is None:
        yield
        return
    mutation = MUTATIONS[name]
    original = inspect.getattr_static(mutation.owner, mutation.function)
    setattr(mutation.owner, mutation.function, mutation.written())
    try:
        yield
    finally:
        setattr(mutation.owner, mutation.function, original)
