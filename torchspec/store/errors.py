"""Mooncake's return codes as exceptions that name the object and what to do about it."""

from __future__ import annotations


class StoreError(RuntimeError):
    """Something about the store failed; the subclasses say what."""


class StoreUnavailable(StoreError):
    """The master or the node that holds the object does not answer."""


class StoreFull(StoreError):
    """No hole in the segment is large enough. Nothing was evicted to make one."""


class MissingObject(StoreError):
    """The object was never stored, was removed, or its put did not finish."""


class SizeMismatch(StoreError):
    """The stored object is larger or smaller than the reader expects."""


# Codes of mooncake-store/include/types.h.
_MEANING: dict[int, tuple[type[StoreError], str]] = {
    -200: (StoreFull, "the store has no room for it: raise store.segment_bytes, or lower the samples in flight"),
    -600: (SizeMismatch, "the stored object is larger than its shape says"),
    -703: (MissingObject, "its put has not finished"),
    -704: (MissingObject, "there is no such object"),
    -800: (StoreUnavailable, "the store node that holds it does not answer"),
    -900: (StoreUnavailable, "the store's master does not answer"),
    -901: (StoreUnavailable, "the store's master does not answer in time"),
}


def error_for(code: int, action: str, name: str) -> StoreError:
    """The exception for a negative return ``code`` of ``action`` ("put", ...) on the object ``name``."""
    kind, meaning = _MEANING.get(code, (StoreError, "unexpected"))
    return kind(f"{action} of {name}: {meaning} (Mooncake {code})")
