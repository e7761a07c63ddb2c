"""Makes the pictures of the page and of ``torchspec top`` in this folder, from a simulated run.

    python docs/make_screenshots.py        # a few minutes; needs Chromium (make test installs it) and the dev extra

Two hours of a run of six workers and four ranks are simulated, one worker dies on the way; the last half minute goes on
in real time. Pictures look best where the fonts Inter and Fira Code are installed (fonts-inter, fonts-firacode).
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from playwright.sync_api import Browser, sync_playwright
from tokenizers import Tokenizer

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

from tests.simulation.live_run import LiveRun, serve  # noqa: E402
from tests.simulation.pipeline import Setup, Simulation  # noqa: E402
from tests.simulation.simulated_run import SimulatedRun  # noqa: E402
from torchspec.cli.top_app import TopApp  # noqa: E402
from torchspec.data.builtin_target import CACHE, MODEL, build  # noqa: E402

SETUP = Setup(
    workers=6, ranks=4, engine_seconds=0.36, step_seconds=0.75, batch=16, store_samples=128, window=512, samples=260_000
)
PAST, BEFORE_THE_FAULT = 7200.0, 0.62
TALK = (
    (
        "Why does the moon always show us the same side?",
        "The Moon turns once around its own axis in exactly the time it needs to go once around the Earth, about 27.3 "
        "days. This is no accident: the Earth's gravity raises a slight bulge in the Moon's rock, and the pull on that "
        "bulge slowed the Moon's rotation until it matched its orbit. Astronomers call this tidal locking. Because the "
        "orbit is not a perfect circle, the Moon seems to rock a little, and over a month we see about 59% of its "
        "surface.",
    ),
    (
        "Write a Python function that returns the longest word of a sentence.",
        "def longest_word(sentence: str) -> str:\n    words = sentence.split()\n    return max(words, key=len, "
        'default="")\n\nIt splits the sentence at white space and lets max compare the words by their length. Where '
        "two words are equally long, the first of them is returned; an empty sentence gives an empty string.",
    ),
    (
        "Explain the idea of a balanced diet in plain language.",
        "A balanced diet gives your body a bit of everything it needs, and not too much of anything. Fill half of your "
        "plate with vegetables and fruit, a quarter with whole grains and a quarter with beans, fish, eggs or meat. "
        "Drink water, and keep sweets and fried food for now and then.",
    ),
)


class Talk(SimulatedRun):
    """A run whose samples are texts that a person can read."""

    def __init__(self, folder: Path, simulation: Simulation, target: Path):
        super().__init__(folder, simulation)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config["target"]["path"] = str(target)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
        self._talk = [
            (
                tokenizer.encode(f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n").ids,
                tokenizer.encode(f"{answer}<|im_end|>").ids,
            )
            for prompt, answer in TALK
        ]

    def _tokens(self, chance: random.Random) -> tuple[list[int], list[int]]:
        return chance.choice(self._talk)


def simulate(folder: Path) -> Talk:
    """A run that is two hours old and has lost a worker on the way."""
    cache = CACHE.expanduser()
    build(cache / MODEL, cache / "wheels")
    run = Talk(folder, Simulation(SETUP, now=time.time() - PAST), cache / MODEL)
    run.follow(BEFORE_THE_FAULT * PAST, 2.0)
    run.kill_worker(2)
    run.follow(90)
    run.scale(SETUP.workers)
    run.follow(time.time() - run.simulation.now)
    return run


def photograph(browser: Browser, url: str, name: str, width: int, height: int, scheme: Any, tab: str = "flow") -> None:
    context = browser.new_context(
        viewport={"width": width, "height": height},
        device_scale_factor=1.5,
        color_scheme=scheme,
        reduced_motion="reduce",
    )
    page = context.new_page()
    page.goto(url)
    page.locator("#panel-flow canvas").first.wait_for()
    page.click(f"#tab-{tab}")
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    page.wait_for_timeout(2500)
    page.screenshot(path=DOCS / name)
    context.close()


async def draw_top(folder: Path) -> str:
    """``torchspec top`` as SVG, without the fonts that it would load from elsewhere."""
    app = TopApp(folder)
    async with app.run_test(size=(110, 32)) as pilot:
        await pilot.pause(3)
        picture = app.export_screenshot(title="torchspec top")
    return re.sub(r",\s*url\([^)]*\)\s*format\([^)]*\)", "", picture)


def photograph_top(browser: Browser, picture: str) -> None:
    page = browser.new_page(viewport={"width": 1360, "height": 900}, device_scale_factor=1.5)
    page.set_content(picture)
    page.locator("svg").screenshot(path=DOCS / "top.png", omit_background=True)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with tempfile.TemporaryDirectory() as temporary:
        live = LiveRun(simulate(Path(temporary) / "smollm2-eagle3"))
        server = serve(live.path)
        time.sleep(30)
        top = asyncio.run(draw_top(live.path))
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            url = f"{server.server.url}#token={live.token}"
            photograph(browser, url, "page.png", 1440, 1180, "light")
            photograph(browser, url, "page-dark.png", 1440, 1180, "dark", "training")
            photograph(browser, url, "page-sample.png", 1440, 1180, "light", "samples")
            photograph(browser, url, "page-phone.png", 390, 844, "light")
            photograph_top(browser, top)
            browser.close()
        server.close()
        live.close()


if __name__ == "__main__":
    main()
