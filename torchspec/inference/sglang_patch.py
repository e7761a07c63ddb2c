"""Apply, check or revert TorchSpec's source edits to the installed SGLang.

    python -m torchspec.inference.sglang_patch {apply,check,revert}

The edits are unified diffs in ``patches/v<version>/`` beside this file and belong to exactly one SGLang release. Files
are written one by one, each atomically, and each is found either as released or as patched; so an interrupted command
is repaired by running it again, ``apply`` twice changes nothing, and ``revert`` restores every byte. Never imports
sglang, which could not be imported before the patch.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal

SUPPORTED_VERSION = "0.5.23"
PATCHES = Path(__file__).with_name("patches")

State = Literal["released", "patched"]


class PatchError(ValueError):
    """SGLang is absent, of another version, or its files are not what the patch expects."""


@dataclass(frozen=True)
class FileEdit:
    """All hunks of one file, as pairs of (released text, patched text)."""

    path: str
    hunks: tuple[tuple[str, str], ...]

    def state(self, root: Path) -> State:
        """Whether the file is as released or patched.

        Raises:
            PatchError: it is neither; somebody else edited it.
        """
        text = _read(root / self.path)
        if all(text.count(new) == 1 for _, new in self.hunks):
            return "patched"
        if all(text.count(old) == 1 for old, _ in self.hunks):
            return "released"
        raise PatchError(f"{root / self.path} is not as SGLang {SUPPORTED_VERSION} shipped it; reinstall SGLang")

    def switch(self, root: Path, wanted: State) -> None:
        """Bring the file from the other state into the wanted one, atomically."""
        path = root / self.path
        text = _read(path)
        for old, new in self.hunks:
            text = text.replace(old, new) if wanted == "patched" else text.replace(new, old)
        scratch = path.with_name(f".{path.name}.torchspec")
        scratch.write_bytes(text.encode())
        scratch.chmod(path.stat().st_mode)
        os.replace(scratch, path)


def load_edits(folder: Path) -> list[FileEdit]:
    """Parse every ``*.patch`` of ``folder``, in name order."""
    edits = []
    for patch in sorted(folder.glob("*.patch")):
        for block in re.split(r"^--- ", _read(patch), flags=re.MULTILINE)[1:]:
            header, *hunks = re.split(r"^@@ .*\n", block, flags=re.MULTILINE)
            path = header.splitlines()[1].removeprefix("+++ b/")
            edits.append(FileEdit(path, tuple(_parse_hunk(hunk) for hunk in hunks)))
    return edits


def find_sglang() -> Path:
    """The folder that holds the installed ``sglang`` package.

    Raises:
        PatchError: SGLang is not installed, or in a version the patch was not written for.
    """
    try:
        installed = distribution("sglang")
    except PackageNotFoundError:
        raise PatchError(f"sglang is not installed; TorchSpec needs sglang {SUPPORTED_VERSION}") from None
    if installed.version != SUPPORTED_VERSION:
        raise PatchError(
            f"sglang {installed.version} is installed, but TorchSpec's patch is for sglang {SUPPORTED_VERSION}; "
            f"run: pip install --no-deps sglang=={SUPPORTED_VERSION}"
        )
    return Path(str(installed.locate_file("")))


def switch(root: Path, edits: list[FileEdit], wanted: State) -> list[str]:
    """Bring every file into the wanted state; returns the paths that had to change.

    Raises:
        PatchError: a file is in neither state. Raised before anything is written.
    """
    changed = [edit for edit in edits if edit.state(root) != wanted]
    for edit in changed:
        edit.switch(root, wanted)
    return [edit.path for edit in changed]


def our_edits() -> list[FileEdit]:
    """Ours, for the supported version."""
    return load_edits(PATCHES / f"v{SUPPORTED_VERSION}")


def check_patched(edits: list[FileEdit] | None = None) -> int:
    """Make sure that the installed SGLang is ours to use; returns the number of patched files.

    Args:
        edits: what it must be patched with, on a machine without the repository. Default: :func:`our_edits`.

    Raises:
        PatchError: absent, another version, or not patched.
    """
    root, edits = find_sglang(), our_edits() if edits is None else edits
    unpatched = [edit.path for edit in edits if edit.state(root) == "released"]
    if unpatched:
        raise PatchError(
            f"sglang is not patched ({', '.join(unpatched)}); run: python -m torchspec.inference.sglang_patch apply"
        )
    return len(edits)


def _parse_hunk(hunk: str) -> tuple[str, str]:
    lines = hunk.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] in " -")
    new = "".join(line[1:] for line in lines if line[0] in " +")
    return old, new


def _read(path: Path) -> str:
    return path.read_bytes().decode()  # bytes: line ends must survive


def main() -> None:
    """Command line; exits 1 with one line when SGLang is not as wanted."""
    parser = argparse.ArgumentParser(description=f"TorchSpec's source edits to SGLang {SUPPORTED_VERSION}.")
    parser.add_argument("action", choices=["apply", "check", "revert"])
    action = parser.parse_args().action
    try:
        if action == "check":
            print(f"sglang {SUPPORTED_VERSION} is patched ({check_patched()} files)")
        else:
            edits = our_edits()
            changed = switch(find_sglang(), edits, "patched" if action == "apply" else "released")
            print(f"sglang {SUPPORTED_VERSION}: {action}: {len(changed)} of {len(edits)} files changed")
    except PatchError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
