"""What an engine is started with: the knobs of its run, and what its user says."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from torchspec.config.schema import Config
from torchspec.inference import sglang_process
from torchspec.inference.sglang_process import EngineError, EngineSpec, await_hello, check_engine_args, killed_by
from torchspec.store.endpoint import StoreEndpoint


def test_knobs_reach_sglang_and_the_users_own_arguments_win() -> None:
    sections = {
        "target": {"path": "folder", "dtype": "float32"},
        "inference": {"max_concurrency": 3, "max_total_tokens": 999, "engine_args": {"log_level": "info"}},
        "recovery": {"stuck_seconds": 50},
    }
    spec = EngineSpec(Config.model_validate(sections), StoreEndpoint("host:1", "host:2"), (1, 5))
    args = spec.engine_args()
    assert (args["model_path"], args["dtype"], args["return_aux_hidden_state_layer_ids"]) == (
        "folder",
        "float32",
        [1, 5],
    )
    assert args["chunked_prefill_size"] is None, "left open on a GPU: SGLang's own choice"
    assert (args["max_running_requests"], args["max_total_tokens"], args["watchdog_timeout"]) == (3, 999, 50)
    assert (args["log_level"], args["mem_fraction_static"]) == ("info", 0.5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("disable_radix_cache", False),
        ("dp_size", 2),
        ("pp_size", 2),
        ("disaggregation_mode", "prefill"),
        ("speculative_num_steps", 3),
        ("model_path", "another"),
    ],
)
def test_arguments_that_break_capture_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"inference\.engine_args\.{name}={value!r}: TorchSpec sets {name} by itself"):
        check_engine_args({"log_level": "info", name: value})


def test_arguments_that_say_the_same_are_taken() -> None:
    check_engine_args({"disable_radix_cache": True, "dp_size": 1, "skip_server_warmup": True, "context_length": 4096})


def test_a_plugin_that_connects_and_says_nothing_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sglang_process, "_HELLO_SECONDS", 0.2)
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as silent:
        listener.bind(str(tmp_path / "socket"))
        listener.listen(1)
        silent.connect(str(tmp_path / "socket"))
        with pytest.raises(EngineError, match="the capture plugin did not load"):
            await_hello(listener)


@pytest.mark.parametrize(
    ("end", "expected"), [("kill -9 $$", signal.SIGKILL), ("kill -6 $$", signal.SIGABRT), ("exit 3", None)]
)
def test_how_a_child_has_ended_is_told_and_left_for_its_parent_to_ask(
    end: str, expected: signal.Signals | None
) -> None:
    child = subprocess.Popen(["sh", "-c", end])
    descriptor = os.pidfd_open(child.pid)
    assert killed_by(descriptor) == expected
    assert child.wait(10) == (3 if expected is None else -expected)
    assert killed_by(descriptor) is None, "somebody has waited for it"
    os.close(descriptor)
