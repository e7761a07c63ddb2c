"""The page in a real browser, over a simulated run that goes on, through the real server."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.page.conftest import INFERENCE_BOUND, Opener, served
from tests.page.reading import caught_up, check_figures, rows, tile
from tests.simulation.live_run import LiveRun, serve
from tests.simulation.pipeline import Setup, Simulation
from tests.simulation.simulated_run import SimulatedRun
from torchspec.cli.units import human_count, human_seconds
from torchspec.monitor.server import ensure_token
from torchspec.monitor.snapshot import read_latest
from torchspec.monitor.views import history_view

expect = pytest.importorskip("playwright.sync_api").expect
TABS = ("flow", "training", "workers", "ranks", "events", "samples")


def test_figures_on_the_page_are_those_of_the_run(live: LiveRun, url: str, open_page: Opener) -> None:
    page = open_page(url)
    page.click("#tab-workers")
    with live.still():
        latest = caught_up(page, live.path)
        check_figures(page, latest)
        assert latest.status.last_heldout is not None
        assert f"{latest.status.last_heldout.accept_length:.2f}" in tile(page, "Draft quality")
    left = latest.status.eta_seconds
    assert left and human_seconds(left) in tile(page, "Time left")


def test_charts_and_figures_move(live: LiveRun, url: str, open_page: Opener) -> None:
    page = open_page(url)
    page.get_by_role("button", name="5 min").click()
    throughput, step = page.locator("#panel-flow .plot").first, page.locator(".tile", has_text="Time left")
    expect(page.locator("#panel-flow canvas")).to_have_count(6)
    before = throughput.screenshot(), step.inner_text()
    deadline = time.monotonic() + 15
    while throughput.screenshot() == before[0] or step.inner_text() == before[1]:
        assert time.monotonic() < deadline
        page.wait_for_timeout(200)


def test_a_killed_worker_shows_within_five_seconds(live: LiveRun, url: str, open_page: Opener) -> None:
    page = open_page(url)
    page.click("#tab-workers")
    page.get_by_role("cell", name="working").nth(1).wait_for()
    assert "Healthy" in tile(page, "Health")
    killed = time.monotonic()
    live.kill_worker(0)
    page.get_by_role("row", name="worker-0").get_by_text("gone").wait_for(timeout=5000)
    page.get_by_text("1 worker lost").wait_for(timeout=5000)
    page.locator(".unit-gone").wait_for(state="attached", timeout=5000)
    assert time.monotonic() - killed < 5
    page.click("#tab-events")
    first = page.locator("#panel-events .event").first
    assert "worker-0 is gone" in first.inner_text() and "event-fault" in (first.get_attribute("class") or "")
    for label in ("Faults", "Scaling"):
        page.locator("label", has_text=label).click()
    assert (
        page.locator("#panel-events").get_by_text("worker-0 is gone").count() == 0
        and page.locator("#panel-events .event-checkpoint").count() > 2
    )


def test_a_run_is_shown_to_who_has_its_token(live: LiveRun, url: str, open_page: Opener) -> None:
    open_page.allowed = "401"
    page = open_page(url.partition("#")[0])
    page.get_by_text("A run is for who has its token").wait_for()
    assert page.get_by_role("button", name="Scale").count() == 0
    page.get_by_label("Token", exact=True).fill("another")
    page.get_by_role("button", name="Use").click()
    page.get_by_text("This page is for who has the run's token").wait_for()
    assert page.locator("#run-name").inner_text() == "…" and str(live.path) not in page.content()
    page.get_by_role("button", name="Control").click()
    page.get_by_label("Token", exact=True).fill(live.token)
    page.get_by_role("button", name="Use").click()
    expect(page.locator("#run-name")).to_have_text(live.path.name)
    expect(page.locator("#connection")).to_be_hidden()
    page.get_by_role("button", name="Control").click()
    page.get_by_role("spinbutton", name="Inference workers").fill("3")
    page.get_by_role("button", name="Scale").click()
    page.get_by_text("the inference pool becomes 3").wait_for()
    assert live.asked == ["scale 3"]


def test_the_pool_can_be_sized_automatically_again(live: LiveRun, url: str, open_page: Opener) -> None:
    live.scale_inference("auto")
    page = open_page(url)
    page.get_by_role("button", name="Control").click()
    auto = page.get_by_role("button", name="Auto")
    page.get_by_text("Sized automatically, 1 to 4").wait_for()
    page.get_by_role("spinbutton", name="Inference workers").fill("1")
    page.get_by_role("button", name="Scale").click()
    page.get_by_text("Fixed at 1;").wait_for()
    expect(auto).to_have_attribute("aria-pressed", "false")
    auto.click()
    page.get_by_text("Sized automatically, 1 to 4").wait_for()
    expect(auto).to_have_attribute("aria-pressed", "true")
    assert live.asked == ["scale auto", "scale 1", "scale auto"]
    page.keyboard.press("Escape")
    page.click("#tab-workers")
    ended = page.get_by_role("row", name="worker-1")
    ended.get_by_text("ended").wait_for()
    assert "–" in ended.inner_text() and page.locator(".badge-gone, .unit-gone").count() == 0
    assert page.locator(".unit-ended").count() == 1 and "no faults so far" in tile(page, "Health")


def test_the_address_brings_the_token_and_loses_it(live: LiveRun, url: str, open_page: Opener) -> None:
    page = open_page(url)
    assert live.token not in page.url and live.token not in page.content()
    page.get_by_role("button", name="Control").click()
    page.get_by_role("button", name="Stop").click()
    assert live.asked == [], "it asks first"
    page.get_by_role("button", name="Really stop?").click()
    expect(page.locator(".said")).to_have_text("the run stops after its current step and saves a checkpoint")
    assert live.asked == ["stop"]
    page.keyboard.press("Escape")
    assert not page.locator("dialog").is_visible()


def test_it_says_when_the_server_is_away_and_catches_up(live: LiveRun, browser: Any, open_page: Opener) -> None:
    open_page.allowed = "ERR_CONNECTION"
    server = serve(live.path, controls=live)
    page = open_page(f"{server.server.url}#token={live.token}")
    server.close()
    page.get_by_text("Connection lost, retrying").wait_for()
    live.event("note", "said while it was away")
    server = serve(live.path, controls=live, port=server.server.port)
    page.locator("#connection").wait_for(state="hidden")
    page.click("#tab-events")
    page.get_by_text("said while it was away").wait_for()
    server.close()


def test_it_says_when_the_run_has_ended(tmp_path: Path, open_page: Opener) -> None:
    open_page.allowed = "ERR_CONNECTION"
    run = SimulatedRun(tmp_path / "short", Simulation(Setup(workers=2, samples=400, warm_up=5.0), now=time.time() - 20))
    run.follow(20)
    live = LiveRun(run)
    server = serve(live.path)
    page = open_page(f"{server.server.url}#token={live.token}")
    live.close()
    assert "Done" not in tile(page, "Time left")
    run.follow(300)
    page.locator("#phase", has_text="finished").wait_for()
    server.close()
    page.get_by_text(f"The run has ended; torchspec ui {run.folder} shows it.").wait_for()
    assert "Done" in tile(page, "Time left") and page.get_by_text("retrying").count() == 0
    page.get_by_role("button", name="Control").click()
    page.get_by_text("This run is not running").wait_for()


def test_whatever_a_run_holds_is_text(tmp_path: Path, open_page: Opener, servers: ExitStack) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    evil = "<img src=x onerror=alert(1)>"
    (tmp_path / "target").mkdir()
    vocabulary = {f"{evil}{i}": i for i in range(49_001)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=f"{evil}0"))
    tokenizer.add_special_tokens([f"{evil}{i}" for i in range(4000)])
    tokenizer.save(str(tmp_path / "target" / "tokenizer.json"))
    run = SimulatedRun(tmp_path / "finished", Simulation(Setup(workers=2, samples=400, warm_up=5.0)))
    run.event("note", evil)
    run.follow(300)
    config = yaml.safe_load((run.folder / "config.yaml").read_text())
    config["target"]["path"] = str(tmp_path / "target")
    (run.folder / "config.yaml").write_text(yaml.safe_dump(config))
    address = served(servers, run.folder)
    token = ensure_token(run.folder)
    page = open_page(address)
    assert "Finished" in tile(page, "Health") and "Done" in tile(page, "Time left")
    page.click("#tab-events")
    page.get_by_text(evil).wait_for()
    page.click("#tab-samples")
    page.locator(".token").first.wait_for()
    header = f"{{headers: {{Authorization: 'Bearer {token}'}}}}"
    record = page.evaluate(f"fetch('/api/samples', {header}).then(r => r.json())")["samples"][0]
    detail = page.evaluate(f"fetch('/api/sample/{record['sample']}', {header}).then(r => r.json())")
    tokens = page.locator(".tokens .token")
    assert tokens.count() == record["tokens"] and page.locator(".tokens .counted").count() == sum(detail["mask"])
    marked = tokens.evaluate_all("spans => spans.map(span => Number(span.classList.contains('counted')))")
    assert marked == detail["mask"]
    assert page.locator(".prose .special").count() == sum(detail["special"]) > 0
    assert evil in page.locator(".prose").first.inner_text() and page.locator("main img").count() == 0
    moments = page.locator(".timeline li").count()
    assert moments == len(record["timeline"]) > 5


def test_a_run_without_data_says_so(tmp_path: Path, open_page: Opener, servers: ExitStack) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "config.yaml").write_text("run: {name: empty}\ntarget: {path: unused}\n")
    address = served(servers, folder)
    page = open_page(address)
    assert "No data yet" in tile(page, "Health")
    for tab in TABS:
        page.click(f"#tab-{tab}")
    assert page.locator(".nothing:visible", has_text="none yet").count() == 1, "of samples"


def test_two_runs_are_compared(tmp_path: Path, open_page: Opener, servers: ExitStack) -> None:
    folders = []
    for name, engine in (("fast", 0.2), ("slow", 0.8)):
        run = SimulatedRun(
            tmp_path / name, Simulation(Setup(workers=2, engine_seconds=engine, warm_up=5.0, pause_every=20))
        )
        run.follow(400, 2.0)
        folders.append(run.folder)
    page = open_page(served(servers, *folders, query="?run=1"))
    assert page.locator("#run-name").inner_text() == "slow"
    page.get_by_role("button", name="fast").click()
    expect(page.locator("#run-name")).to_have_text("fast")
    page.get_by_role("button", name="5 min").click()
    page.click("#tab-compare")
    assert not page.locator("#range").is_visible()
    expect(page.locator("#panel-compare canvas")).to_have_count(4)
    expect(page.get_by_role("row", name="Time").get_by_role("cell")).to_have_text(["6m38s"] * 2)
    table = {
        row.split("\t")[0]: row.split("\t")[1:]
        for row in page.locator("#panel-compare tbody").inner_text().splitlines()
    }
    histories = [history_view(folder) for folder in folders]
    assert table["Time"] == [human_seconds(h["time"][-1] - h["time"][0]) for h in histories]
    waiting = [h["rank_wait_share"][1:] for h in histories]  # rows lie equally far from each other
    assert table["Ranks waiting, mean"] == [f"{sum(shares) / len(shares):.0%}" for shares in waiting]
    latest = [read_latest(folder) for folder in folders]
    assert table["Step"] == [human_count(snapshot.point.step) for snapshot in latest if snapshot]
    assert table["Loss, train"] == [f"{s.status.last_step.loss:.3f}" for s in latest if s and s.status.last_step]


def test_many_workers_fit(tmp_path: Path, open_page: Opener, servers: ExitStack) -> None:
    run = SimulatedRun(
        tmp_path / "many", Simulation(Setup(workers=64, ranks=64, batch=256, store_samples=2000, window=4000))
    )
    run.follow(90, 3.0)
    address = served(servers, run.folder)
    page = open_page(address)
    assert page.locator(".station-inference .unit").count() == page.locator(".station-training .unit").count() == 64
    assert len(rows(page, "ranks")) == 64
    table = rows(page, "workers")
    assert [row[0] for row in table] == [f"worker-{i}" for i in range(64)]
    page.get_by_role("button", name="samples", exact=True).click()
    samples = [int(row[10].replace(",", "")) for row in rows(page, "workers")]
    assert samples == sorted(samples, reverse=True) and len(set(samples)) > 1


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (820, "light"), (1440, "dark")])
def test_nothing_sticks_out_and_all_text_can_be_read(width: int, scheme: str, url: str, open_page: Opener) -> None:
    page = open_page(url, width, 844, scheme)
    for tab in TABS:
        page.click(f"#tab-{tab}")
        page.wait_for_timeout(200)
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"{tab}: {wide} pixels too wide"
        assert page.evaluate(CLIPPED) == [], tab
        assert page.evaluate(FAINT) == [], tab
        assert page.evaluate(NAMELESS) == [], tab


def altered(page: Any, change: Callable[[Any], None]) -> None:
    """Has the page see its run's snapshots changed."""

    def answer(route: Any) -> None:
        response = route.fetch()
        update = response.json()
        change(update["snapshot"])
        route.fulfill(response=response, json=update)

    page.route("**/api/update*", answer)
    with page.expect_response("**/api/update*"):
        pass
    page.wait_for_timeout(300)


