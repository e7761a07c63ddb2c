"""SGLang plugin that makes a CPU engine fast enough to train with, and lets it verify EAGLE3 and DFlash drafts.

Idle on any other device. It replaces the attention backend (``attention.py``), adds the multi-step backend that
SGLang's EAGLE3 worker asks for, opens the way for its DFlash worker, and makes seeded sampling affordable.

Shapes: B requests of a batch, V vocabulary.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.models.dflash import DFlashAttention
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.speculative.dflash_worker_v2 import DFlashWorkerV2
    from sglang.srt.speculative.draft_utils import DraftBackendFactory

    from torchspec.inference.cpu.attention import BatchedAttention, DraftChain

_DEFAULT_SEED = 42
"""SGLang's, for requests that name none."""


def register() -> None:
    """Entry point of the group ``sglang.srt.plugins``."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE") != "1":
        return
    from sglang.srt.arg_groups.choices import add_draft_attention_backend_choices
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from torchspec.inference.cpu.attention import BatchedAttention

    add_draft_attention_backend_choices(["torch_native"])
    for target, hook, kind in (
        ("layers.attention.torch_native_backend.TorchNativeAttnBackend", BatchedAttention, HookType.REPLACE),
        ("speculative.draft_utils.DraftBackendFactory._create_backend", _create_backend, HookType.AROUND),
        ("arg_groups.speculative_hook._handle_dflash", _allow_dflash, HookType.AROUND),
        ("speculative.dflash_worker_v2.DFlashWorkerV2.forward_batch_generation", _spare_stream, HookType.BEFORE),
        ("models.dflash.DFlashAttention.__init__", _use_no_table, HookType.AFTER),
        ("model_executor.model_runner.ModelRunner._extend_forward_kwargs", _keep_dtype, HookType.AFTER),
        ("sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch", _add_seeds, HookType.AFTER),
        ("layers.sampler.multinomial_with_seed", sample_with_seeds, HookType.REPLACE),
    ):
        HookRegistry.register(f"sglang.srt.{target}", hook, kind)


def _create_backend(
    original: Callable[..., Any],
    factory: DraftBackendFactory,
    name: str,
    backends: dict[str, Callable[[], tuple[str, Any]]],
    error: str,
    stamps_children: bool = False,
) -> Any:
    """Offer ``torch_native`` among the draft worker's backends; ``stamps_children`` asks for the multi-step one."""

    def torch_native() -> tuple[str, DraftChain | BatchedAttention]:
        from torchspec.inference.cpu.attention import BatchedAttention, DraftChain

        runner = factory.draft_model_runner
        if not stamps_children:
            return "torch_native", BatchedAttention(runner)
        if factory.topk != 1:
            raise ValueError(f"speculative_eagle_topk={factory.topk}: a CPU engine drafts chains only (1)")
        return "torch_native", DraftChain(runner, factory.speculative_num_steps)

    return original(factory, name, backends | {"torch_native": torch_native}, error, stamps_children)


def _allow_dflash(original: Callable[[ServerArgs], None], server_args: ServerArgs) -> None:
    """Check the arguments of DFLASH as on a platform that can run it; SGLang's own list of those leaves the CPU out."""
    from sglang.srt.arg_groups import speculative_hook

    platform = SimpleNamespace(
        is_out_of_tree=lambda: True,
        supports_speculative_algorithm=lambda algorithm: True,
        supports_speculative_draft_attention_backend=lambda algorithm, backend: backend == "torch_native",
        get_default_speculative_draft_attention_backend=lambda algorithm: "torch_native",
    )
    real, speculative_hook.current_platform = speculative_hook.current_platform, platform
    try:
        original(server_args)
    finally:
        speculative_hook.current_platform = real


def _spare_stream(_worker: DFlashWorkerV2, batch: ScheduleBatch, *_args: object, **_kwargs: object) -> None:
    """SGLang's DFlash worker notes down which stream reads this tensor; a CPU has no streams, and torch refuses."""
    batch.seq_lens.record_stream = lambda stream: None


def _use_no_table(_none: None, attention: DFlashAttention, *_args: object, **_kwargs: object) -> None:
    """Norm and rotate queries and keys in plain torch; SGLang has a CUDA kernel for bfloat16, and asks no device."""
    attention.use_table_qk_norm_rope = False


def _keep_dtype(
    arguments: dict[str, Any], runner: ModelRunner, batch: ForwardBatch, _proxies: object
) -> dict[str, Any]:
    """Hand a DFlash draft the target's embeddings as they are; SGLang rounds them to bfloat16 first."""
    if runner.is_draft_worker and batch.input_embeds is not None:
        arguments["input_embeds"] = batch.input_embeds
    return arguments


def _add_seeds(info: SamplingBatchInfo, _cls: type, batch: ScheduleBatch, _vocab_size: int) -> None:
    """Seed each request's sampling; SGLang does so in its "deterministic" mode only, which a CPU cannot afford."""
    seeds = [req.sampling_params.sampling_seed for req in batch.reqs]
    info.sampling_seed = torch.tensor([_DEFAULT_SEED if seed is None else seed for seed in seeds])


def sample_with_seeds(logprobs_BV: Tensor, seeds_B: Tensor, positions_B: Tensor) -> Tensor:
    """Draw one token a row [B, 1] by inverting its distribution at a number that (seed, position) determines.

    SGLang's own function hashes each of the V entries for a Gumbel noise, which takes longer than the forward pass.
    """
    uniform_B = [_uniform(*row) for row in zip(seeds_B.tolist(), positions_B.tolist(), strict=True)]
    cdf_BV = logprobs_BV.exp().cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(
        cdf_BV, cdf_BV[:, -1:] * torch.tensor(uniform_B, dtype=torch.float64)[:, None], right=True
    )


def _uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits."""
    digest = hashlib.blake2b(struct.pack("<qq", seed, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
