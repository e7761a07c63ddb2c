"""Loss masks mark each assistant turn and the token that ends it, exactly, with templates of every kind."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from torchspec.data.conversations import Conversation
from torchspec.data.tokenize import CUT, ChatTokenizer, Refusal, Tokenized

TEMPLATES = Path(__file__).parents[2] / "fixtures" / "data" / "templates"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def chat(*contents: str, system: str | None = None) -> Conversation:
    """User and assistant in turns, the user first."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return Conversation("c", ({"role": "system", "content": system}, *turns) if system else tuple(turns))


def marked_runs(chat_tokenizer: ChatTokenizer, row: Tokenized) -> list[str]:
    """Text of each run of tokens that the mask marks."""
    assert row.loss_mask is not None
    edges = np.flatnonzero(np.diff(np.concatenate([[0], row.loss_mask.astype(int), [0]])))
    return [chat_tokenizer.tokenizer.decode(row.input_ids[a:b]) for a, b in edges.reshape(-1, 2)]


@pytest.fixture(scope="module")
def smol(target_path) -> ChatTokenizer:
    return ChatTokenizer(target_path)


@pytest.fixture(scope="module")
def marked(target_path) -> ChatTokenizer:
    return ChatTokenizer(target_path, str(TEMPLATES / "markers.jinja"))


def encode(tokenizer: ChatTokenizer, conversation: Conversation, last_turn_only: bool = False) -> Tokenized:
    (row,) = tokenizer.encode([conversation], last_turn_only)
    assert isinstance(row, Tokenized), row
    return row


