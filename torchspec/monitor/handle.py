"""Whether a run is running. Standard library only."""

from __future__ import annotations

import json
from pathlib import Path


def is_live(run_dir: Path) -> bool:
    """Whether the driver of the run in ``run_dir`` is alive on this machine."""
    try:
        pid = json.loads((run_dir / "handle.json").read_text())["pid"]
    except FileNotFoundError:
        return False
    return Path(f"/proc/{pid}").exists()
