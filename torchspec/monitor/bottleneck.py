"""Which side limits a run's throughput, by how much, and what to change: from a stretch of its history.

The two pools are coupled by a bounded buffer, so who limits is who is never held up by the other:

    ranks hardly wait            training limits; how much of the time workers are idle says by how much
    ranks wait, and ...
      they read all the time     the store limits: slow gets
      workers only put           the store limits: slow puts
      workers lack credits       the store limits: too small to keep both sides busy
      the reorder window is full a slow sample at the front holds everybody up
      workers are busy           inference limits

Evaluations and checkpoints are left out: nobody limits while the ranks pause.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

from torchspec.instruments import FEWEST_STEPS
from torchspec.monitor.series import read_series, tail_lines, time_of
from torchspec.monitor.snapshot import HistoryPoint, adapter
from torchspec.run_folder import RunFolder

State = Literal["starting", "counting-vocabulary", "warming-up", "measuring", "steady", "finishing", "ended"]
Side = Literal["inference", "training", "store", "balanced"]

SHORTEST, LONGEST = 20.0, 300.0
"""A verdict takes so many seconds of history, the more the rarer steps are: :data:`FEWEST_STEPS` of them."""
WAITING = 0.08
"""Ranks that wait less of the time than this do not wait."""
IDLE = 0.15
"""The same of workers; more, because they are held up for moments by every evaluation."""
SATURATED = 0.75
"""Reading, as a share of a rank's time, beyond which it is the reading that one waits for."""
HELD_UP = 0.2
"""Share of the time for which something must stand in the way to be what limits."""
ROUNDING = 0.25
"""Of a worker or a rank: what is too little to ask for another one."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a person is told."""

    state: State
    side: Side | None = None
    """None while there is nothing to say."""
    share: float | None = None
    """Of the time: ranks waiting, or where training limits, workers idle."""
    headline: str = ""
    text: str = ""
    """One sentence with the figures and what would balance the pools."""
    advice: tuple[str, ...] = ()
    confidence: Literal["high", "low"] | None = None
    """``low`` where the two halves of the stretch do not agree."""
    samples_per_s: float | None = None
    possible_samples_per_s: float | None = None
    """If the other side alone limited."""
    seconds: float = 0.0
    """Length of the stretch."""


def judge_run(run_dir: Path, live: bool) -> Verdict:
    """The verdict on a run from its folder: of its latest stretch, or of the whole run once it has ended."""
    path = RunFolder(run_dir).history
    if not live:
        return judge_ended(list(map(adapter(HistoryPoint).validate_python, read_series(path, max_points=2000))))
    last = tail_lines(path, float("inf"), before=True)
    since = time_of(last[-1]) - LONGEST if last else 0.0
    return judge(list(map(_point, tail_lines(path, since))))


_point = lru_cache(maxsize=1024)(adapter(HistoryPoint).validate_json)  # a page asks for the same lines again


