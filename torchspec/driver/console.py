"""What a run tells a person."""

from __future__ import annotations

from typing import Protocol

from torchspec.contracts import RunStatus


class View(Protocol):
    def status(self, status: RunStatus) -> None: ...
    def message(self, text: str) -> None: ...
