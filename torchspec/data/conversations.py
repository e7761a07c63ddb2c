"""Rows to conversations, in one form whatever form they have.

Forms of a row, told apart by their key; ``data.columns`` names the keys of a set that calls them otherwise:

    {"id": "a", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
    {"id": "b", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}
    {"id": "c", "prompt": "Hi"}
    {"id": "d", "input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]}

Both lists take ``role`` and ``content`` as well as ``from`` and ``value``; a content may be a list of text parts.
Beside ``messages``, ``tools`` are OpenAI's, and so are ``tool_calls`` and ``reasoning_content`` of an assistant's turn.
A conversation that ends with a turn of the user or of a tool is *unanswered*: the target answers it itself.

What people's files hold is used as far as it can be, and each change is told, so that it can be counted:

- Turns before the user's first with text are dropped, but for the system's: nobody asked for them.
- A conversation ends before an empty turn, and before a second answer in a row.
- Turns of the user in a row are joined by an empty line.
- Keys that are not read are named.

Nothing else is left out: what cannot be used comes back :class:`Rejected`, by name and with its reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from torchspec.data.rows import LONGEST, Row, read_rows

ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"},
    **{"function": "tool", "observation": "tool"},
}
"""Those of OpenAI, and how ShareGPT and its kin call them."""
FORMS = ("messages", "conversations", "prompt", "input_ids")
COLUMNS = (*FORMS, "loss_mask", "id", "tools", "category")
"""Keys of a row that are read."""
TURN_KEYS = frozenset(
    ("role", "from", "content", "value", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning")
)
MAX_REPORTED = 20
Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Conversation:
    """``messages`` and ``tools`` are what a chat template takes: contents are text, arguments of calls are dicts."""

    id: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    category: str | None = None
    changes: tuple[str, ...] = ()
    """What is not as it was in the file."""

    @property
    def answered(self) -> bool:
        return self.messages[-1]["role"] == "assistant"


@dataclass(frozen=True, slots=True)
class Pretokenized:
    """Token ids and their loss mask as a file has them."""

    id: str
    input_ids: list[int]
    loss_mask: list[int]
    changes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that holds no usable conversation. The reason is a kind of reasons, a colon, and what is the case here."""

    id: str
    where: str
    reason: str
    malformed: bool = False
    """It is the file that is wrong: not JSON, or none of the forms."""


Read = Conversation | Pretokenized | Rejected


class _MalformedRow(ValueError):
    pass


def read_conversations(
    files: Sequence[Path], limit: int | None = None, columns: Mapping[str, str] | None = None
) -> Iterator[Read]:
    """Every row of ``files``, in order, up to ``limit`` conversations (malformed rows do not count)."""
    unique, count = UniqueNames(), 0
    for row in read_rows(files):
        if count == limit:
            return
        found = read_row(row, columns or {})
        if not (isinstance(found, Rejected) and found.malformed):
            count += 1
            found = replace(found, id=unique(found.id))
        yield found


def require_clean(files: Sequence[Path], limit: int | None = None, columns: Mapping[str, str] | None = None) -> None:
    """Read everything once and refuse malformed rows.

    Raises:
        ValueError: one line of text for each of the first 20 of them.
    """
    rejected = (x for x in read_conversations(files, limit, columns) if isinstance(x, Rejected) and x.malformed)
    found = list(islice(rejected, MAX_REPORTED + 1))
    if not found:
        return
    lines = [f"{bad.where}: {bad.reason}" for bad in found[:MAX_REPORTED]]
    if len(found) > MAX_REPORTED:
        lines.append("... and more")
    lines.append("mend these lines, or pass over them with data.on_error=reject")
    raise ValueError("\n".join(lines))


class UniqueNames:
    """Gives a name that has been there before a suffix: sets that were merged often share ids."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def __call__(self, name: str) -> str:
        unique, count = name, 1
        while unique in self._seen:
            count += 1
            unique = f"{name}#{count}"
        self._seen.add(unique)
        return unique


def printable(text: str) -> str:
    """``text`` with control codes and halves of surrogate pairs escaped, on one line."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def read_row(row: Row, columns: Mapping[str, str]) -> Read:
    """What ``row`` holds.

    Args:
        columns: ``data.columns``: by keys of :data:`COLUMNS`, what the set calls them.
    """
    name = printable(row.name)
    try:
        fields = _fields(row.content, columns)
        form = next((form for form in FORMS if fields.get(form) is not None), None)
        if form is None:
            raise _MalformedRow(f"has none of the keys {', '.join(FORMS)}: data.columns may name yours")
        name = _identity(fields.get("id"), name)
        changes = [f"key not read: {key}" for key in fields if key not in COLUMNS or (key in FORMS and key != form)]
        if form == "input_ids":
            ids, mask = _numbers(fields, "input_ids"), _numbers(fields, "loss_mask")
            if len(ids) != len(mask) or not {*mask} <= {0, 1}:
                raise ValueError("loss_mask does not fit input_ids: it needs a 0 or 1 for each")
            return Pretokenized(name, ids, mask, tuple(changes))
        turns = [{"role": "user", "content": fields["prompt"]}] if form == "prompt" else fields[form]
        messages = _clean([_turn(t, f"{form}[{i}]", changes) for i, t in enumerate(_list(turns, form))], changes)
        tools = tuple(_list(fields.get("tools") or [], "tools"))
        if not all(isinstance(tool, dict) for tool in tools):
            raise ValueError("tools are not objects")
        category = fields.get("category")
        changes = [printable(change) for change in dict.fromkeys(changes)]
        return Conversation(
            name, tuple(messages), tools, None if category is None else printable(str(category)), tuple(changes)
        )
    except ValueError as error:
        return Rejected(name, row.where, printable(str(error)), isinstance(error, _MalformedRow))