def judge(points: Sequence[HistoryPoint]) -> Verdict:
    """The verdict on a run that goes on, from its newest history: :data:`LONGEST` seconds, or what there is."""
    if not points:
        return Verdict("starting", headline="starting", text="nothing has been measured yet")
    points = _since_restart(points)
    if (early := _too_early(points[-1])) is not None:
        return early
    stretch = _stretch(points)
    if stretch is None:
        return Verdict("measuring", headline="measuring", text="the pools have just begun, or changed their sizes")
    verdict = _judge_stretch(stretch[0], stretch[-1])
    middle = stretch[len(stretch) // 2]
    halves = {_judge_stretch(*half).side for half in ((stretch[0], middle), (middle, stretch[-1]))}
    return replace(verdict, confidence="high" if halves == {verdict.side} else "low")


def judge_ended(points: Sequence[HistoryPoint]) -> Verdict:
    """The verdict on the whole of a run, from its first step to its last."""
    latest = _since_restart(points)
    trained = [p for p in latest if p.ranks and p.trained_samples]
    if len(trained) < 2:
        return Verdict("ended", headline="ended", text="the run has ended; nothing was trained")
    verdict = _judge_stretch(trained[0], trained[-1])
    since = "over the whole run" if len(latest) == len(points) else "since its controller last started"
    return replace(verdict, state="ended", text=f"{since}, {verdict.text}", confidence="high")


def _too_early(now: HistoryPoint) -> Verdict | None:
    """What there is to say outside the steady state."""
    if now.phase in ("finished", "stopped"):
        return Verdict("ended", headline="ended", text="the run has ended")
    if now.phase == "stopping":
        return Verdict("finishing", headline="stopping", text="the run stops after its current step")
    if not now.captured_samples:
        return Verdict("starting", headline="engines are warming up", text="no sample has been captured yet")
    if now.phase == "counting-vocabulary":
        text = f"training starts once the vocabulary is counted; {now.captured_samples:,} samples are captured"
        return Verdict("counting-vocabulary", headline="counting the vocabulary", text=text)
    if not now.trained_samples:
        return Verdict("warming-up", headline="the trainer is warming up", text="the first step is yet to be made")
    if not now.samples.get("pending", 0):
        return Verdict("finishing", headline="finishing", text="no sample is left to lease; the last steps are made")
    return None


def _since_restart(points: Sequence[HistoryPoint]) -> Sequence[HistoryPoint]:
    """Points of the newest controller: its counters started at 0."""
    for i in range(len(points) - 1, 0, -1):
        if points[i].captured_samples < points[i - 1].captured_samples:
            return points[i:]
    return points


def _stretch(points: Sequence[HistoryPoint]) -> Sequence[HistoryPoint] | None:
    """The newest points that are enough for a verdict; None where there are too few."""
    last = points[-1]
    for i in range(len(points) - 2, -1, -1):
        first = points[i]
        if not first.trained_samples or (first.workers, first.ranks) != (last.workers, last.ranks) or not first.ranks:
            return None
        seconds = last.time - first.time
        if seconds >= SHORTEST and (last.step - first.step >= FEWEST_STEPS or seconds >= LONGEST / 2):
            return points[i:]
    return None


class _Shares:
    """What became of the time between two points of the history."""

    def __init__(self, a: HistoryPoint, b: HistoryPoint):
        def grown(name: str) -> float:
            return getattr(b, name) - getattr(a, name)

        self.seconds = seconds = max(b.time - a.time, 1e-9)
        self.samples_per_s = grown("trained_samples") / seconds
        self.workers, self.ranks = grown("worker_seconds") / seconds, grown("rank_seconds") / seconds
        training_seconds = max(grown("rank_seconds") - grown("rank_pause_seconds"), 1e-9)
        self.rank_wait = _clip(grown("rank_wait_seconds") / training_seconds)
        self.get = _clip(grown("get_seconds") / training_seconds)
        self.get_bandwidth = grown("get_bytes") / max(grown("get_seconds"), 1e-9)
        worker_seconds = max(grown("worker_seconds"), 1e-9)
        paused = grown("rank_pause_seconds") / max(grown("rank_seconds"), 1e-9)
        self.worker_idle = _clip(1 - grown("worker_busy_seconds") / worker_seconds - paused)
        """Without a lease, beyond what the ranks' pauses explain."""
        self.worker_only_puts = _clip((grown("worker_busy_seconds") - grown("worker_engine_seconds")) / worker_seconds)
        self.put_bandwidth = grown("put_bytes") / max(grown("put_seconds"), 1e-9)
        self.credits = _clip(grown("credit_blocked_seconds") / seconds)
        self.window = _clip(grown("window_blocked_seconds") / seconds)


def _judge_stretch(a: HistoryPoint, b: HistoryPoint) -> Verdict:
    shares = _Shares(a, b)
    if shares.rank_wait >= WAITING:
        verdict = _waiting(shares)
    else:
        verdict = _training(shares) if shares.worker_idle >= IDLE else _balanced(shares)
    return replace(verdict, samples_per_s=shares.samples_per_s, seconds=shares.seconds)


def _balanced(shares: _Shares) -> Verdict:
    text = f"trainers wait {shares.rank_wait:.0%} of the time and workers are idle {shares.worker_idle:.0%}"
    advice = ("to go faster, add inference workers and training ranks together",)
    return Verdict("steady", "balanced", shares.rank_wait, "both pools keep pace", text, advice)


def _training(shares: _Shares) -> Verdict:
    idle = shares.worker_idle
    enough = max(1, math.ceil(shares.workers * (1 - idle) - ROUNDING))
    spare = round(shares.workers) - enough
    more = math.ceil(shares.ranks * idle / max(1 - idle, 0.05) - ROUNDING)
    text = f"inference workers are idle {idle:.0%} of the time"
    if more > 0:
        text += f"; {plural(more, 'more training rank')} would balance"
    advice = [f"have {plural(more, 'more training rank')} or so: torchspec scale RUN --dp D"] if more > 0 else []
    if spare > 0:
        advice.append(f"or give up {plural(spare, 'inference worker')}: {enough} would do")
    advice.append("or make steps cheaper: training.compile, a smaller draft (the keys of section draft)")
    possible = shares.samples_per_s / max(1 - idle, 0.05)
    return Verdict(
        "steady", "training", idle, "training is the bottleneck", text, tuple(advice), possible_samples_per_s=possible
    )


def _waiting(shares: _Shares) -> Verdict:
    """A verdict for ranks that wait; without the wait they would be that much faster."""
    side, headline, why, advice = _what_holds_up(shares)
    text = f"trainers wait {shares.rank_wait:.0%} of the time; {why}"
    possible = shares.samples_per_s / max(1 - shares.rank_wait, 0.05)
    return Verdict("steady", side, shares.rank_wait, headline, text, advice, possible_samples_per_s=possible)


def _what_holds_up(shares: _Shares) -> tuple[Side, str, str, tuple[str, ...]]:
    """What ranks wait for: its side, headline, figures, and advice."""
    if shares.get >= SATURATED:
        return (
            "store",
            "reading from the store is the bottleneck",
            f"they read {shares.get:.0%} of the time, at {_bandwidth(shares.get_bandwidth)}",
            ("store.protocol=rdma where the network has it", "or let more ranks read: training.dp_size"),
        )
    if shares.worker_only_puts >= HELD_UP:
        return (
            "store",
            "putting into the store is the bottleneck",
            f"workers do nothing but put {shares.worker_only_puts:.0%} of the time, "
            f"at {_bandwidth(shares.put_bandwidth)}",
            (
                "store.protocol=rdma where the network has it",
                "or keep more samples under way: inference.buffer_bytes, inference.max_concurrency",
            ),
        )
    if shares.credits >= HELD_UP:
        return (
            "store",
            "the store is too small",
            f"workers are refused leases {shares.credits:.0%} of the time because it has no credits left",
            (
                "raise store.segment_bytes",
                "or have fewer samples in the making: inference.workers, inference.max_concurrency, answer.max_tokens",
            ),
        )
    if shares.window >= HELD_UP and shares.worker_idle >= HELD_UP:
        return (
            "inference",
            "a slow sample at the front holds up the others",
            f"workers are refused leases {shares.window:.0%} of the time because the reorder window is full",
            ("raise controller.reorder_window", "or bound what one sample takes: answer.max_tokens"),
        )
    needed = shares.workers * (1 - shares.worker_idle) / max(1 - shares.rank_wait, 0.05)
    more = max(1, math.ceil(needed - shares.workers - ROUNDING))
    return (
        "inference",
        "inference is the bottleneck",
        f"{plural(more, 'more inference worker')} would balance",
        (
            f"raise inference.workers by {more}: torchspec scale RUN --inference {round(shares.workers) + more}",
            "or let each do more: inference.max_concurrency, a lower answer.max_tokens, answer.reuse",
        ),
    )


def plural(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _bandwidth(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s" if bytes_per_s >= 1e8 else f"{bytes_per_s / 1e6:.1f} MB/s"


def _clip(share: float) -> float:
    return min(1.0, max(0.0, share))
