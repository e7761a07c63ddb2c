"""Rows become conversations of one form; every change is told, and what is wrong is one clear line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from torchspec.data.conversations import Conversation, Rejected, printable, read_conversations, read_row, require_clean
from torchspec.data.rows import Row

DATA = Path(__file__).parents[2] / "fixtures" / "data"
BLUE = ({"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."})


def write(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_three_forms_become_one():
    rows = list(read_conversations([DATA / "chats.jsonl"]))
    assert [row.id for row in rows] == ["openai", "chats:2", "7", "follow-up"]
    assert [row.answered for row in rows] == [True, True, False, False]
    assert [m["role"] for m in rows[0].messages] == ["system", "user", "assistant", "user", "assistant"]
    assert rows[1].messages == (
        {"role": "user", "content": "Wie heißt ein Papagei? 🦜"},
        {"role": "assistant", "content": "Ein Vogel, zum Beispiel Kakadu. 🦜"},
    )
    assert rows[2].messages == ({"role": "user", "content": "Write a haiku about rivers."},)


def test_each_bad_row_is_named_with_its_reason():
    rows = list(read_conversations([DATA / "malformed.jsonl"]))
    assert isinstance(rows[0], Conversation)
    reasons = {int(row.where.rpartition(":")[2]): row for row in rows if isinstance(row, Rejected)}
    assert list(reasons) == [2, 3, 4, 5, 6, 7, 10, 11, 12, 14]
    for number, reason in {
        2: "not valid JSON: ",
        3: "not a JSON object",
        4: "has none of the keys messages, conversations, prompt, input_ids: data.columns may name yours",
        5: "has no user turn",
        6: "unknown role: messages[0] has 'wizard', not one of system, developer, user, assistant, tool, human, gpt, ",
        7: "content is not text: messages[0]",
        10: "has no user turn",
        11: "ends with a system turn",
        12: "turn is not an object: messages[0]",
        14: "holds half of a surrogate pair: prompt[0]",
    }.items():
        row = reasons[number]
        assert row.where == f"{DATA / 'malformed.jsonl'}:{number}"
        assert row.reason.startswith(reason), row
        assert row.malformed == (number in (2, 3, 4))


def test_all_malformed_rows_are_reported_at_once():
    with pytest.raises(ValueError, match=r"data\.on_error=reject") as error:
        require_clean([DATA / "malformed.jsonl"])
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    assert lines[0].startswith(f"{DATA / 'malformed.jsonl'}:2: not valid JSON")
    require_clean([DATA / "chats.jsonl"])


def test_a_flood_of_bad_lines_is_cut_at_twenty(tmp_path):
    file = write(tmp_path / "bad.jsonl", *[{}] * 50)
    with pytest.raises(ValueError, match=r"bad\.jsonl:20: .*\n\.\.\. and more\n"):
        require_clean([file])


def test_bytes_that_are_not_text_are_a_bad_line(tmp_path):
    file = tmp_path / "latin.jsonl"
    file.write_bytes('{"prompt": "café"}\n'.encode("latin-1") + b'{"prompt": "tea"}\n')
    bad, good = read_conversations([file])
    assert isinstance(bad, Rejected)
    assert bad.reason == "not valid UTF-8"
    assert isinstance(good, Conversation)


def test_files_of_one_name_keep_their_lines_apart(tmp_path):
    files = [write(tmp_path / part / "chats.jsonl", {"prompt": part}) for part in ("a", "b")]
    assert [row.id for row in read_conversations(files)] == ["a/chats.jsonl:1", "b/chats.jsonl:1"]


def test_malformed_rows_do_not_count_towards_the_limit():
    rows = list(read_conversations([DATA / "malformed.jsonl", DATA / "chats.jsonl"], limit=3))
    assert rows[0].id == "good"
    assert len(rows) == 6 and sum(isinstance(row, Rejected) and row.malformed for row in rows) == 3
    require_clean([DATA / "malformed.jsonl"], limit=1)


def parse(content: object) -> Conversation | Rejected:
    return read_row(Row("rows:1", "rows.jsonl:1", content, 1.0), {})


def turns(*pairs: str) -> list[dict[str, str]]:
    """``human: Hi`` and so on, in ShareGPT's words."""
    return [dict(zip(("from", "value"), pair.split(": "), strict=True)) for pair in pairs]