@pytest.mark.parametrize("width", [1040, 1280, 1440])
def test_large_figures_fit(width: int, url: str, open_page: Opener) -> None:
    def grown(snapshot: Any) -> None:
        snapshot["status"] |= {"inference_tokens_per_s": 98_765.4, "training_tokens_per_s": 987_654.3}
        snapshot["status"]["samples"] |= {"pending": 139_984, "committed": 765_432}
        snapshot["workers"] *= 128

    page = open_page(url, width)
    altered(page, grown)
    assert "140kpending" in page.locator(".station-prompts").text_content()
    assert "988ktokens/s" in page.locator(".station-training").text_content()
    assert "256 workers" in page.locator(".station-inference").text_content()
    assert page.evaluate(CLIPPED) == []


def test_ranks_that_share_samples_do_not_look_dead(url: str, open_page: Opener) -> None:
    def shared(snapshot: Any) -> None:
        snapshot["status"]["sp_size"] = 2
        snapshot["ranks"][1]["report"]["tokens"] = snapshot["ranks"][1]["tokens_per_s"] = 0

    page = open_page(url)
    altered(page, shared)
    first, second = rows(page, "ranks")
    assert float(first[2].replace(",", "")) > 0 and second[2] == "–"
    page.get_by_title("shares rank 0's samples").wait_for()
    assert page.locator("#panel-ranks td[title^=shares]").count() == 1


