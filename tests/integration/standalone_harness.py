"""A real ``python -m sglang.launch_server`` on a free port of the loopback interface, as a user would start it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from torchspec.network import free_port
from torchspec.processes.leftovers import remove_shared_memory_leftovers

_START_SECONDS = 240.0
_REPLY_SECONDS = 120.0


class ServedModel:
    """A server that answers on ``url``."""

    def __init__(self, url: str):
        self._url = url

    def generate(self, rid: str, input_ids: Sequence[int], **sampling: Any) -> tuple[int, dict[str, Any]]:
        """HTTP status and reply."""
        body = {"rid": rid, "input_ids": list(input_ids), "sampling_params": {"temperature": 0, **sampling}}
        request = urllib.request.Request(
            f"{self._url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=_REPLY_SECONDS) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/health", timeout=5) as reply:
                return reply.status == 200
        except OSError:
            return False


def command(model_path: Path, *arguments: str) -> list[str]:
    return [
        *(sys.executable, "-m", "sglang.launch_server", "--model-path", str(model_path), "--host", "127.0.0.1"),
        *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
        *("--disable-cuda-graph", "--dtype", "float32", "--mem-fraction-static", "0.5", "--skip-server-warmup"),
        *arguments,
    ]


def environment(**variables: str) -> dict[str, str]:
    return os.environ | {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"} | variables


@contextmanager
def served_model(log_path: Path, model_path: Path, *arguments: str, **variables: str) -> Iterator[ServedModel]:
    """The server, once it is healthy; nothing of it is left afterwards."""
    port, started = free_port("127.0.0.1"), time.time()
    with log_path.open("w") as log:
        process = subprocess.Popen(
            command(model_path, "--port", str(port), *arguments),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(**variables),
        )
    try:
        server = ServedModel(f"http://127.0.0.1:{port}")
        while not server.answers():
            assert process.poll() is None and time.time() < started + _START_SECONDS, log_path.read_text()[-4000:]
            time.sleep(0.2)
        yield server
    finally:
        _end(process)
        remove_shared_memory_leftovers(started)


def _end(process: subprocess.Popen) -> None:
    """Python's resource tracker may end by itself: it removes the semaphores of the others."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    others = [child for child in family if "resource_tracker" not in " ".join(child.cmdline())]
    process.kill()
    process.wait()
    for child in others:
        child.kill()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