@pytest.mark.parametrize(
    ("row", "change"),
    [
        ({"conversations": list(BLUE)}, None),
        ({"conversations": [{"from": "human", "value": "Name a colour."}, BLUE[1]]}, None),
        (
            {"conversations": turns("gpt: Hello!", "human: Name a colour.", "gpt: Blue.")},
            "turns before the user's first are dropped",
        ),
        (
            {"conversations": turns("human: Name a colour.", "gpt: Blue.", "human: ", "gpt: Red.")},
            "ends before an empty turn",
        ),
        ({"messages": [*BLUE, {"role": "assistant", "content": "Red."}]}, "ends before a second answer in a row"),
        ({"messages": [{"role": "system", "content": " "}, *BLUE]}, "turns before the user's first are dropped"),
        ({"messages": json.dumps(BLUE)}, None),
        ({"messages": [*BLUE], "source": "forum"}, "key not read: source"),
        ({"messages": [BLUE[0], BLUE[1] | {"weight": 0}]}, "key of turns not read: weight"),
        (
            {"messages": [BLUE[0] | {"content": [{"type": "text", "text": "Name a "}, "colour."]}, BLUE[1]]},
            None,
        ),
    ],
)
def test_what_people_have_becomes_the_same_conversation(row, change):
    conversation = parse(row)
    assert isinstance(conversation, Conversation)
    assert conversation.messages == BLUE
    assert conversation.changes == (() if change is None else (change,))


def test_turns_of_the_user_in_a_row_are_joined_by_an_empty_line():
    conversation = parse({"messages": [{"role": "user", "content": "Hi."}, *BLUE]})
    assert conversation.messages == ({"role": "user", "content": "Hi.\n\nName a colour."}, BLUE[1])
    assert conversation.changes == ("user turns in a row are joined",)


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"content": [{"type": "image_url"}]}, "content is not text alone: messages[0] has a part of type 'image_url'"),
        ({"content": 5}, "content is not text: messages[0]"),
        ({"content": "\ud83e"}, "holds half of a surrogate pair: messages[0]"),
        ({"content": ""}, "has no user turn with text"),
    ],
)
def test_what_cannot_be_used_is_rejected_by_name(turn, reason):
    rejected = parse({"id": "mine", "messages": [{"role": "user", **turn}]})
    assert rejected == Rejected("mine", "rows.jsonl:1", reason)


@pytest.mark.parametrize("arguments", ['{"town": "Oslo"}', {"town": "Oslo"}])
@pytest.mark.parametrize("wrapped", [True, False])
def test_tools_and_calls_are_kept(arguments, wrapped):
    tool = {"type": "function", "function": {"name": "weather"}}
    call = {"name": "weather", "arguments": arguments}
    call = {"id": "1", "type": "function", "function": call} if wrapped else call
    asked = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "I look."}
    reply = {"role": "tool", "tool_call_id": "1", "content": ""}
    conversation = parse({"tools": [tool], "messages": [BLUE[0], asked, reply]})
    assert conversation.tools == (tool,)
    called = {"name": "weather", "arguments": {"town": "Oslo"}}
    assert conversation.messages[1] == {
        **{"role": "assistant", "content": "", "reasoning_content": "I look."},
        "tool_calls": [{"type": "function", "function": called, **({"id": "1"} if wrapped else {})}],
    }
    assert conversation.messages[2] == {"role": "tool", "tool_call_id": "1", "content": ""}
    assert not conversation.answered and not conversation.changes
    broken = parse({"messages": [BLUE[0], asked | {"tool_calls": [{"name": "weather", "arguments": "town"}]}]})
    assert broken.reason == "arguments are not a JSON object: messages[1].tool_calls[0]"


def test_deep_json_is_one_line():
    rejected = parse(b"[" * 200_000)
    assert rejected == Rejected("rows:1", "rows.jsonl:1", "not valid JSON: nested too deeply", malformed=True)


def test_ids_are_text_that_can_be_printed(tmp_path):
    assert parse({"id": 7, "prompt": "Hi"}).id == "7"
    assert parse({"id": "x\n[ 1m00s] \x1b[2J🦜", "prompt": "Hi"}).id == "x\\n[ 1m00s] \\x1b[2J🦜"
    assert parse({"prompt": "Hi", "category": "a\x1b[2J"}).category == "a\\x1b[2J"
    assert printable("half \ud83e") == "half \\ud83e"
    assert parse({"id": 1.5, "prompt": "Hi"}).reason == "id is neither text nor a whole number"


def test_an_id_that_was_there_gets_a_suffix(tmp_path):
    files = [write(tmp_path / f"{n}.jsonl", {"id": "a", "prompt": "Hi"}) for n in range(3)]
    assert [row.id for row in read_conversations(files)] == ["a", "a#2", "a#3"]
