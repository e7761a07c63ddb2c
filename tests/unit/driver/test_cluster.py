"""What is said of a Ray that does not start."""

from __future__ import annotations

import pytest

from torchspec.config.load import parse_config
from torchspec.driver.cluster import start_cluster
from torchspec.driver.plan import Plan, ThreadPlan
from torchspec.driver.supervise import RunFailed


def test_where_memory_runs_short_it_is_not_the_controller_that_ray_ends(monkeypatch, tmp_path):
    asked = {}

    def started(**options):
        asked.update(options)
        raise ConnectionError

    monkeypatch.setattr("ray.init", started)
    config, threads = parse_config({"target": {"path": "unused"}}), ThreadPlan(1, 1)
    with (
        pytest.raises(RunFailed),
        start_cluster(config, Plan({}, (), threads, 2, 0, 0, 0, 0, 0, "", 0, 0, ()), tmp_path),
    ):
        pass
    assert asked["_system_config"] == {"memory_monitor_refresh_ms": 0}


def test_a_ray_that_does_not_start_is_said_in_one_line(monkeypatch, tmp_path):
    def slow(**_options):
        raise Exception("The current node timed out\nduring startup.")

    monkeypatch.setattr("ray.init", slow)
    config, threads = parse_config({"target": {"path": "unused"}}), ThreadPlan(1, 1)
    plan = Plan({}, (), threads, 2, 0, 0, 0, 0, 0, "", 0, 0, ())
    expected = pytest.raises(RunFailed, match=r"Ray did not start .* cores\): .* timed out during startup\.$")
    with expected, start_cluster(config, plan, tmp_path):
        pass
