"""``torchspec config``: every key with its default, type and meaning; or a recipe as it resolves.

The reference is generated from the schema and is itself a recipe: YAML with comments, which loads to the defaults
once the one required key is filled in.
"""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from torchspec.cli.arguments import Overrides

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

WIDTH = 100


def config(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="Print this recipe with all defaults filled in.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Print every key with its type, default and meaning; with CONFIG, that recipe as it resolves."""
    from torchspec.config.load import config_text, load_config
    from torchspec.config.schema import Config

    if config is None:
        print("\n".join(reference_lines(Config)))
    else:
        print(config_text(load_config(config, overrides or [])), end="")


def reference_lines(model: type[BaseModel], indent: str = "", without: Collection[str] = ()) -> Iterator[str]:
    """The reference of ``model`` and of the sections below it, ``without`` these keys."""
    from torchspec.config.describe import describe_type, section_of
    from torchspec.drafts.registry import DEFAULT, KINDS
    from torchspec.drafts.shape import DraftKnobs

    for name, field in ((name, field) for name, field in model.model_fields.items() if name not in without):
        section = section_of(field)
        if section is not None:
            yield f"{indent}{name}:"
            yield from reference_lines(section, indent + "  ")
            if name == "draft":
                _, *shared = DraftKnobs.model_fields  # behind the kind
                for kind in (kind for kind in KINDS if kind != DEFAULT):
                    yield f"{indent}  #"
                    yield f"{indent}  # of kind {kind}, besides `{shared[0]}` to `{shared[-1]}`, which all kinds have:"
                    yield from (f"{indent}  # {line}" for line in reference_lines(KINDS[kind].Knobs, without=shared))
            yield ""
        else:
            text = (field.description or "").replace("``", "`")
            yield from textwrap.wrap(text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
            yield f"{indent}{name}: {_default(field)}".rstrip() + f"  # {describe_type(field)}"


def _default(field: FieldInfo) -> str:
    """The default as YAML on one line; nothing for a required key."""
    import yaml
    from pydantic_core import to_jsonable_python

    if field.is_required():
        return ""
    value = to_jsonable_python(field.get_default(call_default_factory=True))
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()
