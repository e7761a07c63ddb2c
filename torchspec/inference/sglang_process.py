"""Ends SGLang's processes one by one.

``Engine.shutdown()``, which SGLang also runs at exit, kills every child of its process: other people's too, and
Python's resource tracker, which then cannot remove the named semaphores in ``/dev/shm``.
"""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from multiprocessing import resource_tracker
from typing import Any

import psutil


def end_engine(engine: Any) -> None:
    """End the processes of a ``sglang.Engine``, which is of no more use then, and wait until they are gone."""
    atexit.unregister(engine.shutdown)
    manager = engine.tokenizer_manager
    manager._subprocess_watchdog.stop()
    _kill([psutil.Process(pid) for pid in engine.get_all_child_pids() if psutil.pid_exists(pid)])
    # A message that nobody takes any more would hold up whoever collects the engine as garbage, for good.
    for socket in (manager.send_to_scheduler, manager.recv_from_detokenizer, engine.send_to_rpc):
        socket.close(linger=0)


def end_children(but: Sequence[psutil.Process]) -> None:
    """End the children that a ``sglang.Engine`` left when it failed to start: all ``but`` the ones there before."""
    tracker = resource_tracker._resource_tracker._pid  # type: ignore[attr-defined]
    _kill([child for child in psutil.Process().children() if child not in but and child.pid != tracker])


def _kill(processes: list[psutil.Process]) -> None:
    """End processes and their children, and wait until they are gone."""
    family = [child for process in processes for child in process.children(recursive=True)] + processes
    for process in family:
        process.kill()
    psutil.wait_procs(family, timeout=30)
