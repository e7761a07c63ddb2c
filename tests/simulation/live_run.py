"""A simulated run that goes on in real time beside a test, with its page served as a real run's is."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from tests.simulation.pipeline import Setup, Simulation
from tests.simulation.simulated_run import SimulatedRun
from torchspec.config.load import load_config, save_config, with_values
from torchspec.monitor.server import PageServer, ServerThread, ensure_token
from torchspec.run_folder import this_process

TICK_SECONDS = 0.5


class LiveRun:
    """Lets ``run`` go on; it also is what its page controls."""

    def __init__(self, run: SimulatedRun):
        self.folder, self.path = run, run.folder
        self.token = ensure_token(run.folder)
        self.asked: list[str] = []
        """Controls, in their order."""
        (run.folder / "handle.json").write_text(json.dumps(this_process()))
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._go_on)
        self._thread.start()

    @classmethod
    def since(cls, folder: Path, setup: Setup, past: float = 300.0) -> LiveRun:
        """One that began ``past`` seconds ago."""
        run = SimulatedRun(folder, Simulation(setup, now=time.time() - past))
        run.follow(past)
        return cls(run)

    def _go_on(self) -> None:
        while not self._over.wait(TICK_SECONDS):
            with self._lock:
                self.folder.follow(time.time() - self.folder.simulation.now)

    def kill_worker(self, number: int) -> None:
        with self._lock:
            self.folder.kill_worker(number)

    def event(self, kind, message: str) -> None:
        with self._lock:
            self.folder.event(kind, message)

    @contextmanager
    def still(self) -> Iterator[None]:
        """Nothing moves meanwhile."""
        with self._lock:
            yield

    def scale_inference(self, workers: int | Literal["auto"]) -> None:
        self.asked.append(f"scale {workers}")
        config = self.path / "config.yaml"
        save_config(with_values(load_config(config), {"inference.workers": workers}), config)
        if workers != "auto":
            with self._lock:
                self.folder.scale(workers)

    def stop(self, reason: str) -> None:
        self.asked.append("stop")

    def close(self) -> None:
        self._over.set()
        self._thread.join()


def serve(*folders: Path, controls: LiveRun | None = None, port: int | None = None) -> ServerThread:
    """The page of these runs; the caller closes it."""
    return ServerThread(PageServer(folders, lambda _: controls, port))
