"""Loads a recipe, applies ``a.b=c`` overrides, and turns what is wrong into one clear line each."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from torchspec.config.describe import describe_type, section_of
from torchspec.config.recipe import keep_variables, read_recipe
from torchspec.config.schema import Config
from torchspec.drafts.registry import KINDS, kind_of
from torchspec.files import write_atomically

EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
"""Numbers that YAML 1.1 reads as text, such as 2e-3."""


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read ``path`` (:func:`read_recipe`), apply dotted overrides in order, validate.

    Raises:
        ValueError: the recipe cannot be read, an override is malformed, a key is unknown (the nearest valid name is
            given) or a value does not fit.
    """
    tree = read_recipe(Path(path))
    for override in overrides:
        _apply(tree, override)
    return parse_config(tree)


def parse_config(tree: dict[str, Any]) -> Config:
    """Validate a plain tree. Raises ValueError with one line for each thing that is wrong."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(e["loc"], e["type"], e["msg"], tree) for e in error.errors()]
        raise ValueError("\n".join(dict.fromkeys(lines))) from None  # a union complains once for each member


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """``config`` with other values, by the knob's name: ``{"training.dp_size": 2}``.

    Raises:
        ValueError: they do not fit, or not with the rest of it.
    """
    tree = config.model_dump()
    for knob, value in values.items():
        *sections, leaf = knob.split(".")
        reduce(dict.__getitem__, sections, tree)[leaf] = value
    return parse_config(tree)


def save_config(config: Config, path: Path) -> None:
    """Write ``config`` as YAML, at once."""
    write_atomically(path, lambda file: file.write(config_text(config).encode()), durable=True)


def config_text(config: Config) -> str:
    """``config`` as YAML; :func:`load_config` reads it back to an equal one."""
    return keep_variables(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override {override!r} must look like section.key=value")
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        child = node.get(section)
        if child is None:
            child = node[section] = {}
        if not isinstance(child, dict):
            raise ValueError(f"override {override!r}: {section} is a value, not a section")
        node = child
    node[leaf] = _value(value, override, _takes_text(key.split("."), tree))


def _value(text: str, override: str, as_text: bool) -> Any:
    """What ``text`` is to YAML, but ``as_text`` a number or a date is what stands there."""
    try:
        value = yaml.safe_load(text)
        if as_text and not isinstance(value, (dict, list, NoneType)):
            return yaml.load(text, yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError):
        raise ValueError(f"override {override!r}: the value is not valid YAML") from None
    return float(value) if EXPONENT.fullmatch(text) else value


def _takes_text(key: list[str], tree: dict[str, Any]) -> bool:
    try:
        knob, field = _knob_at(key, tree)
    except KeyError:  # an unknown key: which are valid is said once all is read
        return False
    return knob == key and not {str, Path}.isdisjoint((field.annotation, *get_args(field.annotation)))


def _explain(loc: tuple[int | str, ...], kind: str, message: str, tree: dict[str, Any]) -> str:
    """One line for one complaint of pydantic, in the words of the config."""
    if kind == "extra_forbidden":
        return _unknown_key(loc, tree)
    if kind == "value_error":  # of a validator of ours
        return message.removeprefix("Value error, ")
    knob, field = _knob_at(loc, tree)
    name = ".".join(knob)
    if kind == "missing" and len(loc) == len(knob):
        return f"{name}: {message}"
    value = reduce(lambda node, key: node[key], knob, tree)
    return f"{name}: {value!r} does not fit; valid: {describe_type(field)}"


def _knob_at(loc: Iterable[int | str], tree: dict[str, Any]) -> tuple[list[str], FieldInfo]:
    """The key that ``loc`` lies in: what follows it there are places inside its value, and pydantic's own names."""
    model: type[BaseModel] = Config
    knob: list[str] = []
    for part in map(str, loc):
        knob.append(part)
        field = model.model_fields[part]
        section = section_of(field, tree.get(part))
        if section is None:
            break
        model = section
    return knob, field


def _unknown_key(loc: tuple[int | str, ...], tree: dict[str, Any]) -> str:
    *sections, wrong = map(str, loc)
    prefix = "".join(f"{section}." for section in sections)
    here: list[str] = []  # keys of this section
    places: dict[str, str] = {}  # of any key, the first that has it
    for place, key in _known_keys(tree):
        places.setdefault(key, place + key)
        if place == prefix:
            here.append(key)
    complaint = f"unknown key {prefix}{wrong}"
    if wrong in places:
        return f"{complaint}: did you mean {places[wrong]}?"
    if sections == ["draft"] and (kinds := [kind for kind in KINDS if wrong in KINDS[kind].Knobs.model_fields]):
        return f"{complaint}: it is one of kind {' and '.join(kinds)}, draft.kind is {kind_of(tree['draft'])}"
    near = [prefix + key for key in difflib.get_close_matches(wrong, here, n=1, cutoff=0.5)]
    near += [places[key] for key in difflib.get_close_matches(wrong, places, n=1, cutoff=0.8)]
    if near:
        return f"{complaint}: did you mean {near[0]}?"
    return f"{complaint}: valid keys here are {', '.join(sorted(here))}"


def _known_keys(tree: Any, model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every key, with what stands before it (``training.``) where ``tree`` has the sections' kinds."""
    for name, field in model.model_fields.items():
        yield prefix, name
        value = tree.get(name) if isinstance(tree, dict) else None
        section = section_of(field, value)
        if section is not None:
            yield from _known_keys(value, section, f"{prefix}{name}.")
