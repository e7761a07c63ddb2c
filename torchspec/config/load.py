"""Reads a YAML recipe, applies ``a.b=c`` overrides, and turns what is wrong into one clear line each."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from torchspec.config.describe import describe_type, section_of
from torchspec.config.schema import Config
from torchspec.drafts.registry import KINDS, kind_of
from torchspec.files import write_atomically


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read ``path``, apply dotted overrides in order, validate.

    Raises:
        ValueError: the file is missing or not YAML, an override is malformed, a key is unknown (the nearest valid name
            is given) or a value does not fit.
    """
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ValueError(f"cannot read the config {path}: {error.strerror}") from None
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold sections (run:, target:, data:, ...), not a {type(tree).__name__}")
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
    """Write the resolved config as YAML, at once; :func:`load_config` reads it back to an equal one."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    write_atomically(path, lambda file: file.write(text.encode()), durable=True)


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
    node[leaf] = _value(value, override)


def _value(text: str, override: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"override {override!r}: the value is not valid YAML") from None
    if isinstance(value, str):  # YAML 1.1 reads 2e-3 as text
        try:
            return float(value)
        except ValueError:
            return value
    return value


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


def _knob_at(loc: tuple[int | str, ...], tree: dict[str, Any]) -> tuple[list[str], FieldInfo]:
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
    name = ".".join(str(part) for part in loc)
    known = _known_keys(tree)
    parent = ".".join(str(part) for part in loc[:-1])
    siblings = [k for k in known if k.rpartition(".")[0] == parent]
    leaf = {k.rpartition(".")[2]: k for k in siblings}
    if elsewhere := [k for k in known if k.rpartition(".")[2] == loc[-1]]:
        return f"unknown key {name}: did you mean {elsewhere[0]}?"
    if parent == "draft" and (kinds := [kind for kind in KINDS if loc[-1] in KINDS[kind].Knobs.model_fields]):
        return f"unknown key {name}: it is one of kind {' and '.join(kinds)}, draft.kind is {kind_of(tree['draft'])}"
    near = difflib.get_close_matches(str(loc[-1]), leaf, n=1, cutoff=0.5)
    if near:
        return f"unknown key {name}: did you mean {leaf[near[0]]}?"
    anywhere = difflib.get_close_matches(str(loc[-1]), [k.rpartition(".")[2] for k in known], n=1, cutoff=0.8)
    if anywhere:
        full = next(k for k in known if k.rpartition(".")[2] == anywhere[0])
        return f"unknown key {name}: did you mean {full}?"
    return f"unknown key {name}: valid keys here are {', '.join(sorted(leaf))}"


def _known_keys(tree: Any, model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        value = tree.get(name) if isinstance(tree, dict) else None
        section = section_of(field, value)
        if section is not None:
            keys += _known_keys(value, section, f"{prefix}{name}.")
    return keys
