"""Draws a run's ``metrics.jsonl`` as one PNG: loss, accept length, accuracy per position, throughput."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchspec.files import read_lines
from torchspec.monitor.views import Record, undo
from torchspec.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAIN, HELDOUT, WAIT, GREY = "#4c78a8", "#e4572e", "#b0b7c3", "#666666"
MAX_POINTS = 1500
"""A figure this wide shows no more; longer runs are drawn as means of equal stretches."""
SMOOTHING = 0.04
"""Width of the running mean, as a share of the drawn points."""


def draw_curves(run_dir: Path) -> Path:
    """Draw ``run_dir/metrics.jsonl`` as ``run_dir/curves.png``; returns its path.

    Raises:
        ValueError: nothing has been measured yet.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train, heldout = undo(list(read_lines(RunFolder(run_dir).steps)))
    if not train and not heldout:
        raise ValueError(f"{run_dir} has no metrics yet: no step was trained")
    figure = Figure(figsize=(13, 8.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(run_dir.resolve().name, fontsize=14, fontweight="bold", x=0.01, ha="left")
    axes = figure.subplots(2, 2)
    _draw_both(axes[0, 0], "Loss", "loss", train, heldout)
    _draw_both(axes[0, 1], "Simulated accept length (tokens a round)", "accept_length", train, heldout)
    _draw_accuracy(axes[1, 0], train, heldout)
    _draw_throughput(axes[1, 1], train)
    for ax in axes.flat:
        _style(ax)
    path = RunFolder(run_dir).curves
    figure.savefig(path)
    return path


def _draw_both(ax: Axes, title: str, name: str, train: list[Record], heldout: list[Record]) -> None:
    ax.set_title(title, loc="left", fontsize=11)
    if train:
        _draw_line(ax, _column(train, "step"), _column(train, name), TRAIN, "train")
    if heldout:
        _draw_points(ax, _column(heldout, "step"), _column(heldout, name), HELDOUT, "held-out")


def _draw_accuracy(ax: Axes, train: list[Record], heldout: list[Record]) -> None:
    """One line a drafted position, from dark (the first token) to light; held-out as points in the same colour."""
    from matplotlib import colormaps

    ax.set_title("Accuracy per position (lines: train, points: held-out)", loc="left", fontsize=11)
    length = len((train or heldout)[0]["full_accuracy"])
    for t in range(length):
        color = colormaps["viridis"](0.9 * t / max(1, length - 1))
        if train:
            values = _column(train, "full_accuracy", t)
            _draw_line(ax, _column(train, "step"), values, color, f"{t + 1}", faint=False)
        if heldout:
            _draw_points(ax, _column(heldout, "step"), _column(heldout, "full_accuracy", t), color, None)
    ax.set_ylim(bottom=0)


def _draw_throughput(ax: Axes, train: list[Record]) -> None:
    ax.set_title("Training: tokens/s, and the share of time spent waiting", loc="left", fontsize=11)
    if not train:
        return
    steps, tokens, wait = (_column(train, name) for name in ("step", "tokens", "wait_seconds"))
    seconds = wait + sum(_column(train, f"{part}_seconds") for part in ("compute", "optimizer"))
    seconds = np.maximum(seconds, 1e-9)
    _draw_line(ax, steps, tokens / seconds, TRAIN, "tokens/s")
    ax.set_ylim(bottom=0)
    share = ax.twinx()
    x, y = _thin(steps, 100 * wait / seconds)
    share.fill_between(x, _smooth(y), color=WAIT, alpha=0.35, linewidth=0)
    ax.plot([], [], color=WAIT, linewidth=6, alpha=0.5, label="waiting for samples (right)")
    share.set_ylim(0, 100)
    share.yaxis.set_major_formatter("{x:.0f}%")
    share.spines[["top", "right", "left"]].set_visible(False)
    share.tick_params(colors=GREY, length=0)


def _draw_line(ax: Axes, x: np.ndarray, y: np.ndarray, color: Any, label: str, faint: bool = True) -> None:
    """The running mean, over the values themselves if ``faint``; a single value as a point."""
    x, y = _thin(x, y)
    if len(x) == 1:
        ax.plot(x, y, "s", color=color, label=label, markersize=5)
        return
    if faint:
        ax.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
    ax.plot(x, _smooth(y), color=color, linewidth=1.8, label=label)


def _draw_points(ax: Axes, x: np.ndarray, y: np.ndarray, color: Any, label: str | None) -> None:
    line = "-" if label else ""
    ax.plot(x, y, f"o{line}", color=color, markersize=4, linewidth=1, label=label, markeredgecolor="white", zorder=3)


def _style(ax: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_xlabel("step", color=GREY)
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    ax.grid(True, color="#e8e8ec", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(colors=GREY, length=0)
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        columns = 1 if len(labels) < 4 else (len(labels) + 1) // 2
        ax.legend(handles, labels, frameon=False, fontsize=9, ncols=columns)


def _column(records: list[Record], name: str, index: int | None = None) -> np.ndarray:
    return np.array([r[name] if index is None else r[name][index] for r in records], dtype=float)


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MAX_POINTS points: means of equal stretches."""
    if len(x) <= MAX_POINTS:
        return x, y
    starts = np.arange(MAX_POINTS) * len(x) // MAX_POINTS
    sizes = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / sizes, np.add.reduceat(y, starts) / sizes


def _smooth(y: np.ndarray) -> np.ndarray:
    """Centred running mean; near the ends over what there is."""
    window = np.ones(2 * round(SMOOTHING * len(y) / 2) + 1)
    return np.convolve(y, window, "same") / np.convolve(np.ones(len(y)), window, "same")
