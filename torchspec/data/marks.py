"""Marks that are put into the parts of an assistant's turn, to be found again in the text that comes of it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torchspec.data.conversations import Message

MARK = re.compile("\ue000([0-9]+)([a-z]+[0-9]*)\ue001")
"""Private-use characters, at which no template trims or splits. Between them a turn's number, and where in the turn:
``start`` and ``end`` of its content, in its ``thoughts``, in ``call0``, ``call1`` ..."""
Marks = dict[tuple[int, str], int]
"""By turn and place: where in the text. A call's name may come again with the tool's reply: the first counts."""


def mark(number: int, place: str) -> str:
    return f"\ue000{number}{place}\ue001"


def with_marks(turn: Message, number: int, with_start: bool) -> Message:
    """``turn`` with marks in its parts, before white space that ends one, which may be trimmed."""

    def ended(part: str, place: str) -> str:
        body = part.rstrip()
        return f"{body}{mark(number, place)}{part[len(body) :]}" if body else part

    content = turn["content"]
    if content.strip():
        thoughts, closed, answer = content.rpartition("</think>")
        if closed and thoughts.rpartition("<think>")[2].strip():
            content = ended(thoughts, "thoughts") + closed + answer
        content = ended(content, "end")
        if with_start:
            content = mark(number, "start") + content
    marked = turn | {"content": content}
    if "reasoning_content" in turn:
        marked["reasoning_content"] = ended(turn["reasoning_content"], "thoughts")
    if "tool_calls" in turn:
        functions = [call["function"] for call in turn["tool_calls"]]
        functions = [f | {"name": ended(f["name"], f"call{i}")} for i, f in enumerate(functions)]
        marked["tool_calls"] = [c | {"function": f} for c, f in zip(turn["tool_calls"], functions, strict=True)]
    return marked


def take_out(text: str) -> tuple[str, Marks | None]:
    """``text`` without its marks, and where they were; None if one is there twice, and so says nothing."""
    marks: Marks = {}
    pieces, at, taken, twice = [], 0, 0, False
    for found in MARK.finditer(text):
        pieces.append(text[at : found.start()])
        place = int(found[1]), found[2]
        twice |= place in marks and not place[1].startswith("call")
        marks.setdefault(place, found.start() - taken)
        at, taken = found.end(), taken + len(found[0])
    return "".join([*pieces, text[at:]]), None if twice else marks


def is_whole(turn: Message, number: int, marks: Mapping[tuple[int, str], int]) -> bool:
    """Whether every part of the turn that has been marked came out, but for the start of its content."""
    marked = with_marks(turn, number, with_start=False)
    parts = [marked["content"], marked.get("reasoning_content", "")]
    parts += [call["function"]["name"] for call in marked.get("tool_calls", ())]
    return all((int(put[1]), put[2]) in marks for part in parts for put in MARK.finditer(part))


def thinks(turn: Message) -> bool:
    """Whether a template may cut a part of it."""
    return turn["role"] == "assistant" and ("reasoning_content" in turn or "</think>" in turn["content"])