def test_curves_are_drawn_where_their_values_lie(url: str, open_page: Opener) -> None:
    page = open_page(url)
    steps = [*range(0, 1000, 20), *range(1000, 2000)]
    smoothed = page.evaluate("async xs => (await import('/smooth.js')).smooth(xs, xs)", steps)
    inside = [(x, y) for x, y in zip(steps, smoothed, strict=True) if x < 960 or 1040 < x < 1960]
    assert all(abs(x - y) <= 20 for x, y in inside[3:]), "a straight line is its own centred mean"
    line = page.evaluate(SPARKLINE, steps)
    places = [tuple(map(float, point.split(","))) for point in line.split(" ")]
    assert len(places) == 50
    assert all(abs(22 - 0.2 * x - y) < 0.5 for x, y in places), "a straight line, however many rows there are where"


SPARKLINE = """async xs => {
  const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
  (await import('/sparkline.js')).sparkline(svg, xs, xs);
  return svg.dataset.line;
}"""


CLIPPED = """() => [...document.querySelectorAll('.station')].flatMap(station => {
  const box = station.querySelector('.station-box').getBoundingClientRect();
  return [...station.querySelectorAll('text')].filter(text => text.closest('.station-tag') === null)
    .filter(text => text.getBoundingClientRect().right > box.right - 2).map(text => text.textContent);
})"""
"""Texts that leave their station of the pipeline."""

