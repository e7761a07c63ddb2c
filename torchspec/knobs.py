"""What every section of a config has in common."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ConfigDict

T = TypeVar("T")


class Section(BaseModel):
    """Unknown keys are refused; the text below a field is its documentation."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, validate_default=True, coerce_numbers_to_str=True
    )


def found(size: T | None) -> T:
    """A size that may be left open, of a config that has been resolved."""
    assert size is not None, "resolved before the run starts"
    return size
