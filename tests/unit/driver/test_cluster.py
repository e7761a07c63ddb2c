"""What is said of a Ray that does not start, and who can read the token of one that does."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchspec.config.load import parse_config
from torchspec.driver.cluster import ensure_token, start_cluster
from torchspec.driver.plan import Plan, ThreadPlan
from torchspec.driver.supervise import RunFailed


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Without a token."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def modes(home: Path) -> list[int]:
    return [path.stat().st_mode & 0o777 for path in (home / ".ray", home / ".ray" / "auth_token")]


def test_the_token_is_its_owners_before_ray_could_make_it(home):
    ensure_token()
    assert modes(home) == [0o700, 0o600]


def test_a_token_that_ray_has_made_is_closed(home):
    (home / ".ray").mkdir(mode=0o755)
    (home / ".ray" / "auth_token").write_text("made by ray")
    ensure_token()
    assert modes(home) == [0o700, 0o600] and (home / ".ray" / "auth_token").read_text() == "made by ray"


@pytest.mark.parametrize("name", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"])
def test_a_token_that_the_environment_names_is_left_alone(home, monkeypatch, name):
    monkeypatch.setenv(name, "secret")
    ensure_token()
    assert not (home / ".ray").exists()


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
