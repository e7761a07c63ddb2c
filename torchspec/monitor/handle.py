"""Whether a run is running. Standard library only."""

from __future__ import annotations

import json
import socket
from pathlib import Path


def is_live(run_dir: Path) -> bool:
    """Whether the run in ``run_dir`` has a driver: on this machine one that lives, elsewhere one that has not ended."""
    try:
        handle = json.loads((run_dir / "handle.json").read_text())
    except FileNotFoundError:
        return False
    return handle["host"] != socket.gethostname() or Path(f"/proc/{handle['pid']}").exists()