NAMELESS = """() => {
  const label = e => e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length || e.title;
  const wrong = [...document.querySelectorAll('button, input, [role=img], [role=region], progress')]
    .filter(e => e.checkVisibility() && !label(e));
  const ids = [...document.querySelectorAll('[id]')].map(e => e.id);
  const twice = ids.filter((id, i) => ids.indexOf(id) !== i);
  const dead = [...document.querySelectorAll('[aria-controls], [aria-labelledby]')]
    .filter(e => !document.getElementById(e.getAttribute('aria-controls') ?? e.getAttribute('aria-labelledby')));
  const tables = [...document.querySelectorAll('table')].filter(t => !t.caption || !t.querySelector('th[scope=col]'));
  const images = [...document.querySelectorAll('img')].filter(i => i.getAttribute('alt') === null);
  return [...wrong, ...dead, ...tables, ...images].map(e => e.outerHTML.slice(0, 120)).concat(twice);
}"""
"""What a screen reader could not name or find."""

FAINT = """() => {
  const number = text => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const linear = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => [r, g, b].map(v => linear(v / 255))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const mixed = (above, below, a) => [0, 1, 2].map(i => a * above[i] + (1 - a) * below[i]);
  const over = (above, below) => mixed(above, below, above[3] ?? 1);
  const ground = e => {
    const layers = [];
    for (; e; e = e.parentElement) layers.push(number(getComputedStyle(e).backgroundColor));
    return layers.reverse().filter(layer => layer.length).reduce((below, layer) => over(layer, below), [255, 255, 255]);
  };
  const faint = [];
  for (const e of document.querySelectorAll('body *:not(svg *)')) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) || !e.checkVisibility()) continue;
    const below = ground(e), text = over(number(getComputedStyle(e).color), below);
    const [a, b] = [light(text), light(below)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) faint.push(`${e.textContent.slice(0, 30)}: ${ratio.toFixed(2)}`);
  }
  return faint;
}"""
"""Text with less contrast than WCAG AA asks for (4.5)."""


