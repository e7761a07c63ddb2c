"""Engines for tests: one in this process on an event loop of its own, or a whole script in a process of its own.

Run as a script, this file starts an engine and does what its arguments say; it is how tests kill things.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import psutil

from torchspec.config.schema import Config
from torchspec.inference.engine import Answered, EngineDied, TargetEngine
from torchspec.inference.sglang_process import EngineError, EngineSpec
from torchspec.store.endpoint import StoreEndpoint
from torchspec.target.shape import early_middle_late

CHUNK = 128
AUX_LAYERS = early_middle_late(30)
HANG_SECONDS = 3.0


class LiveEngine:
    """A :class:`TargetEngine` and the loop that its coroutines run on."""

    def __init__(self, endpoint: StoreEndpoint, model_path: Path, dtype: str = "float32", **inference: Any):
        sizes = {"chunked_prefill_size": CHUNK, "max_total_tokens": 8192, "buffer_bytes": 16 << 20}
        sections = {
            "target": {"path": str(model_path), "dtype": dtype},
            "inference": sizes | inference,
            "recovery": {"hang_seconds": HANG_SECONDS},
        }
        self.engine = TargetEngine(EngineSpec(Config.model_validate(sections), endpoint, AUX_LAYERS))
        self.runner = asyncio.Runner()
        self._keys = map("answer{}".format, count())

    def run(self, coroutine: Any) -> Any:
        return self.runner.run(coroutine)

    def greedy(self, prompts: Sequence[list[int]], tokens: int) -> list[list[int]]:
        """Greedy answers to all prompts at once."""

        async def all_at_once() -> list[Answered]:
            return await asyncio.gather(*(self.answer(prompt, tokens) for prompt in prompts))

        return [answered.token_ids for answered in self.run(all_at_once())]

    def answer(
        self, prompt: list[int], tokens: int, temperature: float = 0.0, seed: int = 0, key: str | None = None
    ) -> Coroutine[Any, Any, Answered]:
        sampling = {"max_new_tokens": tokens, "temperature": temperature, "sampling_seed": seed}
        return self.engine.answer(key or next(self._keys), prompt, sampling)

    def close(self) -> None:
        self.engine.stop()
        self.runner.close()


@contextmanager
def live_engine(endpoint: StoreEndpoint, model_path: Path, **options: Any) -> Iterator[LiveEngine]:
    engine = LiveEngine(endpoint, model_path, **options)
    try:
        yield engine
    finally:
        engine.close()


ENDS = {"scheduler-dies": signal.SIGKILL, "scheduler-hangs": signal.SIGSTOP}


class EngineProcess:
    """This file, run with ``task`` in a process of its own, which prints one JSON object a line."""

    def __init__(self, task: str, endpoint: StoreEndpoint, model_path: Path, **environment: str):
        self.process = subprocess.Popen(
            [sys.executable, __file__, task, endpoint.to_json(), str(model_path)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )

    def read(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise AssertionError(f"the engine process ended with {self.process.wait()}")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


def main() -> None:
    task, endpoint, model_path = sys.argv[1], StoreEndpoint.from_json(sys.argv[2]), Path(sys.argv[3])
    try:
        engine = LiveEngine(endpoint, model_path)
    except EngineError as error:
        children = [
            child for child in psutil.Process().children() if "resource_tracker" not in "".join(child.cmdline())
        ]
        say(error=str(error), children=[child.pid for child in children])
        return
    pids = engine.engine._engine.get_all_child_pids()
    say(pids=pids, answer=engine.greedy([[1, 4093, 198]], 4))
    if task == "wait":  # to be killed
        signal.pause()
    if task in ENDS:
        asyncio_error = engine.run(_kill_and_capture(engine, pids[0], ENDS[task]))
        say(error=asyncio_error)
    engine.close()
    sglang = engine.engine._engine  # what it has not sent must not hold up the end of the process
    sockets = (sglang.send_to_rpc, sglang.tokenizer_manager.send_to_scheduler)
    say(stopped=all(socket.closed for socket in sockets))


async def _kill_and_capture(live: LiveEngine, scheduler: int, how: signal.Signals) -> str:
    """Two captures, of which the buffer holds one at a time, and an answer: all must end with the scheduler."""
    pending = [asyncio.create_task(live.engine.capture(f"never{i}", [1] * 1500)) for i in range(2)]
    pending += [asyncio.create_task(live.answer([1, 2, 3], 1500))]
    await asyncio.sleep(0.5)
    os.kill(scheduler, how)
    started = time.monotonic()
    results = await asyncio.gather(*pending, return_exceptions=True)
    assert time.monotonic() - started < 30
    assert all(isinstance(result, EngineDied) for result in results), results
    try:
        await live.answer([1, 2, 3], 4)
    except EngineDied as error:
        return str(error)
    return "an engine without a scheduler answered"


if __name__ == "__main__":
    main()
