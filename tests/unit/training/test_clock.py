"""Where a rank's time goes, what it counts as work, and that a step's parts add up."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.oracles.eagle3_cases import Case, build, run_product
from torchspec.hardware import PEAK_FLOPS, peak_flops
from torchspec.training.clock import RankClock, StepProfiler

CPU = torch.device("cpu")


def test_the_parts_add_up_to_the_time() -> None:
    clock = RankClock(3, CPU, 1e12)
    with clock.doing("waiting"):
        time.sleep(0.05)
        assert clock.report().doing == "waiting" and clock.report().wait_seconds >= 0.05, "while it goes on"
    with clock.span("gradients"):
        for _ in range(2):
            with clock.span("forward"):
                time.sleep(0.02)
        time.sleep(0.02)
    forward, gradients = clock.device_seconds("forward"), clock.device_seconds("gradients")
    assert 0.04 <= forward < gradients and gradients >= 0.06
    assert clock.device_seconds("forward") == 0, "taken once"
    clock.step_made(7, forward_seconds=forward, backward_seconds=gradients - forward, tokens=5)
    with clock.doing("paused"):
        time.sleep(0.01)
    report = clock.report()
    parts = report.wait_seconds + report.forward_seconds + report.backward_seconds + report.pause_seconds
    assert parts == pytest.approx(report.seconds, abs=0.03)
    assert (report.rank, report.step, report.steps, report.tokens, report.peak_flops) == (3, 7, 1, 5, 1e12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_device_times_come_without_a_synchronisation() -> None:
    device = torch.device("cuda")
    clock = RankClock(0, device, None)
    a = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    started = time.perf_counter()
    with clock.span("forward"):
        for _ in range(50):
            a = a @ a
    launched = time.perf_counter() - started
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert clock.device_seconds("forward") > 2 * launched


def test_the_formula_counts_what_the_draft_computes() -> None:
    """Against torch's own count of matrix products, which leaves attention on a CPU and ``addmm_`` out."""
    case = Case(lengths=(300,), padding=0, hidden=64, vocab=500, draft_vocab=300, chunk=64, dtype=torch.float32)
    step = build(case)
    step.batch.loss_mask_BS.fill_(True)
    with FlopCounterMode(display=False) as counter:
        run_product(step)
    spec, target, scored, steps = step.draft.spec, step.draft.spec.target, 300, case.ttt_length
    attention = 3 * steps * 2 * target.num_heads * target.head_dim * scored * (300 - scored / 2)
    head_gradient = steps * scored * target.hidden_size * spec.draft_vocab_size
    total = spec.flops(300, 300)
    assert counter.get_total_flops() == pytest.approx(total - 2 * (attention + head_gradient), rel=0.03)
    assert spec.flops(300, 100) < 0.5 * total


def test_peaks_are_known_for_gpus_and_not_made_up_for_cpus() -> None:
    assert peak_flops(CPU, "bfloat16") is None
    assert PEAK_FLOPS["H100"] == 989e12
    names = list(PEAK_FLOPS)
    assert all(
        names.index(long) < names.index(short) for long in names for short in names if short != long and short in long
    )


def test_a_profile_covers_its_steps_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "profile" / "rank-0.json.gz"
    profiler = StepProfiler((2, 3), path, CPU)
    for step in range(1, 6):
        profiler.before(step)
        torch.randn(8, 8) @ torch.randn(8, 8)
        assert (profiler._profile is not None) == (step in (2, 3))
        profiler.after(step)
        assert path.exists() == (step >= 3)
    profiler.close()
    off = StepProfiler(None, tmp_path / "no", CPU)
    off.before(1)
    off.close()
    assert not (tmp_path / "no").exists()


def test_what_another_thread_reads_never_falls() -> None:
    clock, ended = RankClock(0, CPU, None), threading.Event()
    seen: list[tuple[float, float]] = []

    def read() -> None:
        while not ended.is_set():
            report = clock.report()
            seen.append((report.wait_seconds, report.pause_seconds))

    switch, reader = sys.getswitchinterval(), threading.Thread(target=read)
    sys.setswitchinterval(1e-5)
    reader.start()
    for what in ("waiting", "paused") * 1000:
        with clock.doing(what):
            time.sleep(1e-5)
    ended.set()
    reader.join()
    sys.setswitchinterval(switch)
    assert len(seen) > 100 and all(column == tuple(sorted(column)) for column in zip(*seen, strict=True))
