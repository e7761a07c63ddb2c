"""SGLang's processes: what they are started with, the start, the plugin's hello, and their end one by one.

SGLang reads its environment when it is imported, so it is imported in :func:`start_token_engine` only.

``Engine.shutdown()``, which SGLang also runs at exit, kills every child of its process: other people's too, and
Python's resource tracker, which then cannot remove the named semaphores in ``/dev/shm``. So it never runs here.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import psutil

from torchspec.config.schema import Config
from torchspec.hardware import Device
from torchspec.inference.capture.protocol import ENVIRONMENT_VARIABLE, CaptureConfig, Hello
from torchspec.network import LOOPBACK, interface_of
from torchspec.store.endpoint import StoreEndpoint

_HELLO_SECONDS = 10.0
"""The plugin says hello while SGLang starts, so by then it is there or it will never be."""


FIXED_ARGUMENTS: Mapping[str, Any] = {
    "disable_radix_cache": True,
    "dp_size": 1,
    "pp_size": 1,
    "nnodes": 1,
    "enable_dp_attention": False,
    "disaggregation_mode": "null",
    "skip_tokenizer_init": True,
}
"""Arguments of ``sglang.Engine`` for which a capturing engine has one value only."""
CAPTURE_ARGUMENTS = ("model_path", "enable_return_aux_hidden_states", "return_aux_hidden_state_layer_ids")
"""Those that are worked out from the rest of the config, like all that begin with ``speculative_``."""


class EngineError(RuntimeError):
    """SGLang did not start, or started without the capture plugin."""


@dataclass(frozen=True)
class EngineSpec:
    """One engine of a run."""

    config: Config
    """Resolved."""
    endpoint: StoreEndpoint
    """Where captures go."""
    aux_layers: tuple[int, ...]
    """Layers whose outputs are captured (``target/shape.py``)."""
    device: Device = "cpu"
    threads: int = 1
    """OpenMP threads of the scheduler process on a CPU."""

    def engine_args(self) -> dict[str, Any]:
        """Keyword arguments of ``sglang.Engine``; the user's own win over the rest."""
        target, inference = self.config.target, self.config.inference
        args = {
            "model_path": target.path,
            "device": self.device,
            "dtype": target.dtype,
            "tp_size": inference.tp_size,
            "chunked_prefill_size": inference.chunked_prefill_size,
            "max_total_tokens": inference.max_total_tokens,
            "max_running_requests": inference.max_concurrency,
            "mem_fraction_static": inference.mem_fraction_static,
            "trust_remote_code": target.trust_remote_code,
            "disable_radix_cache": True,  # a cached prefix has no hidden states
            "enable_multimodal": False,  # prompts are text; an image processor would need torchvision
            "enable_return_aux_hidden_states": True,
            "speculative_algorithm": "EAGLE3",  # names the capture convention; no draft is loaded
            "return_aux_hidden_state_layer_ids": list(self.aux_layers),
            "watchdog_timeout": self.config.recovery.stuck_seconds,
            "sleep_on_idle": True,  # the scheduler would spin on a core that others need
            "log_level": "error",
            "custom_sigquit_handler": signal.SIG_IGN,  # a dying child must not take this process along
        }
        if self.device == "cpu":
            args |= {
                "attention_backend": "torch_native",
                "sampling_backend": "pytorch",
                "disable_cuda_graph": True,
                # SGLang's own share would leave no room for whatever else starts at the same time
                "mem_fraction_static": inference.mem_fraction_static or 0.5,
            }
        return args | inference.engine_args


def check_engine_args(engine_args: Mapping[str, Any]) -> None:
    """Refuse ``inference.engine_args`` that a capturing engine cannot work with.

    Raises:
        ValueError: names the argument.
    """
    for name, value in engine_args.items():
        owned = name.startswith("speculative_") or name in CAPTURE_ARGUMENTS
        if owned or value != FIXED_ARGUMENTS.get(name, value):
            fixed = "" if owned else f" (it is {FIXED_ARGUMENTS[name]!r})"
            raise ValueError(
                f"inference.engine_args.{name}={value!r}: TorchSpec sets {name} by itself{fixed}, or the engine would "
                "not capture every hidden state; leave it out"
            )


@contextmanager
def _inherited(variables: Mapping[str, str]) -> Iterator[None]:
    """What is started meanwhile has these environment variables; this process has them no longer afterwards."""
    os.environ |= variables
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]


