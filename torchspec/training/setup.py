"""Makes what a rank trains with: device, draft, the target's frozen pieces, compilation."""

from __future__ import annotations

import logging

import torch
import torch._dynamo
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig

from torchspec.config.schema import Config, TrainingConfig
from torchspec.drafts.eagle3.initialise import initialise
from torchspec.drafts.eagle3.model import Eagle3Draft, Eagle3Spec, TargetHead, load_target_head
from torchspec.drafts.eagle3.sharded import UspBackend
from torchspec.shards import ShardFormula
from torchspec.training.weights import warm_start

log = logging.getLogger(__name__)


def build_draft(
    config: Config, draft_ids: Tensor, num_aux: int, device: torch.device
) -> tuple[Eagle3Draft, TargetHead]:
    """A float32 draft on ``device``, whole and equal on every rank, and the target's frozen pieces.

    The draft's random weights come from ``run.seed`` alone. ``training.init_from`` replaces them.
    """
    training = config.training
    dtype = getattr(torch, training.dtype)
    head = load_target_head(config.target.path, dtype, device, draft_ids)
    target = AutoConfig.from_pretrained(config.target.path, trust_remote_code=config.target.trust_remote_code)
    shape = Eagle3Spec.from_target(target, len(draft_ids), num_aux)
    torch.manual_seed(config.run.seed)
    draft = Eagle3Draft(shape, training.activation_checkpointing)
    initialise(draft, head, config.draft.init, config.target.path)
    if training.init_from is not None:
        warm_start(draft, draft_ids, training.init_from)
    return draft.to(device), head


def usp_backend(training: TrainingConfig, draft: Eagle3Spec, mesh: DeviceMesh) -> UspBackend:
    """Sequence parallelism as the config says.

    Raises:
        ValueError: the draft's query heads cannot be split over ``training.sp_ulysses_size`` ranks.
    """
    formula = ShardFormula(training.sp_ulysses_size, training.sp_ring_size, training.sp_layout, training.ttt_length)
    return UspBackend.on(mesh, formula, draft.num_heads, draft.num_kv_heads, training.sp_gather_once)


def compile_or_stay_eager(draft: Eagle3Draft, ttt_length: int, device: torch.device) -> None:
    """Compile the draft's layer in place; where no compiler works here, warn once and leave it as it is.

    The layer is the part of the forward without data-dependent shapes. It is compiled once for each TTT step, because
    each has one diagonal term more.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except RuntimeError as error:  # what dynamo turns every failure of its backends into
        reason = str(error).splitlines()[0]
        log.warning("training.compile: no compiler works here, the draft stays eager (%s)", reason)
        return
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * ttt_length)
    draft.midlayer.compile(dynamic=True)
