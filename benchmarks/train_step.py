"""Time and memory of one EAGLE3 training step (forward and backward): ours against a plain implementation.

    python benchmarks/train_step.py [--dtype float32|bfloat16] [--repeats 3] [--ttt-lengths 3 7]

The plain one is what a straightforward program does: padded tensors, an explicit attention mask, the target's full
logits, the draft's full logits for every TTT step, gradients by autograd. Both have the same weights and batch; their
losses and gradients are compared. Each measurement runs in a process of its own, with one thread. Times are CPU seconds
(wall-clock seconds of a machine with nothing else to do), the best of the repeats; memory is what the first step adds
to the resident set at its peak. Prints a table and writes benchmarks/results/train_step.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from torchspec.drafts.draft import Batch
from torchspec.drafts.eagle3.model import Eagle3Draft
from torchspec.drafts.eagle3.spec import Eagle3Spec
from torchspec.nn.losses import compute_dtype
from torchspec.nn.rope import rotary_table
from torchspec.target.head import TargetHead
from torchspec.target.shape import TargetShape

RESULTS = Path(__file__).parent / "results" / "train_step.json"
SMOLLM2 = TargetShape(
    hidden_size=576,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    intermediate_size=1536,
    rms_norm_eps=1e-5,
    vocab_size=49152,
    max_position_embeddings=8192,
    rope_parameters={"rope_type": "default", "rope_theta": 1e5},
)
DRAFT_VOCAB = 8192
BATCHES = {"4x180": (150, 180, 200, 190), "1x2048": (2048,)}
PROMPT = 40
"""Tokens of each sample that are not learnt."""


@dataclass(frozen=True)
class Measurement:
    implementation: str
    batch: str
    ttt_length: int
    dtype: str
    seconds: float
    peak_mib: float
    tokens_per_second: float
    tflop_per_second: float
    """Of the multiplications that the step cannot do without, whoever does more."""


def make_step(batch_name: str, ttt_length: int, dtype: torch.dtype) -> tuple[Eagle3Draft, TargetHead, Batch]:
    torch.manual_seed(0)
    config, lengths = SMOLLM2, BATCHES[batch_name]
    draft = Eagle3Draft(Eagle3Spec(config, (1, 14, 26), DRAFT_VOCAB, ttt_length))
    head_VH = torch.randn(config.vocab_size, config.hidden_size).mul_(0.1).to(dtype)
    embedding_VH, norm_H = torch.randn_like(head_VH), torch.ones(config.hidden_size, dtype=dtype)
    in_draft, rest = head_VH.split([DRAFT_VOCAB, config.vocab_size - DRAFT_VOCAB])
    target = TargetHead(embedding_VH, in_draft, rest, norm_H, config.rms_norm_eps)
    shape = len(lengths), max(lengths)
    positions_S, lengths_B = torch.arange(shape[1]), torch.tensor(lengths)
    batch = Batch(
        hs_BSA=torch.randn(*shape, 3 * config.hidden_size).bfloat16(),
        lhs_BSH=torch.randn(*shape, config.hidden_size).bfloat16(),
        ids_BS=torch.randint(config.vocab_size, shape, dtype=torch.int32),
        loss_mask_BS=(positions_S >= PROMPT) & (positions_S < lengths_B.unsqueeze(1)),
        lengths_B=lengths_B,
        seeds_B=lengths_B,
    )
    return draft, target, batch


def plain_loss(draft: Eagle3Draft, target: TargetHead, batch: Batch, step_weights: Sequence[float]) -> Tensor:
    """The same total as ``Eagle3Draft.forward``, written without any of its ideas."""
    config, layer = SMOLLM2, draft.midlayer
    dtype = compute_dtype(draft.fc.weight)
    size, length = batch.ids_BS.shape
    head_VH = torch.cat((target.draft_head_DH, target.rest_head_XH))
    logits_BSV = F.linear(batch.lhs_BSH.to(head_VH.dtype), head_VH)
    counted_BS = (logits_BSV.argmax(-1) < DRAFT_VOCAB) & batch.loss_mask_BS
    p_BSD = logits_BSV[..., :DRAFT_VOCAB].float().softmax(-1)
    cos_PE, sin_PE = rotary_table(config, torch.arange(length + len(step_weights)), dtype)

    def heads(x: Tensor, count: int, t: int, rotated: bool = True) -> Tensor:
        x = x.view(size, length, count, config.head_dim).transpose(1, 2)
        if rotated:
            first, second = x.chunk(2, dim=-1)
            x = x * cos_PE[t : t + length] + torch.cat((-second, first), -1) * sin_PE[t : t + length]
        return x.repeat_interleave(config.num_heads // count, 1)

    def shifted(x: Tensor, by: int) -> Tensor:
        return F.pad(x[:, by:], [0, 0] * (x.dim() - 2) + [0, by])

    mask_SX = torch.ones(length, length).tril().bool()
    hidden, total = draft.fc(batch.hs_BSA.to(dtype)), torch.zeros(())
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for t, weight in enumerate(step_weights):
        embedded = target.embed(shifted(batch.ids_BS, 1 + t)).to(dtype)
        x = torch.cat((layer.input_layernorm(embedded), layer.hidden_norm(hidden)), dim=-1)
        attention = layer.self_attn
        keys.append(heads(attention.k_proj(x), config.num_kv_heads, t))
        values.append(heads(attention.v_proj(x), config.num_kv_heads, t, rotated=False))
        if t > 0:
            mask_SX = torch.cat((mask_SX, torch.eye(length).bool()), dim=1)
        scores = heads(attention.q_proj(x), config.num_heads, t) @ torch.cat(keys, 2).transpose(2, 3)
        p = (scores.float() / math.sqrt(config.head_dim)).masked_fill(~mask_SX, -math.inf).softmax(-1)
        attended = (p.to(dtype) @ torch.cat(values, 2)).transpose(1, 2).flatten(2)
        hidden = hidden + attention.o_proj(attended)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        log_q_BSD = draft.lm_head(draft.norm(hidden)).float().log_softmax(-1)
        loss_BS = -(shifted(p_BSD, 1 + t) * log_q_BSD).sum(-1)
        total = total + weight * (loss_BS * shifted(counted_BS, 1 + t)).sum()
    return total


def necessary_flop(batch: Batch, ttt_length: int) -> float:
    """Multiply-adds, times two, of the projections and heads; a backward costs twice its forward."""
    config = SMOLLM2
    lengths = batch.lengths_B.tolist()
    context, teachers = sum(lengths), int(batch.loss_mask_BS.sum())
    width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = config.hidden_size * (2 * width + 4 * kv_width + width + 3 * config.intermediate_size)
    fc, heads = 3 * config.hidden_size**2, config.hidden_size * DRAFT_VOCAB
    teacher = config.hidden_size * config.vocab_size
    return 2.0 * (3 * ttt_length * teachers * (layer + heads) + teachers * teacher + 2 * context * fc)


def resident_mib(field: str) -> float:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process, from Linux."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def measure(implementation: str, batch_name: str, ttt_length: int, dtype_name: str, repeats: int) -> dict:
    """Run one configuration; meant for a fresh process."""
    torch.set_num_threads(1)
    dtype = getattr(torch, dtype_name)
    draft, target, batch = make_step(batch_name, ttt_length, dtype)

    def step() -> float:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            if implementation == "plain":
                total = plain_loss(draft, target, batch, draft.spec.position_weights)
            else:
                total = draft(batch, target).total
        total.backward()
        return total.item()

    before = resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    loss = step()
    peak = resident_mib("VmHWM") - before
    gradient = torch.cat([parameter.grad.flatten() for parameter in draft.parameters()]).norm().item()
    seconds = []
    for _ in range(repeats):
        draft.zero_grad()
        started = time.process_time()
        step()
        seconds.append(time.process_time() - started)
    best, tokens = min(seconds), int(batch.lengths_B.sum())
    speed = necessary_flop(batch, ttt_length) / best / 1e12
    measurement = Measurement(implementation, batch_name, ttt_length, dtype_name, best, peak, tokens / best, speed)
    return {**asdict(measurement), "loss": loss, "gradient_norm": gradient}


def matmul_peak(dtype_name: str) -> float:
    """TFLOP/s of a 2048-cube matmul on one thread: what the machine can do at all."""
    torch.set_num_threads(1)
    a, b = (torch.randn(2048, 2048).to(getattr(torch, dtype_name)) for _ in range(2))
    times = []
    for _ in range(5):
        started = time.process_time()
        a @ b.t()
        times.append(time.process_time() - started)
    return 2 * 2048**3 / min(times) / 1e12


def in_fresh_process(function: str, *arguments: object) -> Any:
    """The JSON that ``function(*arguments)`` of this file gives in a process of its own."""
    command = [sys.executable, __file__, "--call", json.dumps([function, *arguments])]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def show(results: list[dict], peak: float, dtype_name: str) -> None:
    table = Table(title=f"EAGLE3 step, SmolLM2-135M shape, {dtype_name}, one thread, matmul peak {peak:.2f} TFLOP/s")
    for name in ("batch", "T", "code", "CPU s", "tokens/s", "of peak", "MiB", "faster", "memory"):
        table.add_column(name, justify="left" if name in ("batch", "code") else "right", no_wrap=True)
    for plain, ours in zip(results[::2], results[1::2], strict=True):
        for row in (plain, ours):
            gain = (f"{plain['seconds'] / ours['seconds']:.2f}x", f"{ours['peak_mib'] / plain['peak_mib']:.2f}x")
            table.add_row(
                row["batch"],
                str(row["ttt_length"]),
                row["implementation"],
                f"{row['seconds']:.3f}",
                f"{row['tokens_per_second']:.0f}",
                f"{row['tflop_per_second'] / peak:.0%}",
                f"{row['peak_mib']:.0f}",
                *(gain if row is ours else ("", "")),
            )
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ttt-lengths", type=int, nargs="+", default=[3, 7])
    parser.add_argument("--call", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.call:
        function, *arguments = options.call
        print(json.dumps({"measure": measure, "matmul_peak": matmul_peak}[function](*arguments)))
        return
    peak = in_fresh_process("matmul_peak", options.dtype)
    tolerance = 1e-4 if options.dtype == "float32" else 0.05
    results = []
    for batch_name, ttt_length in itertools.product(BATCHES, options.ttt_lengths):
        plain, ours = (
            in_fresh_process("measure", name, batch_name, ttt_length, options.dtype, options.repeats)
            for name in ("plain", "torchspec")
        )
        for key in ("loss", "gradient_norm"):
            assert math.isclose(plain[key], ours[key], rel_tol=tolerance), f"{key} differs: {plain} {ours}"
        results += [plain, ours]
    show(results, peak, options.dtype)
    RESULTS.parent.mkdir(exist_ok=True)
    machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
    report = {"machine": machine, "matmul_peak_tflops": peak, "results": results}
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
