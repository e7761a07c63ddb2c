"""Every check finds the real machine well, and a real defect where there is one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from torchspec.cli import checks
from torchspec.cli.checks import CHECKS, Finding
from torchspec.processes.janitor import MARK

SURE = ["python", "packages", "torch", "libibverbs", "mooncake", "mooncake master", "sglang plugins", "ports"]
"""What holds on every machine that can run these tests, however full or busy it is."""


@pytest.mark.parametrize("name", SURE)
def test_this_machine_passes(name: str) -> None:
    finding = CHECKS[name]()
    assert finding.level == "ok" and not finding.fix, finding


@pytest.mark.parametrize("name", sorted(CHECKS.keys() - set(SURE)))
def test_a_complaint_says_how_to_mend_it(name: str) -> None:
    finding = CHECKS[name]()
    assert finding.detail
    assert (finding.level == "ok") == (not finding.fix)


def assert_bad(finding: Finding, level: str, *words: str) -> None:
    assert finding.level == level
    assert finding.fix
    for word in words:
        assert word in finding.detail


def test_a_missing_library() -> None:
    assert_bad(checks.check_libibverbs("libnothing.so.9"), "fail", "libnothing.so.9")


def test_a_missing_module() -> None:
    assert_bad(checks.check_mooncake("mooncake.nothing"), "fail", "mooncake.nothing")


def test_a_master_that_does_not_start(tmp_path: Path) -> None:
    assert_bad(checks.check_mooncake_master(tmp_path / "absent"), "fail", "No such file")
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho libx.so: cannot open >&2\nexit 127\n")
    assert_bad(checks.check_mooncake_master(broken), "fail", "Permission denied")
    broken.chmod(0o755)
    assert_bad(checks.check_mooncake_master(broken), "fail", "libx.so: cannot open")


def make_package(folder: Path, name: str, lines: str, entry_points: str = "") -> None:
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{lines}")
    (info / "entry_points.txt").write_text(entry_points)


def test_packages_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    make_package(
        tmp_path,
        "needy",
        "Requires-Dist: rich<1\nRequires-Dist: not-a-package-anywhere>=2\nRequires-Dist: psutil\n"
        'Requires-Dist: also-absent; extra == "cuda"\n',
    )
    finding = checks.check_packages("needy")
    assert_bad(finding, "fail", "rich is ", "(wanted <1)", "not-a-package-anywhere is missing")
    assert "psutil" not in finding.detail and "also-absent" not in finding.detail


def test_plugins_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    make_package(tmp_path, "pluginless", "")
    assert_bad(checks.check_plugins("pluginless"), "fail", "all of them")
    make_package(tmp_path, "dangling", "", "[sglang.srt.plugins]\ngone = nowhere.module:register\n")
    assert_bad(checks.check_plugins("dangling"), "fail", "gone")


def test_another_sglang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_package(tmp_path, "sglang", "")
    monkeypatch.syspath_prepend(tmp_path)
    assert_bad(checks.check_sglang(), "fail", "sglang 1.0 is installed", "sglang 0.5.23")


def test_shared_memory(tmp_path: Path) -> None:
    assert_bad(checks.check_shared_memory(tmp_path / "absent"), "fail", "does not exist")


def test_too_little_room() -> None:
    assert_bad(checks.check_disk(wanted=1 << 60, least=1), "warn", "free in")
    assert_bad(checks.check_disk(wanted=1 << 60, least=1 << 59), "fail")
    assert_bad(checks.check_memory(wanted=1 << 60, least=1), "warn", "available of")
    assert_bad(checks.check_memory(wanted=1 << 60, least=1 << 59), "fail")
    assert_bad(checks.check_cores(wanted=1 << 20), "warn", "usable")


def test_a_target_that_is_not_there_or_not_whole(tmp_path: Path) -> None:
    assert_bad(checks.check_target(tmp_path), "warn", str(tmp_path))
    (tmp_path / "config.json").touch()
    assert checks.check_target(tmp_path).level == "warn"
    (tmp_path / "model.safetensors").touch()
    assert checks.check_target(tmp_path).level == "ok"


def test_ports_of_an_address_that_is_not_ours() -> None:
    assert_bad(checks.check_ports("192.0.2.1"), "fail", "192.0.2.1")  # RFC 5737: nobody's
    with socket.create_server(("127.0.0.1", 0)):
        assert checks.check_ports().level == "ok"


def test_a_token_of_ray_that_others_can_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert checks.check_ray_token().level == "ok", "there is none"
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("secret")
    token.chmod(0o640)
    assert_bad(checks.check_ray_token(), "warn", str(token))
    assert "secret" not in checks.check_ray_token().detail
    token.chmod(0o600)
    assert checks.check_ray_token().level == "ok"
    (tmp_path / "mine").write_text("secret")
    (tmp_path / "mine").chmod(0o604)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "mine"))
    assert_bad(checks.check_ray_token(), "warn", str(tmp_path / "mine"))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    assert checks.check_ray_token() == Finding("ok", "in RAY_AUTH_TOKEN")


def test_a_long_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 40)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    assert_bad(checks.check_temporary_folder(), "warn", "too long")


def test_sockets_below_the_longest_temporary_folder() -> None:
    """Ray's and the capture plugin's, in folders as the driver and the engine name them."""
    session = "session_2026-01-31_23-59-59_999999_4194304"
    with tempfile.TemporaryDirectory(prefix="x" * 7, dir="/tmp") as root:
        assert len(root) == checks.LONGEST_TEMPORARY_FOLDER
        run = Path(tempfile.mkdtemp(prefix="torchspec-", dir=root))
        (run / "actors").mkdir()
        engine = Path(tempfile.mkdtemp(prefix="torchspec-", dir=run / "actors"))
        for path in (run / "ray" / session / "sockets" / "plasma_store", engine / "capture"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(path))


def test_a_process_whose_run_is_over() -> None:
    code = "import sys; print('here', flush=True); sys.stdin.read()"
    environment = {**os.environ, MARK: "mark-of-a-run-that-is-over"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes) as orphan:  # type: ignore[call-overload]
        orphan.stdout.readline()
        finding = checks.check_stale_processes()
        assert finding.level == "warn" and str(orphan.pid) in finding.fix.split()

        watched = [sys.executable, "-c", code, "torchspec.processes.janitor", "mark-of-a-run-that-is-over"]
        with subprocess.Popen(watched, **pipes) as janitor:  # type: ignore[call-overload]
            janitor.stdout.readline()
            assert str(orphan.pid) not in checks.check_stale_processes().fix.split(), "its janitor will see to it"
            janitor.stdin.close()
        orphan.stdin.close()
    assert str(orphan.pid) not in checks.check_stale_processes().fix.split()


def test_leftovers_are_files_that_nobody_maps(tmp_path: Path) -> None:
    assert checks.check_leftovers(tmp_path).level == "ok"
    (tmp_path / "sglang_loads_abc.shm").write_bytes(bytes(4096))
    (tmp_path / "somebody_elses.shm").write_bytes(bytes(4096))
    finding = checks.check_leftovers(tmp_path)
    assert_bad(finding, "warn", "1 files")
    assert "sglang_loads_abc.shm" in finding.fix

    code = (
        "import mmap, sys; f = open(sys.argv[1], 'r+b'); m = mmap.mmap(f.fileno(), 0)\n"
        "print('mapped', flush=True); sys.stdin.read()"
    )
    user = [sys.executable, "-c", code, str(tmp_path / "sglang_loads_abc.shm")]
    with subprocess.Popen(user, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert checks.check_leftovers(tmp_path).level == "ok", "in use"
        process.communicate()
