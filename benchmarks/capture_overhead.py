"""What capturing hidden states adds to a prefill.

Two engines take turns on the same prompts: *plain*, an SGLang engine that knows of no hidden states, and *capture*,
a TargetEngine, which computes them (SGLang's own option), copies them and puts them into a store. A round's overhead is
the ratio of the two, and the table shows the median of the rounds, once of the time until all samples of a batch are
in the store and once of the CPU seconds that the engine's processes used.

    python benchmarks/capture_overhead.py [--rounds N] [--model FOLDER]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from torchspec.config.schema import Config
from torchspec.data.builtin_target import CACHE, MODEL
from torchspec.hardware import fast_dtype
from torchspec.inference.engine import TargetEngine
from torchspec.inference.sglang_process import EngineSpec, start_token_engine
from torchspec.store.client import StoreNode
from torchspec.store.endpoint import StoreEndpoint
from torchspec.store.hidden_state_store import HiddenStateStore
from torchspec.store.master import MooncakeMaster
from torchspec.target.shape import early_middle_late

BATCHES = {"512 x 1": (512, 1), "512 x 8": (512, 8), "2048 x 1": (2048, 1), "2048 x 2": (2048, 2)}
"""Name to (tokens, prompts)."""
RESULTS = Path(__file__).parent / "results" / "capture_overhead.json"
BUFFER_BYTES = 128 << 20
SUFFIXES = ("hs", "lhs", "ids")
CAPTURE_ARGS = (
    "enable_return_aux_hidden_states",
    "speculative_algorithm",
    "return_aux_hidden_state_layer_ids",
    "custom_sigquit_handler",
)


class Engine:
    """This file, run with a role in a process of its own."""

    def __init__(self, role: str, model: Path, endpoint: StoreEndpoint):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--role", role, "--model", str(model), "--endpoint", endpoint.to_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def ask(self, name: str, prompts: list[list[int]]) -> dict[str, float]:
        """Prefill the prompts; seconds and CPU seconds."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps({"name": name, "prompts": prompts}), file=self.process.stdin, flush=True)
        return next(json.loads(line) for line in self.process.stdout if line.startswith("{"))

    def close(self) -> None:
        self.process.communicate()


def prompts_of(length: int, count: int, seed: int) -> list[list[int]]:
    """Token ids without meaning; a prefill does the same work for any."""
    return [[(seed + 7919 * row + 104729 * column) % 48000 + 100 for column in range(length)] for row in range(count)]


def serve(role: str, model: Path, endpoint: StoreEndpoint) -> None:
    """Answer :meth:`Engine.ask` until stdin closes."""
    sections = {
        "target": {"path": str(model), "dtype": fast_dtype("cpu")},
        "inference": {"max_total_tokens": 10000, "chunked_prefill_size": 2048, "buffer_bytes": BUFFER_BYTES},
    }
    spec = EngineSpec(Config.model_validate(sections), endpoint, early_middle_late(30))
    engine: Any
    if role == "capture":
        engine = TargetEngine(spec)
        client = HiddenStateStore(endpoint, 1 << 20)
        pids = engine._engine.get_all_child_pids()
    else:
        os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
        args = {k: v for k, v in spec.engine_args().items() if k not in CAPTURE_ARGS}
        engine = start_token_engine(Path(tempfile.mkdtemp(prefix="torchspec-")), **args)
        pids = engine.get_all_child_pids()
    processes = [psutil.Process(pid) for pid in pids]

    async def prefill(name: str, prompts: list[list[int]]) -> None:
        if role == "capture":
            await asyncio.gather(*(engine.capture(f"{name}{i}", ids) for i, ids in enumerate(prompts)))
        else:
            await engine.async_generate(input_ids=prompts, sampling_params={"max_new_tokens": 1, "temperature": 0.0})

    with asyncio.Runner() as runner:
        for line in sys.stdin:
            request = json.loads(line)
            began, used = time.perf_counter(), _cpu_seconds(processes)
            runner.run(prefill(request["name"], request["prompts"]))
            result = {"seconds": time.perf_counter() - began, "cpu_seconds": _cpu_seconds(processes) - used}
            if role == "capture":
                for i in range(len(request["prompts"])):
                    client.remove(f"{request['name']}{i}", SUFFIXES)
            print(json.dumps(result), flush=True)
        if role == "capture":
            client.close()
            engine.stop()
        else:
            engine.shutdown()


def _cpu_seconds(processes: list[psutil.Process]) -> float:
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


def measure(model: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Batch name to medians over the rounds."""
    with ExitStack() as stack:
        master = MooncakeMaster(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "mooncake_master.log")
        stack.callback(master.stop)
        node = StoreNode(master.endpoint, 256 << 20)
        stack.callback(node.close)
        engines = {role: Engine(role, model, master.endpoint) for role in ("plain", "capture")}
        for engine in engines.values():
            stack.callback(engine.close)
        for role, engine in engines.items():
            engine.ask(f"warm-up-{role}", prompts_of(2048, 1, 0))
        table = {}
        for name, (length, count) in BATCHES.items():
            prompts, samples = prompts_of(length, count, length + count), []
            for number in range(rounds):
                order = list(engines) if number % 2 else list(reversed(engines))
                samples.append({role: engines[role].ask(f"{length}-{count}-{number}-", prompts) for role in order})
            table[name] = _summary(samples, length * count)
        return table


def _summary(samples: list[dict[str, dict[str, float]]], tokens: int) -> dict[str, float]:
    def median(pick: Any) -> float:
        return statistics.median(pick(sample) for sample in samples)

    return {
        "plain_tokens_per_s": tokens / median(lambda s: s["plain"]["seconds"]),
        "capture_tokens_per_s": tokens / median(lambda s: s["capture"]["seconds"]),
        "time_overhead": median(lambda s: s["capture"]["seconds"] / s["plain"]["seconds"]) - 1,
        "cpu_overhead": median(lambda s: s["capture"]["cpu_seconds"] / s["plain"]["cpu_seconds"]) - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", type=Path, default=CACHE.expanduser() / MODEL)
    parser.add_argument("--role", choices=["plain", "capture"], help=argparse.SUPPRESS)
    parser.add_argument("--endpoint", type=StoreEndpoint.from_json, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        return serve(args.role, args.model, args.endpoint)
    results = measure(args.model, args.rounds)
    table = Table("prefill", "plain tok/s", "capture tok/s", "time", "CPU time", title=f"capture, {fast_dtype('cpu')}")
    for name, row in results.items():
        speeds = (f"{row['plain_tokens_per_s']:.0f}", f"{row['capture_tokens_per_s']:.0f}")
        table.add_row(name, *speeds, f"{row['time_overhead']:+.1%}", f"{row['cpu_overhead']:+.1%}")
    Console().print(table)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"dtype": fast_dtype("cpu"), "rounds": args.rounds, "batches": results}, indent=2))


if __name__ == "__main__":
    main()