def test_it_can_be_used_by_keyboard(url: str, open_page: Opener) -> None:
    page = open_page(url)
    focused = "document.activeElement.textContent.trim()"
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "Flow", "the tabs come next, as one stop"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    for expected in ("Training", "Workers"):
        page.keyboard.press("ArrowRight")
        assert page.evaluate(focused) == expected
    assert page.locator("#panel-workers").is_visible() and not page.locator("#panel-flow").is_visible()
    assert page.locator("[role=tab][aria-selected=true]").inner_text() == "Workers"
    page.click("#tab-flow")
    page.get_by_role("button", name="30 min").focus()
    page.keyboard.press("Enter")
    assert page.evaluate(focused) == "30 min"
    assert page.locator("#range [aria-pressed=true]").inner_text() == "30 min"
    page.click("#tab-workers")
    page.get_by_role("button", name="samples/s").focus()
    page.keyboard.press("Enter")
    head = page.get_by_role("columnheader", name="samples/s")
    assert head.get_attribute("aria-sort") == "descending"
    page.keyboard.press("Space")
    assert head.get_attribute("aria-sort") == "ascending"
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.get_by_role("button", name=re.compile("Dark")).focus()
    page.keyboard.press("Enter")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before


@pytest.mark.parametrize(
    ("setup", "headline", "marked"),
    [
        (INFERENCE_BOUND, "Inference", "Inference pool"),
        (Setup(workers=8, engine_seconds=0.36, step_seconds=0.75, warm_up=5.0), "Training", "Training ranks"),
        (Setup(workers=4, engine_seconds=0.36, step_seconds=0.75, warm_up=5.0, store_samples=10), "The store", "Store"),
    ],
    ids=["inference-bound", "training-bound", "store-bound"],
)
def test_a_newcomer_sees_which_side_is_slow(
    setup: Setup, headline: str, marked: str, tmp_path: Path, open_page: Opener, servers: ExitStack
) -> None:
    live = LiveRun.since(tmp_path / "staged", setup)
    page = open_page(served(servers, live.path))
    assert page.locator(".verdict-headline").inner_text().startswith(headline)
    limits = page.locator(".station.limit")
    assert limits.count() == 1 and marked in limits.text_content() and "bottleneck" in limits.text_content()
    live.close()
