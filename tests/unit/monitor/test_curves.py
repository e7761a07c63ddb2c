"""The PNG of a run is drawn, whatever its ``metrics.jsonl`` holds."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from torchspec.monitor.curves import MAX_POINTS, _smooth, _thin, draw_curves

BLUE, ORANGE = (0x4C, 0x78, 0xA8), (0xE4, 0x57, 0x2E)


def record(step: int, loss: float = 3.0, split: str = "train") -> dict[str, object]:
    seconds = {f"{part}_seconds": 0.5 for part in ("wait", "fetch", "compute", "optimizer")}
    quality = {"loss": loss, "accept_length": 1.4, "full_accuracy": [0.5, 0.2]}
    return {"time": 0.0, "split": split, "step": step, "tokens": 100, **quality, **seconds}


def write(run_dir: Path, records: list[dict[str, object]]) -> None:
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def pixels(path: Path, color: tuple[int, int, int]) -> int:
    """How many pixels of the drawing have this colour."""
    image = (matplotlib.image.imread(path)[..., :3] * 255).round()
    return int((image == np.array(color)).all(axis=-1).sum())


@pytest.mark.parametrize("steps", [1, 2, 40, 5000])
def test_curves_of_any_length_are_drawn(tmp_path: Path, steps: int) -> None:
    train = [record(s, 9.0 / s) for s in range(1, steps + 1)]
    heldout = [record(s, 9.0 / s, "heldout") for s in range(1, steps + 1, max(1, steps // 9))]
    write(tmp_path, train)
    path = draw_curves(tmp_path)
    assert path == tmp_path / "curves.png"
    assert pixels(path, BLUE) > 50 and pixels(path, ORANGE) == 0
    write(tmp_path, sorted(train + heldout, key=lambda r: (int(str(r["step"])), str(r["split"]) == "heldout")))
    assert pixels(draw_curves(tmp_path), ORANGE) > 5


def test_a_run_with_held_out_figures_only(tmp_path: Path) -> None:
    write(tmp_path, [record(1, 3.0, "heldout"), record(5, 2.0, "heldout")])
    assert pixels(draw_curves(tmp_path), ORANGE) > 5


def test_nothing_measured_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no metrics yet"):
        draw_curves(tmp_path)


def test_thinning_and_smoothing_keep_the_mean_and_the_trend() -> None:
    x = np.arange(100_000.0)
    thin_x, thin_y = _thin(x, 2 * x)
    assert len(thin_x) == MAX_POINTS and np.all(np.diff(thin_x) > 0)
    assert thin_y.mean() == pytest.approx(2 * x.mean(), rel=1e-3) and np.allclose(thin_y, 2 * thin_x)
    smooth = _smooth(thin_y)
    assert np.allclose(smooth[100:-100], thin_y[100:-100], atol=1) and np.all(np.diff(smooth) > 0)
    noisy = np.tile([0.0, 1.0], 500)
    assert np.allclose(_smooth(noisy)[50:-50], 0.5, atol=0.05)
    assert np.array_equal(_smooth(np.array([3.0])), [3.0])
