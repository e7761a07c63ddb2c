"""Which side limits: the verdict on simulated pipelines whose right answer is known."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.simulation.pipeline import Setup, Simulation
from tests.simulation.simulated_run import SCENARIOS, SimulatedRun
from torchspec.monitor.bottleneck import judge, judge_ended, judge_run
from torchspec.monitor.snapshot import HistoryPoint

BALANCED = SCENARIOS["balanced"]
STAGED = {
    "one of four workers": (replace(BALANCED, workers=1), "inference"),
    "two of four workers": (replace(BALANCED, workers=2), "inference"),
    "as many workers as are needed": (BALANCED, "balanced"),
    "twice as many workers": (replace(BALANCED, workers=8), "training"),
    "a slow trainer": (replace(BALANCED, step_seconds=3.0), "training"),
    "a small store": (SCENARIOS["store-bound"], "store"),
    "slow puts": (SCENARIOS["slow-put"], "store"),
    "slow gets": (SCENARIOS["slow-get"], "store"),
    "a narrow window": (replace(BALANCED, window=12), "inference"),
    "16 of 32 workers, 64 ranks": (
        replace(BALANCED, workers=16, ranks=64, batch=64, store_samples=640, window=2000),
        "inference",
    ),
}


def history(simulation: Simulation, seconds: float) -> list[HistoryPoint]:
    return [snapshot.point for snapshot in simulation.snapshots(seconds)]


@pytest.mark.parametrize("name", sorted(STAGED))
@pytest.mark.parametrize("seed", [0, 1])
def test_the_side_that_limits_is_named(name: str, seed: int) -> None:
    setup, side = STAGED[name]
    verdict = judge(history(Simulation(replace(setup, seed=seed)), 200))
    assert (verdict.state, verdict.side) == ("steady", side), verdict


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_advised_number_of_workers_balances(workers: int) -> None:
    """Taking the advice makes the trainers stop waiting, and one worker fewer would not have."""
    verdict = judge(history(Simulation(replace(BALANCED, workers=workers)), 200))
    more = int(re.search(r"(\d+) more inference worker", verdict.text)[1])  # type: ignore[index]
    assert verdict.share == pytest.approx(1 - workers / 3.84, abs=0.06), "10.7 samples/s are taken, 2.8 come of each"
    assert verdict.possible_samples_per_s == pytest.approx(8 / 0.75, rel=0.1)
    advised = judge(history(Simulation(replace(BALANCED, workers=workers + more)), 200))
    assert advised.side == "balanced", advised
    one_fewer = judge(history(Simulation(replace(BALANCED, workers=workers + more - 1)), 200))
    assert one_fewer.side == "inference", one_fewer


def test_surplus_workers_are_counted() -> None:
    verdict = judge(history(Simulation(replace(BALANCED, workers=8, pause_every=10**6)), 200))
    assert verdict.share == pytest.approx(1 - 3.84 / 8, abs=0.06)
    assert "give up 4 inference workers: 4 would do" in " ".join(verdict.advice)


def test_the_advice_names_the_knob() -> None:
    knobs = {
        "store-bound": "store.segment_bytes",
        "slow-put": "store.protocol",
        "slow-get": "store.protocol",
        "inference-bound": "inference.workers",
        "training-bound": "--dp",
    }
    for scenario, knob in knobs.items():
        verdict = judge(history(Simulation(SCENARIOS[scenario]), 200))
        assert knob in verdict.advice[0], (scenario, verdict)


def test_a_sharp_change_is_followed_within_a_minute() -> None:
    simulation = Simulation(replace(BALANCED, workers=8, warm_up=10.0))
    points = history(simulation, 150)
    assert judge(points).side == "training"
    for _ in range(7):
        simulation.kill(0)
    points += history(simulation, 12)
    assert judge(points).state == "measuring", "the pool is another one"
    points += history(simulation, 45)
    verdict = judge(points[-300:])
    assert (verdict.side, verdict.confidence) == ("inference", "high")
    simulation.setup = replace(simulation.setup, engine_seconds=0.02)
    points += history(simulation, 60)
    assert judge(points[-300:]).side == "training"


def test_nothing_is_said_too_early_or_at_the_end() -> None:
    assert judge([]).state == "starting"
    simulation = Simulation(replace(BALANCED, samples=800))
    points = history(simulation, 20)
    assert (judge(points).state, judge(points).side) == ("starting", None), "engines are warming up"
    counting = [replace(p, phase="counting-vocabulary", captured_samples=5) for p in points]
    assert judge(counting).state == "counting-vocabulary"
    points += history(simulation, 20)
    assert judge(points).state in ("warming-up", "measuring")
    points += history(simulation, 1000)
    assert judge(points).state == "ended"
    ending = next(p for p in points if p.trained_samples and not p.samples["pending"])
    assert judge(points[: points.index(ending) + 1]).state == "finishing"
    assert judge([*points[:100], replace(points[100], phase="stopping")]).state == "finishing"
    whole = judge_ended(points)
    assert whole.state == "ended" and whole.side == "balanced" and "over the whole run" in whole.text


def test_a_restarted_controller_does_not_confuse() -> None:
    before = history(Simulation(replace(BALANCED, workers=8)), 120)
    after = Simulation(replace(BALANCED, workers=2), now=before[-1].time)
    points = before + history(after, 20)
    assert judge(points).state == "starting"
    assert judge(points + history(after, 120)).side == "inference"


def test_a_runs_folder_is_judged_live_and_when_it_has_ended(tmp_path: Path) -> None:
    setup: Setup = replace(SCENARIOS["store-bound"], samples=600)
    run = SimulatedRun(tmp_path / "run", Simulation(setup))
    run.follow(120)
    live = judge_run(tmp_path / "run", live=True)
    assert (live.state, live.side) == ("steady", "store")
    run.follow(1000)
    ended = judge_run(tmp_path / "run", live=False)
    assert (ended.state, ended.side) == ("ended", "store")
    assert judge_run(tmp_path / "absent", live=True).state == "starting"
