"""``torchspec config``: every key with its default, type and meaning; or a recipe as it resolves.

The reference is generated from the schema and is itself a recipe: YAML with comments, which loads to the defaults
once the one required key is filled in.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer

from torchspec.cli.arguments import Overrides

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

WIDTH = 100
TYPE_NAMES = {int: "integer", float: "number", bool: "true or false", str: "text", Path: "path", Any: "anything"}
LIMITS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def config(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="Print this recipe with all defaults filled in.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Print every key with its type, default and meaning; with CONFIG, that recipe as it resolves."""
    import yaml

    from torchspec.config.load import load_config
    from torchspec.config.schema import Config

    if config is None:
        print("\n".join(reference_lines(Config)))
    else:
        tree = load_config(config, overrides or []).model_dump(mode="json")
        print(yaml.safe_dump(tree, sort_keys=False), end="")


def reference_lines(model: type[BaseModel], indent: str = "") -> Iterator[str]:
    """The reference of ``model`` and of the sections below it."""
    from pydantic import BaseModel

    for name, field in model.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            yield f"{indent}{name}:"
            yield from reference_lines(section, indent + "  ")
            yield ""
        else:
            text = (field.description or "").replace("``", "`")
            yield from textwrap.wrap(text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
            yield f"{indent}{name}: {_default(field)}".rstrip() + f"  # {describe_type(field)}"


def describe_type(field: FieldInfo) -> str:
    """The type of a key and its limits, as people say it."""
    parts = [_type_name(field.annotation)]
    for constraint in field.metadata:
        parts += [
            f"{sign} {getattr(constraint, limit)}" for limit, sign in LIMITS.items() if hasattr(constraint, limit)
        ]
    if field.is_required():
        parts.append("required")
    return ", ".join(parts)


def _type_name(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    if get_origin(annotation) is Literal:
        return " | ".join(str(value) for value in get_args(annotation))
    arguments = get_args(annotation)
    if get_origin(annotation) in (list, tuple):
        inner = ", ".join(_type_name(a) for a in arguments)
        return f"list of {inner}" if get_origin(annotation) is list else f"[{inner}]"
    if get_origin(annotation) is dict:
        return "mapping"
    if arguments and get_origin(annotation) in (Union, type(int | str)):
        return " | ".join(_type_name(a) for a in arguments)
    return TYPE_NAMES[annotation]


def _default(field: FieldInfo) -> str:
    """The default as YAML on one line; nothing for a required key."""
    import yaml

    if field.is_required():
        return ""
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, tuple):
        value = list(value)
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()
