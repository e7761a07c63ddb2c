"""Skips that fail in CI: those that are not on the list, of a test or of a whole file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = """
import pytest

def test_runs(): pass

@pytest.mark.skip(reason="no CUDA device")
def test_listed(): pass

@pytest.mark.skip(reason="not today")
def test_unlisted(): pass

@pytest.mark.xfail(reason="known")
def test_known(): assert False
"""


@pytest.mark.parametrize(
    ("environment", "code", "summary"),
    [
        ({"CI": "1"}, 1, "1 passed, 1 skipped, 1 xfailed, 2 errors"),
        ({}, 0, "1 passed, 3 skipped, 1 xfailed"),
    ],
)
def test_in_ci_only_listed_skips_pass(tmp_path: Path, environment: dict[str, str], code: int, summary: str) -> None:
    (tmp_path / "test_skips.py").write_text(TESTS)
    (tmp_path / "test_whole_file.py").write_text("import pytest\npytest.skip('later', allow_module_level=True)")
    others = {name: value for name, value in os.environ.items() if name != "CI"}
    options = ["-p", "tests.skips", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--rootdir", tmp_path]
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", *options, tmp_path],
        cwd=ROOT,
        env=others | environment,
        capture_output=True,
        text=True,
    )
    assert summary in ended.stdout and ended.returncode == code, ended.stdout
    assert ("not today" in ended.stdout) == ("later" in ended.stdout) == bool(code), ended.stdout
