"""The files for operators: alerts that fire when they should, a dashboard of metrics that exist, a real scrape."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from tests.simulation.pipeline import Simulation
from tests.simulation.simulated_run import SCENARIOS, SimulatedRun
from torchspec.monitor.metrics import METRICS, prometheus_name
from torchspec.monitor.server import PageServer, ServerThread
from torchspec.network import free_port

CONFIGS = Path(__file__).parents[3] / "configs" / "monitoring"
FIXTURE = Path(__file__).parents[2] / "fixtures" / "alerts_test.yml"
PANEL_COLUMNS = 24
needs_prometheus = pytest.mark.skipif(
    shutil.which("promtool") is None or shutil.which("prometheus") is None,
    reason="Debian's package prometheus is not installed: apt-get install prometheus",
)
MASTERS = {"master_allocated_bytes", "master_total_capacity_bytes"}
"""Mooncake's own, which ``store/master.py`` reads, too."""


def known_names() -> set[str]:
    names = {"torchspec_live", "torchspec_snapshot_time_seconds"} | MASTERS
    for metric in METRICS:
        name = prometheus_name(metric)
        names |= {f"{name}_{part}" for part in ("bucket", "sum", "count")} if metric.kind == "histogram" else {name}
    return names


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:torchspec|master)_[a-z0-9_]+", expression))


def dashboard() -> dict:
    return json.loads((CONFIGS / "grafana.json").read_text())


def test_the_dashboard_shows_metrics_that_exist() -> None:
    panels = [panel for panel in dashboard()["panels"] if panel["type"] != "row"]
    shown: set[str] = set()
    for panel in panels:
        for target in panel["targets"]:
            names = names_in(target["expr"])
            assert names and names <= known_names(), f"{panel['title']}: {names - known_names()}"
            shown |= names
            counters = {name for name in names if name.endswith(("_total", "_bucket"))}
            assert all(f"rate({n}" in target["expr"] or f"increase({n}" in target["expr"] for n in counters)
    assert len(shown) > 40
    assert names_in(dashboard()["templating"]["list"][1]["query"]["query"]) <= known_names()


def left_out(given: Any, read: Any, path: str = "") -> list[str]:
    """Paths in ``given`` that are not the same in ``read``."""
    if isinstance(given, dict) and isinstance(read, dict):
        return [lost for name in given for lost in left_out(given[name], read.get(name), f"{path}.{name}")]
    if isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        return [lost for i in range(len(given)) for lost in left_out(given[i], read[i], f"{path}[{i}]")]
    return [] if given == read else [path]


def test_the_dashboard_is_one_that_grafana_knows() -> None:
    """Grafana's own SDK reads it field by field, and leaves out what is no part of a dashboard."""
    register_default_plugins()

    def through_the_sdk(board: dict) -> dict:
        return json.loads(JSONEncoder().encode(Dashboard.from_json(board)))

    assert left_out(dashboard(), through_the_sdk(dashboard())) == []
    wrong = dashboard()
    wrong["panels"][1]["fieldConfig"]["defaults"]["units"] = "s"
    assert left_out(wrong, through_the_sdk(wrong)) == [".panels[1].fieldConfig.defaults.units"]


def test_the_dashboards_panels_have_their_places() -> None:
    board = dashboard()
    assert board["uid"] and board["title"] and board["schemaVersion"] >= 36
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= PANEL_COLUMNS
        columns = range(place["x"], place["x"] + place["w"])
        cells = {(x, y) for x in columns for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken, f"{panel['title']} lies on another panel"
        taken |= cells
    variables = {variable["name"] for variable in board["templating"]["list"]}
    assert variables == {"datasource", "run"}
    used = set(re.findall(r"\$\{?([a-z]+)\}?", json.dumps(board["panels"]))) - {"__rate_interval"}
    assert used <= variables | {"__rate"}


def test_the_alerts_watch_metrics_that_exist() -> None:
    (group,) = yaml.safe_load((CONFIGS / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]:
        assert names_in(rule["expr"]) <= known_names(), rule["alert"]
        assert rule["annotations"]["summary"] and rule["annotations"]["action"]


def test_every_alert_is_tried() -> None:
    (group,) = yaml.safe_load((CONFIGS / "alerts.yml").read_text())["groups"]
    tried = [t for test in yaml.safe_load(FIXTURE.read_text())["tests"] for t in test["alert_rule_test"]]
    fired = {t["alertname"] for t in tried if t.get("exp_alerts")}
    assert fired == {rule["alert"] for rule in group["rules"]}


@needs_prometheus
def test_the_alerts_fire_when_they_should(tmp_path: Path) -> None:
    shutil.copy(CONFIGS / "alerts.yml", tmp_path)
    shutil.copy(FIXTURE, tmp_path)
    result = subprocess.run(
        ["promtool", "test", "rules", FIXTURE.name], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture
def scraped(tmp_path: Path) -> Iterator[tuple[SimulatedRun, int]]:
    """A run, its server, and a real Prometheus that scrapes it with our configuration."""
    run = SimulatedRun(tmp_path / "run", Simulation(SCENARIOS["balanced"]))
    run.follow(60)
    page = ServerThread(PageServer([run.folder], lambda _: None, 0))  # type: ignore[arg-type, return-value]
    config = (CONFIGS / "prometheus.yml").read_text().replace(":8790", f":{page.server.port}")
    (tmp_path / "prometheus.yml").write_text(config.replace("scrape_interval: 5s", "scrape_interval: 1s"))
    shutil.copy(CONFIGS / "alerts.yml", tmp_path)
    port = free_port()
    process = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={tmp_path / 'prometheus.yml'}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stderr=subprocess.DEVNULL,
    )
    yield run, port
    process.terminate()
    process.wait(30)
    page.close()


def query(port: int, expression: str) -> list[dict]:
    url = f"http://127.0.0.1:{port}/api/v1/query?query={urllib.request.quote(expression)}"
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)["data"]["result"]


@needs_prometheus
def test_a_real_prometheus_scrapes_a_run(scraped: tuple[SimulatedRun, int]) -> None:
    run, port = scraped
    deadline, found, up = time.monotonic() + 120, [], {}
    while not (found and len(up) == 2) and time.monotonic() < deadline:
        time.sleep(0.5)
        try:
            found = query(port, 'torchspec_step{run="run"}')
            up = {r["metric"]["job"]: r["value"][1] for r in query(port, "up")}
        except OSError:
            continue
    assert float(found[0]["value"][1]) == run.simulation.ranks.step > 0
    samples = {r["metric"]["state"]: float(r["value"][1]) for r in query(port, "torchspec_samples")}
    assert samples == {k: float(v) for k, v in run.simulation.status().samples.items()}
    assert len(query(port, "torchspec_worker_put_latency_seconds_bucket")) == 15 * 4
    assert up["torchspec"] == "1" and up["torchspec-store"] == "0", "this run has no store to scrape"