def _fields(content: Any, columns: Mapping[str, str]) -> dict[str, Any]:
    """The row's own keys, by the names that we know them by."""
    if isinstance(content, bytes):
        if len(content) > LONGEST:
            raise _MalformedRow(f"longer than {LONGEST >> 20} MiB, or JSON without an end")
        try:
            content = json.loads(content)
        except json.JSONDecodeError as error:
            raise _MalformedRow(f"not valid JSON: {error.msg} (column {error.colno})") from None
        except UnicodeDecodeError:
            raise _MalformedRow("not valid UTF-8") from None
        except RecursionError:
            raise _MalformedRow("not valid JSON: nested too deeply") from None
    if not isinstance(content, dict):
        raise _MalformedRow("not a JSON object")
    names = {key: key for key in content} | {column: key for key, column in columns.items()}
    return {names[key]: value for key, value in content.items() if value is not None}


def _identity(value: Any, name: str) -> str:
    if value is None or value == "":
        return name
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError("id is neither text nor a whole number")
    return printable(str(value))


def _clean(turns: list[Message], changes: list[str]) -> list[Message]:
    """Turns as a template can take them: see the module's docstring. Adds to ``changes``."""
    first = next((i for i, turn in enumerate(turns) if turn["role"] == "user" and not _is_empty(turn)), None)
    if first is None:
        raise ValueError("has no user turn with text")
    kept = [turn for turn in turns[:first] if turn["role"] in ("system", "developer") and not _is_empty(turn)]
    if len(kept) < first:
        changes.append("turns before the user's first are dropped")
    for turn in turns[first:]:
        before, role = kept[-1]["role"] if kept else "", turn["role"]
        if _is_empty(turn):
            changes.append("ends before an empty turn")
            break
        if role == before == "assistant":
            changes.append("ends before a second answer in a row")
            break
        if role == before == "user":
            changes.append("user turns in a row are joined")
            kept[-1] = kept[-1] | {"content": f"{kept[-1]['content']}\n\n{turn['content']}"}
        else:
            kept.append(turn)
    if kept[-1]["role"] in ("system", "developer"):
        raise ValueError(f"ends with a {kept[-1]['role']} turn")
    return kept


def _is_empty(turn: Message) -> bool:
    return turn["role"] != "tool" and not turn["content"].strip() and not turn.get("tool_calls")


def _turn(item: Any, where: str, changes: list[str]) -> Message:
    """One turn in the form of ``messages``."""
    if not isinstance(item, dict):
        raise ValueError(f"turn is not an object: {where}")
    item = {key: value for key, value in item.items() if value is not None}
    role = item.get("role", item.get("from"))
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"unknown role: {where} has {role!r}, not one of {', '.join(ROLES)}")
    changes += [f"key of turns not read: {key}" for key in item if key not in TURN_KEYS]
    turn: Message = {"role": ROLES[role], "content": _text(item.get("content", item.get("value", "")), where)}
    if item.get("tool_calls"):
        calls = _list(item["tool_calls"], f"{where}.tool_calls")
        turn["tool_calls"] = [_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    reasoning = item.get("reasoning_content", item.get("reasoning"))
    if reasoning is not None and (reasoning := _text(reasoning, where)).strip():
        turn["reasoning_content"] = reasoning
    return turn | {key: item[key] for key in ("name", "tool_call_id") if key in item}


def _text(value: Any, where: str) -> str:
    if isinstance(value, list):
        parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in value]
        for part in parts:
            if not isinstance(part, dict) or part.get("type") != "text":
                kind = part.get("type") if isinstance(part, dict) else part
                raise ValueError(f"content is not text alone: {where} has a part of type {kind!r}")
        value = "".join(_text(part.get("text"), where) for part in parts)
    if not isinstance(value, str):
        raise ValueError(f"content is not text: {where}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"holds half of a surrogate pair: {where}") from None
    return value


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """With its arguments as an object, which is what templates are written for."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"tool call names no function: {where}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        raise ValueError(f"arguments are not a JSON object: {where}")
    call = {key: value for key, value in call.items() if key in ("id", "type") and value is not None}
    return {"type": "function", **call, "function": {"name": function["name"], "arguments": arguments}}


def _list(value: Any, what: str) -> list[Any]:
    """A list, or JSON text of one, which is how tables keep lists of many shapes."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, list):
        raise ValueError(f"{what} is not a list")
    return value


def _numbers(fields: Mapping[str, Any], key: str) -> list[int]:
    value = fields.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(x, int) and x >= 0 for x in value):
        raise ValueError(f"{key} is not a list of whole numbers")
    return [int(x) for x in value]
