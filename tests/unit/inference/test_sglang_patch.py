"""The SGLang patch on copies of the installed files: applied, checked, reverted, interrupted, refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from torchspec.inference.sglang_patch import (
    PATCHES,
    SUPPORTED_VERSION,
    FileEdit,
    PatchError,
    find_sglang,
    load_edits,
    switch,
)

EDITS = load_edits(PATCHES / f"v{SUPPORTED_VERSION}")


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """The files that the patch touches, as SGLang ships them."""
    for edit in EDITS:
        copy = tmp_path / edit.path
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((find_sglang() / edit.path).read_bytes())
    switch(tmp_path, EDITS, "released")
    return tmp_path


def test_patch_guards_every_import_it_is_for() -> None:
    assert {edit.path for edit in EDITS} == {
        "sglang/srt/configs/deepseek_ocr.py",
        "sglang/srt/multimodal/internvl_utils.py",
    }
    assert all("except ImportError" in new and "except" not in old for edit in EDITS for old, new in edit.hunks)


def test_apply_is_idempotent_and_revert_restores_every_byte(released: Path) -> None:
    before = contents(released)
    assert switch(released, EDITS, "patched") == [edit.path for edit in EDITS]
    patched = contents(released)
    assert patched.keys() == before.keys()
    assert all(patched[path] != before[path] for path in before)
    for path, source in patched.items():
        compile(source, path, "exec")

    assert switch(released, EDITS, "patched") == []
    assert contents(released) == patched
    assert switch(released, EDITS, "released") == [edit.path for edit in EDITS]
    assert contents(released) == before
    assert switch(released, EDITS, "released") == []


@pytest.mark.parametrize("wanted", ["patched", "released"])
def test_an_interrupted_run_is_repaired_either_way(released: Path, wanted: str) -> None:
    before = contents(released)
    EDITS[0].switch(released, "patched")
    assert [edit.state(released) for edit in EDITS] == ["patched", "released"]
    switch(released, EDITS, wanted)  # type: ignore[arg-type]
    assert {edit.state(released) for edit in EDITS} == {wanted}
    assert (contents(released) == before) == (wanted == "released")


def test_a_file_that_somebody_else_edited_is_named_and_nothing_is_written(released: Path) -> None:
    foreign = released / EDITS[1].path
    foreign.write_text(foreign.read_text().replace("torchvision", "torchvision_fork"))
    before = contents(released)
    with pytest.raises(PatchError, match=EDITS[1].path):
        switch(released, EDITS, "patched")
    assert contents(released) == before


def test_line_ends_survive(tmp_path: Path) -> None:
    edit = FileEdit("module.py", (("import a\r\n", "import b\r\n"),))
    (tmp_path / "module.py").write_bytes(b"x = 1\r\nimport a\r\ny = 2\n")
    edit.switch(tmp_path, "patched")
    assert (tmp_path / "module.py").read_bytes() == b"x = 1\r\nimport b\r\ny = 2\n"


def run_command(action: str, python_path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torchspec.inference.sglang_patch", action],
        env=os.environ | {"PYTHONPATH": str(python_path)},
        capture_output=True,
        text=True,
    )


def install(root: Path, version: str) -> None:
    """Make ``root`` look like a site-packages folder with that SGLang."""
    info = root / f"sglang-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {version}\n")


def test_command_applies_checks_and_reverts(released: Path) -> None:
    install(released, SUPPORTED_VERSION)
    unpatched = run_command("check", released)
    assert unpatched.returncode == 1
    assert "not patched" in unpatched.stderr and "apply" in unpatched.stderr
    assert run_command("apply", released).returncode == 0
    assert run_command("check", released).returncode == 0
    assert run_command("revert", released).returncode == 0
    assert run_command("check", released).returncode == 1


@pytest.mark.parametrize("action", ["apply", "check", "revert"])
def test_command_refuses_another_version_by_name(released: Path, action: str) -> None:
    install(released, "0.5.22")
    before = contents(released)
    refused = run_command(action, released)
    assert refused.returncode == 1
    assert "0.5.22" in refused.stderr and SUPPORTED_VERSION in refused.stderr
    assert "Traceback" not in refused.stderr
    assert contents(released) == before
