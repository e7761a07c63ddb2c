"""A browser, and pages that are watched: they ask this machine alone and complain of nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.simulation.live_run import LiveRun, serve
from tests.simulation.pipeline import Setup
from torchspec.monitor.server import ensure_token

INFERENCE_BOUND = Setup(workers=2, engine_seconds=0.36, step_seconds=0.75, warm_up=5.0, pause_every=50)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Not for longer: while it is there, this thread has an event loop that runs."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        # In a container there is neither a sandbox for root nor a large /dev/shm.
        arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        try:
            browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        except sync_api.Error as error:  # as Ubuntu's, which only stands for a snap
            pytest.skip(f"{chromium} does not start: {error.message.splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LiveRun]:
    run = LiveRun.since(tmp_path / "live", INFERENCE_BOUND)
    yield run
    run.close()


@pytest.fixture
def servers() -> Iterator[ExitStack]:
    """Closes servers of pages after the pages, which would complain that they are away."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def url(live: LiveRun, servers: ExitStack) -> str:
    return served(servers, live.path, controls=live)


def served(servers: ExitStack, *folders: Path, controls: LiveRun | None = None, query: str = "") -> str:
    """The address of a page of these runs, with the token of the first."""
    server = serve(*folders, controls=controls)
    servers.callback(server.close)
    return f"{server.server.url}{query}#token={ensure_token(folders[0])}"


@dataclass
class Opener:
    """Opens pages and keeps what they ask for and complain of."""

    browser: Any
    requested: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    allowed: str = "nothing"
    """What complaints may hold."""
    contexts: list[Any] = field(default_factory=list)

    def __call__(self, url: str, width: int = 1440, height: int = 900, scheme: str = "light") -> Any:
        context = self.browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, reduced_motion="reduce"
        )
        self.contexts.append(context)
        context.on("request", lambda request: self.requested.append(request.url))
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on(
            "console", lambda message: message.type in ("error", "warning") and self.complaints.append(message.text)
        )
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.goto(url)
        if "#token=" in url:
            page.locator("#run-name", has_not_text="…").wait_for()
        return page


@pytest.fixture
def open_page(browser: Any, servers: ExitStack) -> Iterator[Opener]:
    opener = Opener(browser)
    yield opener
    for context in opener.contexts:
        context.close()
    assert opener.requested and all(url.startswith(("http://127.0.0.1:", "data:")) for url in opener.requested)
    assert [text for text in opener.complaints if opener.allowed not in text] == []
