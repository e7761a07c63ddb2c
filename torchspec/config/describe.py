"""The type of a key and its limits, as people say it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel, ByteSize
from pydantic.fields import FieldInfo

from torchspec.drafts.registry import DEFAULT, KINDS, kind_of
from torchspec.drafts.shape import DraftKnobs

TYPE_NAMES = {
    **{int: "integer", float: "number", bool: "true or false", str: "text", Path: "path", Any: "anything"},
    ByteSize: "bytes, as 16GiB or 500MB",
}
LIMITS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "pattern": "matching", "multiple_of": "multiple of"}


def describe_type(field: FieldInfo) -> str:
    """What a key takes: ``integer, >= 1, <= 16``, ``cosine | linear``, ``text, required``."""
    parts = [_type_name(field.annotation), *_limits(field.metadata)]
    if field.is_required():
        parts.append("required")
    return ", ".join(parts)


def section_of(field: FieldInfo, value: Any = None) -> type[BaseModel] | None:
    """The class of a key that has keys of its own.

    Args:
        value: the key's, not yet parsed; the class of ``draft`` depends on its kind.
    """
    if field.annotation is DraftKnobs:
        return KINDS.get(kind_of(value), KINDS[DEFAULT]).Knobs
    return field.annotation if _is_section(field.annotation) else None


def _is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _limits(metadata: Iterable[Any]) -> list[str]:
    limits = [(sign, getattr(limit, name, None)) for limit in metadata for name, sign in LIMITS.items()]
    return [f"{sign} {value}" for sign, value in limits if value is not None]


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return "null"
    if _is_section(annotation):
        return "keys and their values"
    if origin is Literal:
        return " | ".join(str(value) for value in arguments)
    if origin is Annotated:
        return " ".join([_type_name(arguments[0]), *_limits(arguments[1:])])
    if origin is list:
        return f"list of {_type_name(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(_type_name(a) for a in arguments)}]"
    if origin is dict:
        return "mapping"
    if arguments and origin in (Union, type(int | str)):
        return " | ".join(_type_name(a) for a in arguments)
    return TYPE_NAMES[annotation]
