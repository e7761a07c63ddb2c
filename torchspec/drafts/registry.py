"""The kinds of draft there are. To add one: its folder, and its name here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchspec.drafts.dflash.spec import DFlashSpec
from torchspec.drafts.eagle3.spec import Eagle3Spec
from torchspec.drafts.peagle.spec import PEagleSpec
from torchspec.drafts.spec import DraftSpec

KINDS: dict[str, type[DraftSpec]] = {
    "eagle3": Eagle3Spec,
    "dflash": DFlashSpec,
    "peagle": PEagleSpec,
}
"""The first one is the default."""

DEFAULT = next(iter(KINDS))


def kind_of(section: Any) -> str:
    """Which kind a section ``draft`` asks for that has yet to be parsed."""
    return str(section.get("kind", DEFAULT)) if isinstance(section, Mapping) else DEFAULT
