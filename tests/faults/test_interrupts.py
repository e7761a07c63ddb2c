"""SIGTERM is a Ctrl-C: quiet, and never the end of a process that has something to put in order. And a Ray of our own
asks for its token."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

DRIVER = """
import signal, sys, time
from pathlib import Path
import ray
from torchspec.config.load import parse_config
from torchspec.driver.cluster import start_cluster
from torchspec.driver.console import Interrupts
from torchspec.driver.plan import Plan
from torchspec.driver.plan import ThreadPlan

config = parse_config({"target": {"path": "unused"}})
plan = Plan({}, (), ThreadPlan(1, 1), 2, 0, 0, 0, 0, 0, "", 0, 0, ())
with Interrupts(lambda text: print(text, flush=True)) as interrupts:
    with start_cluster(config, plan, Path(sys.argv[1])):
        interrupts.install()
        try:
            print("ready", ray.get_runtime_context().gcs_address, flush=True)
            while True:
                time.sleep(0.1)
        except KeyboardInterrupt:
            print("stopped by signal", interrupts.count, flush=True)
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
"""


@pytest.fixture
def folder():
    """Short, for Ray's sockets."""
    with tempfile.TemporaryDirectory() as name:
        yield name


def test_sigterm_with_ray_running_which_lets_nobody_in_without_the_token(folder):
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "HOME": folder}
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    lines = iter(process.stdout.readline, "")
    while not (line := next(lines)).startswith("ready "):
        assert "Error" not in line, line
    join = [sys.executable, "-c", f"import ray; ray.init('{line.split()[1]}')"]
    without = subprocess.run(join, env=environment, capture_output=True, text=True)
    assert without.returncode != 0 and "Authentication" in without.stderr, "whatever the environment says"
    assert stat.S_IMODE((Path(folder) / ".ray" / "auth_token").stat().st_mode) == 0o600
    process.send_signal(signal.SIGTERM)
    assert next(lines) == "interrupted: stopping with a checkpoint; press Ctrl-C again to stop at once\n"
    process.send_signal(signal.SIGTERM)
    assert list(lines) == ["stopped by signal 2\n"]
    assert process.wait(60) == 0
