"""What the controller's process has to load."""

from __future__ import annotations

import subprocess
import sys


def test_the_controller_holds_metadata_only_and_loads_no_torch() -> None:
    code = "import sys, torchspec.controller.controller; print(*{'torch', 'transformers', 'sglang'} & {*sys.modules})"
    answer = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert answer.stdout.split() == []
