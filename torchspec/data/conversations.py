"""Reads conversations from JSONL files.

Three forms, one conversation a line, told apart by their key:

    {"id": "a", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
    {"id": "b", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}
    {"id": "c", "prompt": "Hi"}

``id`` is optional (default: ``{file stem}:{line}``) and unique over all files. A conversation that ends with a user's
turn is *unanswered*: the target answers it itself. A line that cannot be used never disappears: it comes back as a
:class:`BadLine` that says where it is and what is wrong with it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
ROLES = ("system", "user", "assistant")
MAX_REPORTED = 20


@dataclass(frozen=True, slots=True)
class Conversation:
    """``messages`` are what a chat template takes: ``{"role": system|user|assistant, "content": text}``."""

    id: str
    messages: tuple[dict[str, str], ...]

    @property
    def answered(self) -> bool:
        return self.messages[-1]["role"] == "assistant"


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that holds no usable conversation. ``name`` stands in for the id."""

    name: str
    where: str
    """``file:line``."""
    reason: str


def read_conversations(files: Sequence[Path], limit: int | None = None) -> Iterator[Conversation | BadLine]:
    """Every line of ``files`` but the blank ones, in order, up to ``limit`` conversations (bad lines do not count)."""
    seen: dict[str, str] = {}
    usable = 0
    for file, stem in zip(files, short_names(files), strict=True):
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if usable == limit:
                    return
                if not line.strip():
                    continue
                name, where = f"{stem}:{number}", f"{file}:{number}"
                try:
                    conversation = _parse(line, name)
                    if conversation.id in seen:
                        raise ValueError(f"its id {conversation.id!r} was already given at {seen[conversation.id]}")
                except ValueError as error:
                    yield BadLine(name, where, str(error))
                    continue
                seen[conversation.id] = where
                usable += 1
                yield conversation


def short_names(files: Sequence[Path]) -> list[str]:
    """File stems, or paths below the common folder where two stems are the same. Lines without an id are named so."""
    stems = [file.stem for file in files]
    if len(set(stems)) == len(stems):
        return stems
    root = os.path.commonpath([file.parent for file in files])
    return [os.path.relpath(file, root) for file in files]


def require_clean(files: Sequence[Path], limit: int | None = None) -> None:
    """Read everything once and refuse bad lines.

    Raises:
        ValueError: one line of text for each of the first 20 bad lines.
    """
    found = list(islice((x for x in read_conversations(files, limit) if isinstance(x, BadLine)), MAX_REPORTED + 1))
    if not found:
        return
    lines = [f"{bad.where}: {bad.reason}" for bad in found[:MAX_REPORTED]]
    if len(found) > MAX_REPORTED:
        lines.append("... and more")
    lines.append("mend these lines, or pass over them with data.on_error=reject")
    raise ValueError("\n".join(lines))


def _parse(line: bytes, name: str) -> Conversation:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} (column {error.colno})") from None
    except UnicodeDecodeError:
        raise ValueError("not valid UTF-8") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    if "messages" in row:
        turns = _turns(row["messages"], "messages", "role", "content", {role: role for role in ROLES})
    elif "conversations" in row:
        turns = _turns(row["conversations"], "conversations", "from", "value", SHAREGPT_ROLES)
    elif "prompt" in row:
        turns = ({"role": "user", "content": _text(row["prompt"], "prompt")},)
    else:
        raise ValueError("has none of the keys messages, conversations, prompt")
    first = next((turn["role"] for turn in turns if turn["role"] != "system"), None)
    if first != "user":
        raise ValueError("has no user turn" if first is None else "starts with an assistant turn")
    if turns[-1]["role"] == "system":
        raise ValueError("ends with a system turn")
    identity = row.get("id", name)
    return Conversation(str(identity) if isinstance(identity, int) else _text(identity, "id"), turns)


def _turns(items: Any, form: str, role_key: str, text_key: str, roles: dict[str, str]) -> tuple[dict[str, str], ...]:
    if not isinstance(items, list) or not items:
        raise ValueError(f"{form} is not a non-empty list")
    turns = []
    for i, item in enumerate(items):
        where = f"{form}[{i}]"
        if not isinstance(item, dict):
            raise ValueError(f"{where} is not an object")
        role = item.get(role_key)
        if not isinstance(role, str) or role not in roles:
            raise ValueError(f"{where}.{role_key} is {role!r}, not one of {', '.join(roles)}")
        turns.append({"role": roles[role], "content": _text(item.get(text_key), f"{where}.{text_key}")})
    return tuple(turns)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is not text")
    if not value.strip():
        raise ValueError(f"{what} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} holds half of a surrogate pair") from None
    return value