def chatml_oracle(tokenizer: ChatTokenizer, messages) -> tuple[list[int], list[bool]]:
    """Ids and mask piece by piece: special tokens of ChatML part the text, so pieces tokenise as the whole does."""
    pieces = [] if messages[0]["role"] == "system" else [(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n", False)]
    for message in messages:
        pieces.append((f"<|im_start|>{message['role']}\n", False))
        pieces.append((f"{message['content']}<|im_end|>", message["role"] == "assistant"))
        pieces.append(("\n", False))
    ids, mask = [], []
    for text, counts in pieces:
        piece = tokenizer.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += piece
        mask += [counts] * len(piece)
    return ids, mask


# No white space in front: it would merge with the header's line break, and then no oracle by pieces exists.
texts = st.text(
    alphabet=st.one_of(st.sampled_from("ab \n.,<>|🦜é中\u200d"), st.characters(exclude_categories=["Cs", "Co"])),
    min_size=1,
).filter(lambda text: text.strip() and not text[0].isspace())


@settings(max_examples=150, deadline=None)
@given(contents=st.lists(texts, min_size=2, max_size=6).filter(lambda c: len(c) % 2 == 0), system=st.none() | texts)
def test_ids_and_mask_equal_an_oracle_built_piece_by_piece(smol, marked, contents, system):
    conversation = chat(*contents, system=system or SYSTEM)
    ids, mask = chatml_oracle(smol, conversation.messages)
    for tokenizer in (smol, marked):
        row = encode(tokenizer, conversation)
        assert row.input_ids.tolist() == ids
        assert row.loss_mask.tolist() == mask


def test_multi_turn_with_the_default_system_prompt(smol):
    row = encode(smol, chat("Hi", "Hello!", "Bye", "See you."))
    assert marked_runs(smol, row) == ["Hello!<|im_end|>", "See you.<|im_end|>"]
    assert smol.tokenizer.decode(row.input_ids).startswith("<|im_start|>system\nYou are a helpful")


def test_content_that_looks_like_the_template_or_like_another_turn(smol):
    for content in ("Hi", "assistant", "user", "\n", "<|im_end|>\n<|im_start|>assistant\nHi", "<|im_end|>"):
        conversation = chat("assistant", f"x{content}", "Hi", f"x{content}", f"x{content}", "last")
        row = encode(smol, conversation)
        ids, mask = chatml_oracle(smol, (conversation.messages))
        assert row.input_ids.tolist() == ids
        assert row.loss_mask.tolist() == mask


def test_ids_are_those_of_transformers(smol):
    conversation = chat("Wie heißt du? 🦜", "Ich heiße 👩‍👩‍👧.  ", "  ok", "\n\nJa ", system="Sei kurz.")
    expected = smol.tokenizer.apply_chat_template(list(conversation.messages), return_dict=False)
    assert encode(smol, conversation).input_ids.tolist() == expected


def test_an_unanswered_conversation_is_its_prompt(smol):
    conversation = chat("Hi", "Hello!", "Who are you?")
    row = encode(smol, conversation)
    expected = smol.tokenizer.apply_chat_template(
        list(conversation.messages), add_generation_prompt=True, return_dict=False
    )
    assert row.loss_mask is None
    assert row.input_ids.tolist() == expected
    assert smol.tokenizer.decode(row.input_ids).endswith("<|im_start|>assistant\n")


def test_last_turn_only(smol, marked):
    for tokenizer in (smol, marked):
        row = encode(tokenizer, chat("Hi", "Hello!", "Bye", "See you 🦜"), last_turn_only=True)
        assert marked_runs(tokenizer, row) == ["See you 🦜<|im_end|>"]


def test_a_whole_batch_comes_back_in_order(smol):
    contents = [("a", "bb"), ("only asked",), ("c", "dd", "e", "ff")]
    rows = smol.encode([chat(*c) for c in contents])
    assert [marked_runs(smol, rows[i]) for i in (0, 2)] == [["bb<|im_end|>"], ["dd<|im_end|>", "ff<|im_end|>"]]
    assert rows[1].loss_mask is None


def test_markers_decide_what_counts(target_path):
    template = (TEMPLATES / "markers.jinja").read_text()
    without_end = template.replace(" + '<|im_end|>' }}{% endgeneration %}", " }}{% endgeneration %}{{ '<|im_end|>' }}")
    assert without_end != template
    tokenizer = ChatTokenizer(target_path, without_end)
    assert marked_runs(tokenizer, encode(tokenizer, chat("Hi", "parrot 🦜"))) == ["parrot 🦜"]


def test_trimming_templates_and_contents_with_white_space(target_path):
    tokenizer = ChatTokenizer(target_path, str(TEMPLATES / "strict.jinja"))
    row = encode(tokenizer, chat("Hi", "  Hello!\n\n", " Bye ", "\tSo long "))
    assert marked_runs(tokenizer, row) == ["Hello!<|im_end|>", "So long<|im_end|>"]


def test_thoughts_that_the_template_keeps_only_in_the_last_turn(target_path):
    tokenizer = ChatTokenizer(target_path, str(TEMPLATES / "thinking.jinja"))
    row = encode(tokenizer, chat("1+1?", "<think>easy</think>Two", "2+2?", "<think>\nharder\n</think>\n\nFour"))
    assert marked_runs(tokenizer, row) == ["<think>\nharder\n</think>\n\nFour<|im_end|>"]
    assert row.changes == (CUT,)
    row = encode(tokenizer, chat("1+1?", "Two", "2+2?", "<think>easy</think>Four"))
    assert marked_runs(tokenizer, row) == ["Two<|im_end|>", "<think>\neasy\n</think>\n\nFour<|im_end|>"]
    assert not row.changes


@pytest.fixture(scope="module")
def qwen3(target_path) -> ChatTokenizer:
    return ChatTokenizer(target_path, str(TEMPLATES / "qwen3.jinja"))


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "id": "1", "function": {"name": "weather", "arguments": {"town": "Oslo"}}}
CALLED = '<tool_call>\n{"name": "weather", "arguments": {"town": "Oslo"}}\n</tool_call><|im_end|>'


def tool_use(**first: object) -> Conversation:
    messages = (
        {"role": "user", "content": "Weather in Oslo?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL], **first},
        {"role": "tool", "tool_call_id": "1", "content": "12 degrees, rain"},
        {"role": "assistant", "content": "Twelve degrees and rain."},
    )
    return Conversation("c", messages, (TOOL,))


def test_calls_of_tools_are_learnt_and_their_replies_are_not(qwen3):
    row = encode(qwen3, tool_use())
    assert marked_runs(qwen3, row) == [CALLED, "Twelve degrees and rain.<|im_end|>"]
    assert json.dumps(TOOL) in qwen3.tokenizer.decode(row.input_ids)
    row = encode(qwen3, tool_use(content="I look.", tool_calls=[CALL, CALL], reasoning_content="Need it."))
    call = CALLED.removesuffix("<|im_end|>")
    thought = f"<think>\nNeed it.\n</think>\n\nI look.\n{call}\n{call}<|im_end|>"
    assert marked_runs(qwen3, row) == [thought, "Twelve degrees and rain.<|im_end|>"]
    assert marked_runs(qwen3, encode(qwen3, tool_use(), last_turn_only=True)) == ["Twelve degrees and rain.<|im_end|>"]
    assert not row.changes


def test_ids_of_calls_are_shortened_where_the_template_takes_no_others(target_path):
    strict = (
        "{{ tools | tojson }}{% for m in messages %}{% for c in m.tool_calls or [] %}"
        "{% if c.id | length != 9 %}{{ raise_exception('id') }}"
        "{% endif %}{{ c.function.name + c.function.arguments | tojson + '#' + c.id }}{% endfor %}{{ m.content }}"
        "{% if m.role == 'tool' %}{{ '@' + m.tool_call_id }}{% endif %}<|im_end|>{% endfor %}"
    )
    tokenizer, texts = ChatTokenizer(target_path, strict), []
    for call_id in ("call_AbCdEfGhIjKlMnOp", "Abc123xyz", None):
        call = {**CALL, "id": call_id} if call_id else {"type": "function", "function": CALL["function"]}
        asked, calling, reply, answer = tool_use(tool_calls=[call]).messages
        reply = {"role": "tool", "content": reply["content"]} | ({"tool_call_id": call_id} if call_id else {})
        row = encode(tokenizer, Conversation("c", (asked, calling, reply, answer), (TOOL,)))
        texts.append(tokenizer.tokenizer.decode(row.input_ids))
    ids = [re.findall(r"#(\w+)<.*?@(\w+)<", text)[0] for text in texts]
    assert all(of_call == of_reply and len(of_call) == 9 for of_call, of_reply in ids)
    assert ids[1][0] == "Abc123xyz" and len({of_call for of_call, _ in ids}) == 3


def test_a_template_that_takes_arguments_as_text(target_path):
    text = (TEMPLATES / "qwen3.jinja").read_text()
    wants_text = text.replace("tool_call.arguments | tojson", "'' + tool_call.arguments")
    assert wants_text != text
    tokenizer = ChatTokenizer(target_path, wants_text)
    assert marked_runs(tokenizer, encode(tokenizer, tool_use()))[0] == CALLED


@pytest.mark.parametrize(
    ("conversation", "what"),
    [
        (tool_use(), "tools"),
        (Conversation("c", tool_use().messages), "tool_calls"),
        (Conversation("c", (tool_use().messages[0], tool_use().messages[2])), "turns of tools"),
        (Conversation("c", tool_use(reasoning_content="x", tool_calls=[]).messages[:2]), "tool_calls"),
    ],
)
def test_what_the_template_has_no_place_for_is_refused_by_name(smol, conversation, what):
    (row,) = smol.encode([conversation])
    assert row == Refusal(f"the chat template leaves out {what}: set data.chat_template to one that prints them")


def test_thoughts_reach_the_template_and_a_turn_without_its_own_is_not_learnt(qwen3, smol):
    thoughts = [{"reasoning_content": "Two and two are four."}, {"reasoning_content": "Three and three are six."}]
    plain = chat("2+2?", "4", "3+3?", "6").messages
    whole = (plain[0], plain[1] | thoughts[0], plain[2], plain[3] | thoughts[1])
    row = encode(qwen3, Conversation("c", whole))
    assert marked_runs(qwen3, row) == ["<think>\nThree and three are six.\n</think>\n\n6<|im_end|>"]
    assert row.changes == (CUT,)
    row = encode(qwen3, Conversation("c", plain))  # the empty thoughts are the template's
    assert marked_runs(qwen3, row) == ["4<|im_end|>", "6<|im_end|>"]
    assert not row.changes
    (refused,) = smol.encode([Conversation("c", whole)])
    assert refused.reason.startswith("the chat template leaves out thoughts (reasoning_content): ")


def test_markers_around_a_turn_that_is_cut(target_path):
    marked = (
        "{% for message in messages %}{% if message.role == 'user' %}{{ '<|im_start|>user\n' + message.content }}"
        "{% else %}{{ '<|im_start|>assistant\n' }}{% generation %}"
        "{{ message.content if loop.last else message.content.split('</think>')[-1] }}"
        "{% endgeneration %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    )
    tokenizer = ChatTokenizer(target_path, marked)
    row = encode(tokenizer, chat("1+1?", "<think>easy</think>Two", "2+2?", "<think>hm</think>Four"))
    assert marked_runs(tokenizer, row) == ["<think>hm</think>Four"]
    assert row.changes == (CUT,)


def test_a_developer_is_a_system_where_the_template_knows_none(smol, target_path):
    messages = ({"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"})
    developer = Conversation("c", messages)
    system = Conversation("c", (messages[0] | {"role": "system"}, messages[1]))
    assert encode(smol, developer).input_ids.tolist() == encode(smol, system).input_ids.tolist()
    knows = ChatTokenizer(target_path, "{# developer #}" + smol.template.text)
    assert "<|im_start|>developer\nBe brief." in knows.tokenizer.decode(encode(knows, developer).input_ids)


def test_a_system_prompt_that_the_template_moves_to_the_last_question(target_path):
    tokenizer = ChatTokenizer(target_path, str(TEMPLATES / "late_system.jinja"))
    row = encode(tokenizer, chat("Hi", "Hello!", "Bye", "See you.", system="Be kind."))
    assert "user\nBe kind.\nBye<|im_end|>" in tokenizer.tokenizer.decode(row.input_ids)
    assert marked_runs(tokenizer, row) == ["Hello!<|im_end|>", "See you.<|im_end|>"]


LATE_TOOLS = """
{%- for message in messages %}{% if message.role == 'user' %}
{%- set questions = messages | selectattr('role', 'equalto', 'user') | list %}
{%- if message == questions[-1] %}{{ '[TOOLS]' + tools | tojson }}{% endif %}
{{- '[INST] ' + message.content + '[/INST]' }}
{%- elif message.role == 'tool' %}{{ '[' + ns.called + '] ' + message.content + '[/]' }}
{%- elif message.tool_calls %}{% set ns.called = message.tool_calls[0].function.name %}
{{- '<|im_start|>' + ns.called + message.tool_calls[0].function.arguments | tojson + '<|im_end|>' }}
{%- else %}{{ ' ' + message.content + '<|im_end|>' }}{% endif %}{% endfor %}"""
"""Tools stand before the last question, so no earlier prompt is how the text begins; a call has no room for words, is
one alone, and is named again by the tool's reply: Mistral's and gpt-oss's habits."""


@pytest.fixture(scope="module")
def late_tools(target_path) -> ChatTokenizer:
    return ChatTokenizer(target_path, "{% set ns = namespace() %}" + LATE_TOOLS)


def test_calls_where_tools_stand_before_the_last_question(late_tools):
    asked_again = ({"role": "user", "content": "And now?"}, *tool_use().messages[1:])
    row = encode(late_tools, Conversation("c", (*tool_use().messages, *asked_again), (TOOL,)))
    once = ['<|im_start|>weather{"town": "Oslo"}<|im_end|>', " Twelve degrees and rain.<|im_end|>"]
    assert marked_runs(late_tools, row) == once * 2
    assert not row.changes


def test_a_turn_of_which_a_call_or_words_beside_it_are_left_out_is_not_learnt(late_tools):
    for first in ({"tool_calls": [CALL, CALL]}, {"content": "I look."}):
        row = encode(late_tools, tool_use(**first))
        assert marked_runs(late_tools, row) == [" Twelve degrees and rain.<|im_end|>"]
        assert row.changes == (CUT,)


def test_calls_where_the_prompt_holds_thoughts_that_are_not_printed_again(target_path):
    tokenizer = ChatTokenizer(target_path, str(TEMPLATES / "qwen3.jinja"), template_kwargs={"enable_thinking": False})
    assert tokenizer.template.prompt(tool_use().messages[:1]).endswith("assistant\n<think>\n\n</think>\n\n")
    row = encode(tokenizer, tool_use())
    assert marked_runs(tokenizer, row) == [CALLED, "Twelve degrees and rain.<|im_end|>"]
    (refused,) = tokenizer.encode([tool_use(reasoning_content="Need it.")])
    assert isinstance(refused, Refusal) and "leaves no room for its thoughts" in refused.reason


def test_a_template_that_rewrites_turns_is_refused_not_guessed(target_path):
    tokenizer = ChatTokenizer(target_path, str(TEMPLATES / "shouting.jinja"))
    answered, unanswered = tokenizer.encode([chat("Hi", "Hello!"), chat("Hi")])
    assert isinstance(answered, Refusal)
    assert "generation" in answered.reason
    assert isinstance(unanswered, Tokenized)


def test_what_the_template_refuses_is_rejected_with_its_words(target_path):
    tokenizer = ChatTokenizer(target_path, str(TEMPLATES / "strict.jinja"))
    (row,) = tokenizer.encode([chat("Hi", "Hello!", system="Be kind.")])
    assert row == Refusal("the chat template refuses it: no system turns, please")


def test_a_template_without_an_end_is_refused_in_one_line(target_path):
    tokenizer = ChatTokenizer(target_path, "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(messages) }}")
    (row,) = tokenizer.encode([chat("Hi", "Hello!")])
    assert isinstance(row, Refusal) and row.reason.startswith("the chat template refuses it: maximum recursion depth")


@pytest.fixture(scope="module")
def sentencepiece_like(tmp_path_factory) -> Path:
    """A Llama-like tokenizer: words carry their leading space, rare characters fall back to bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "<s>", "</s>"])
    tokenizer.train_from_iterator(["[INST] Hello there, how are you? [/INST] I am fine, thank you. " * 20], trainer)
    state = json.loads(tokenizer.to_str())
    vocab = state["model"]["vocab"]
    vocab.update({f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)})
    tokenizer = Tokenizer.from_str(json.dumps(state))
    folder = tmp_path_factory.mktemp("llama2")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = (TEMPLATES / "llama2.jinja").read_text()
    fast.save_pretrained(folder)
    return folder


def test_a_template_without_generation_prompt_and_with_a_system_prompt_inside_the_users_turn(sentencepiece_like):
    tokenizer = ChatTokenizer(sentencepiece_like)
    row = encode(tokenizer, chat("Hello there", "I am fine 🦜", "Hello", "🦜 thank you", system="how are you"))
    assert [run.strip() for run in marked_runs(tokenizer, row)] == ["I am fine 🦜 </s>", "🦜 thank you </s>"]
    first = np.flatnonzero(row.loss_mask)[0]
    assert tokenizer.tokenizer.decode(row.input_ids[:first]) == "<s>[INST] how are you\n\nHello there [/INST]"


def test_a_target_without_a_chat_template_names_the_knob(target_path, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(target_path / name, tmp_path / name)
    with pytest.raises(ValueError, match=r"no chat template: set data\.chat_template"):
        ChatTokenizer(tmp_path)
    tokenizer = ChatTokenizer(tmp_path, str(TEMPLATES / "markers.jinja"))
    assert marked_runs(tokenizer, encode(tokenizer, chat("Hi", "Hello!"))) == ["Hello!<|im_end|>"]


def test_bad_settings_are_named(target_path, tmp_path):
    with pytest.raises(ValueError, match=r"data\.chat_template .*nowhere\.jinja"):
        ChatTokenizer(target_path, str(tmp_path / "nowhere.jinja"))
    with pytest.raises(ValueError, match=r"data\.chat_template is not valid Jinja: .* \(line 1\)"):
        ChatTokenizer(target_path, "{% for message in messages %}")
    with pytest.raises(ValueError, match=r"target\.path .* is not a folder"):
        ChatTokenizer(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"target\.path .* has no tokenizer"):
        ChatTokenizer(tmp_path)


def test_a_slow_tokenizer_does_for_prompts_without_an_answer(target_path, monkeypatch):
    tokenizer, fast = ChatTokenizer(target_path), ChatTokenizer(target_path)
    monkeypatch.setattr(type(tokenizer.tokenizer), "is_fast", False)
    question = Conversation("q", ({"role": "user", "content": "Hi"},))
    answered = Conversation("a", (*question.messages, {"role": "assistant", "content": "Hello!"}))
    found, refused = tokenizer.encode([question, answered])
    assert isinstance(refused, Refusal) and "does not tell where its tokens are" in refused.reason
    monkeypatch.undo()
    (expected,) = fast.encode([question])
    assert np.array_equal(found.input_ids, expected.input_ids) and found.loss_mask is None
