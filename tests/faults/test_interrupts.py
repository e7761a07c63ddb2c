"""Signals and output that goes away: quiet, and never the end of a process that has something to put in order. And a
Ray of our own asks for its token."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pexpect
import pytest
from ray._private import ray_constants

from tests.online import ledger_snapshot, steps_done, wait_until_gone, write_config
from torchspec.controller.verify import verify_run

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
                interrupts.heard()
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
    try:
        lines = iter(process.stdout.readline, "")
        while not (line := next(lines)).startswith("ready "):
            assert "Error" not in line, line
        join = [sys.executable, "-c", f"import ray; ray.init('{line.split()[1]}')"]
        on_loopback = environment | {ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}
        without = subprocess.run(join, env=on_loopback, capture_output=True, text=True, timeout=120)
        assert without.returncode != 0 and "Authentication" in without.stderr, "whatever the environment says"
        assert stat.S_IMODE((Path(folder) / ".ray" / "auth_token").stat().st_mode) == 0o600
        process.send_signal(signal.SIGTERM)
        assert next(lines) == "interrupted: stopping with a checkpoint; press Ctrl-C again to stop at once\n"
        process.send_signal(signal.SIGTERM)
        assert list(lines) == ["stopped by signal 2\n"]
        assert process.wait(60) == 0
    finally:
        process.kill()


def train(folder: Path, target: Path) -> list[str]:
    """A run that is long enough to be interrupted, each of whose steps is told."""
    config = str(write_config(folder, target))
    return [sys.executable, "-m", "torchspec.cli.main", "train", config, "monitor.every_steps=1", "training.epochs=20"]


def check_stop(run_dir: Path, step: int) -> None:
    """It has stopped in order, after ``step``, and its log has what nobody could read any more."""
    assert ledger_snapshot(run_dir)["step"] == steps_done(run_dir) >= step
    proof = verify_run(run_dir)
    assert proof.violations == () and not proof.finished
    log = (run_dir / "logs" / "driver.log").read_text()
    assert "interrupted: stopping with a checkpoint" in log and "Traceback" not in log
    wait_until_gone(run_dir)


@pytest.mark.timeout(600)
def test_ctrl_c_while_nobody_reads_the_output_saves_a_checkpoint(tmp_path, target_path):
    """As with ``torchspec train ... | tee log``, where tee dies of the same Ctrl-C."""
    with subprocess.Popen(train(tmp_path, target_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            assert any(b" loss " in line for line in process.stdout)
            process.stdout.close()
            process.send_signal(signal.SIGINT)
            assert process.wait(300) == 0
        finally:
            process.kill()
    check_stop(tmp_path / "run", 1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_terminal_that_is_closed_saves_a_checkpoint(tmp_path, target_path):
    command, *arguments = train(tmp_path, target_path)
    process = pexpect.spawn(command, [*arguments, "monitor.live='off'"], timeout=300, encoding="utf-8")
    try:
        process.expect(" loss ")
        os.close(process.child_fd)  # SIGHUP, and whatever it writes fails
        assert os.waitstatus_to_exitcode(os.waitpid(process.pid, 0)[1]) == 0
    finally:
        process.ptyproc.terminated = True
    check_stop(tmp_path / "run", 1)
