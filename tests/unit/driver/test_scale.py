"""What ``torchspec scale`` may ask for, checked against a run's saved config before anybody is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchspec.config.load import load_config, parse_config, save_config, with_values
from torchspec.driver.scale import Change, checked_change, sizes_so_far


@pytest.fixture
def run_dir(tmp_path: Path, target_path: Path) -> Path:
    """Of a run with the real target, which has nine heads, one training rank and batches of four."""
    tree = {
        "target": {"path": str(target_path), "dtype": "float32"},
        "data": {"max_seq_length": 64},
        "inference": {"buffer_bytes": 4 << 20},
        "training": {"batch_size": 4, "dtype": "float32"},
    }
    save_config(parse_config(tree), tmp_path / "config.yaml")
    return tmp_path


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ((2, None, None, None), (2, "flash", 1, 1)),
        ((None, 2, None, None), (1, "usp", 1, 2)),
        ((None, 3, None, None), (1, "usp", 3, 1)),
        ((None, 6, None, None), (1, "usp", 3, 2)),
        ((2, 6, 1, None), (2, "usp", 1, 6)),
        ((1, 3, None, 3), (1, "usp", 1, 3)),
        ((4, 1, None, None), (4, "flash", 1, 1)),
        ((None, None, None, 2), (1, "usp", 1, 2)),
    ],
    ids=str,
)
def test_what_is_not_said_is_filled_in(run_dir: Path, asked: tuple, expected: tuple) -> None:
    change = checked_change(run_dir, None, *asked)
    assert change.workers is None and tuple(change.sizes.values()) == expected


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((5, None, None, None), r"training\.batch_size \(4\) is smaller than training\.dp_size \(5\)"),
        ((1, 4, 3, None), "--sp 4 is not --sp-ulysses 3 times --sp-ring 1"),
        ((1, 4, 2, None), "heads"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(run_dir: Path, asked: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked_change(run_dir, None, *asked)


def test_workers_are_a_number_or_auto(run_dir: Path) -> None:
    assert checked_change(run_dir, "3") == Change(3, None)
    assert checked_change(run_dir, "auto") == Change("auto", None)
    for nonsense in ("0", "-1", "many", "1.5"):
        with pytest.raises(ValueError, match="positive number or auto"):
            checked_change(run_dir, nonsense)


def test_what_was_scaled_is_kept_by_whoever_starts_from_the_first_config(run_dir: Path) -> None:
    first = run_dir / "config.yaml"
    sizes = {f"training.{name}": size for name, size in checked_change(run_dir, dp=2, sp=3).sizes.items()}
    scaled = with_values(load_config(first), {"inference.workers": 3, **sizes})
    later = run_dir / "later"
    later.mkdir()
    save_config(scaled, later / "config.yaml")
    assert load_config(first, sizes_so_far(later)) == scaled
    assert load_config(first, [*sizes_so_far(later), "inference.workers=5"]).inference.workers == 5