def start_token_engine(folder: Path, **engine_args: Any) -> Any:
    """A ``sglang.Engine`` for token ids in and token ids out, without SGLang's detokenizer process.

    Its ranks, all on this machine, meet in a file in ``folder``, which is theirs alone and stays for as long as they
    do: where torch meets by itself it listens on all interfaces, and its collectives on the one of the host's name.

    With ``skip_tokenizer_init`` the scheduler replies to this process by itself. SGLang starts the detokenizer all the
    same: some 10 s of CPU time and half a GiB for a process that is never sent a message.
    """
    from sglang.srt.entrypoints.engine import Engine

    class TokenEngine(Engine):
        @classmethod
        def _launch_detokenizer_subprocesses(cls, *_: Any, **__: Any) -> tuple[list[Any], list[str]]:
            return [], []

    meeting = {
        "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": f"file://{folder}/rendezvous",
        "GLOO_SOCKET_IFNAME": interface_of(LOOPBACK),
        "NCCL_SOCKET_IFNAME": interface_of(LOOPBACK),
    }
    with _inherited(meeting):
        return TokenEngine(**engine_args | {"skip_tokenizer_init": True})


def start_capturing_engine(spec: EngineSpec, capture: CaptureConfig) -> Any:
    """A token engine whose plugin captures, started with an environment that its child processes inherit.

    Raises:
        EngineError: SGLang did not start.
    """
    if spec.device == "cpu":
        os.environ |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": str(spec.threads)}
    others = psutil.Process().children()
    try:
        with _inherited({ENVIRONMENT_VARIABLE: capture.to_json()}):  # or the next engine here would capture, too
            return start_token_engine(Path(capture.socket).parent, **spec.engine_args())
    except BaseException as error:
        _end_children(but=others)
        if isinstance(error, RuntimeError):
            raise EngineError(f"SGLang did not start: {error}") from error
        raise


def await_hello(listener: socket.socket) -> tuple[socket.socket, Hello]:
    """The plugin's connection and its first message.

    Raises:
        EngineError: nobody connects.
    """
    listener.settimeout(_HELLO_SECONDS)
    try:
        connection, _ = listener.accept()
        connection.settimeout(_HELLO_SECONDS)
        with connection.makefile("rb") as lines:
            message = json.loads(lines.readline())
    except TimeoutError:
        raise EngineError(
            "the capture plugin did not load in SGLang's scheduler: is torchspec installed (pip install -e .) in this "
            "environment, and does SGLANG_PLUGINS, if set, name torchspec_capture?"
        ) from None
    assert message.pop("type") == "hello"
    connection.setblocking(False)
    return connection, Hello(**message)


def ignore_sigquit() -> None:
    """SGLang kills its whole parent process on SIGQUIT, which its children send; we see them end by ourselves."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGQUIT, signal.SIG_IGN)


def killed_by(pidfd: int) -> signal.Signals | None:
    """The signal that has ended a child of this process; None: it ended by itself, or was waited for already."""
    try:
        end = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT)
    except ChildProcessError:
        return None
    return signal.Signals(end.si_status) if end is not None and end.si_code == os.CLD_KILLED else None


def end_engine(engine: Any) -> None:
    """End the processes of a ``sglang.Engine``, which is of no more use then, and wait until they are gone."""
    atexit.unregister(engine.shutdown)
    manager = engine.tokenizer_manager
    manager._subprocess_watchdog.stop()
    _kill([psutil.Process(pid) for pid in engine.get_all_child_pids() if psutil.pid_exists(pid)])
    # A message that nobody takes any more would hold up whoever collects the engine as garbage, for good.
    for channel in (manager.send_to_scheduler, manager.recv_from_detokenizer, engine.send_to_rpc):
        channel.close(linger=0)


def _end_children(but: Sequence[psutil.Process]) -> None:
    """End the children that a ``sglang.Engine`` left when it failed to start: all ``but`` the ones there before."""
    tracker = resource_tracker._resource_tracker._pid  # type: ignore[attr-defined]
    _kill([child for child in psutil.Process().children() if child not in but and child.pid != tracker])


def _kill(processes: list[psutil.Process]) -> None:
    """End processes and their children, and wait until they are gone."""
    family = [child for process in processes for child in process.children(recursive=True)] + processes
    for process in family:
        process.kill()
    psutil.wait_procs(family, timeout=30)
