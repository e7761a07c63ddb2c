"""Whether a run is running. Standard library only."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any


def this_process() -> dict[str, Any]:
    """What a handle says of the driver, which calls this."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": started_at(os.getpid())}


def started_at(pid: int) -> int | None:
    """When a process of this machine started, in clock ticks since boot; None: there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return None
    return int(stat.rpartition(")")[2].split()[19])


def only_machine(run_dir: Path) -> str | None:
    """The address of the one machine that a running run is on; None: of its cluster's machines it can use them all."""
    machine: str | None = json.loads((run_dir / "handle.json").read_text())["machine"]
    return machine


def is_live(run_dir: Path) -> bool:
    """Whether the run in ``run_dir`` has a driver: on this machine one that lives, elsewhere one that has not ended."""
    try:
        handle = json.loads((run_dir / "handle.json").read_text())
    except FileNotFoundError:
        return False
    return handle["host"] != socket.gethostname() or started_at(handle["pid"]) == handle["started"]
