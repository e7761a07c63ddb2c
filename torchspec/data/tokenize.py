r"""Conversations to token ids and assistant-only loss masks, through the target's own chat template.

A loss mask marks what the assistant wrote: each of its turns and the token that ends the turn, never the header that
opens it. Where the template has ``{% generation %}`` markers, they say so. Elsewhere a turn is located exactly in the
rendered text, by marks that are put into its parts and come out again:

    ...<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\n...
                                         [     )              where the marks around its content come out
                                         [               )    on through a special token that follows at once

The marks must leave the rest of the text as it was. Where none can stand in front (a template that looks into the
content to part thoughts from the answer drops it), the turn starts behind what the generation prompt would put there.
Tool calls without text start where text before them would, and end as they do where the conversation ends with them.
Where that fails too, the conversation is rejected with that reason: no mask is a guess. A turn of which the template
cuts a part (thoughts of earlier turns) carries no loss: the target would not have written the rest by itself.

The text is tokenised once, as a server does it, and a token counts if it covers any character of a turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from torchspec.data.conversations import Conversation, Message, printable
from torchspec.data.marks import Marks, is_whole, mark, take_out, thinks, with_marks

Messages = Sequence[Message]
Tools = Sequence[dict[str, Any]]
Span = tuple[int, int]
SENTINEL = "\ue000torchspec\ue001"
"""Private-use characters: no template trims or splits at them."""
MARKER = re.compile(r"{%-?\s*generation\s*-?%}")
OUR_ARGUMENTS = frozenset(
    ("conversations", "chat_template", "add_generation_prompt", "return_assistant_tokens_mask", "messages", "tools")
)
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, RecursionError)
"""What a template does to a conversation that it was not written for."""
CUT = "turns that the chat template does not print whole carry no loss"


@dataclass(frozen=True, slots=True)
class Tokenized:
    """``input_ids`` int32 [S]; ``loss_mask`` bool [S], or None where the target has yet to answer."""

    input_ids: np.ndarray
    loss_mask: np.ndarray | None
    changes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Refusal:
    reason: str


@dataclass(frozen=True, slots=True)
class _Rendered:
    text: str
    spans: list[Span] | None
    """Characters of the assistant's turns; None for an unanswered conversation."""
    changes: tuple[str, ...] = ()


class _CannotTell(Exception):
    """Where the assistant's turns are in the text."""


class ChatTokenizer:
    """The target's tokenizer and chat template.

    Args:
        path: folder of the target checkpoint.
        chat_template: Jinja text, or path of a file with it, instead of the tokenizer's own (``data.chat_template``).
        trust_remote_code: run tokenizer code that ships with the checkpoint.
        template_kwargs: more arguments of the template (``data.template_kwargs``).

    Raises:
        ValueError: no usable tokenizer, no chat template, or a template that is not Jinja.
    """

    def __init__(
        self,
        path: Path | str,
        chat_template: str | None = None,
        trust_remote_code: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ):
        if not Path(path).is_dir():
            raise ValueError(f"target.path {path} is not a folder")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"target.path {path} has no tokenizer that transformers can load: {reason}") from None
        self.template = self._pick_template(path, read_template(chat_template))
        self._kwargs = dict(template_kwargs or {})
        if ours := OUR_ARGUMENTS & self._kwargs.keys():
            raise ValueError(f"data.template_kwargs: {', '.join(sorted(ours))} cannot be set, conversations do that")
        self.has_markers = MARKER.search(self.template) is not None
        special = {token_id: token for token_id, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        self._special_ids = np.array(list(special), dtype=np.int64)
        self._special_texts = tuple(token.content for token in special.values())
        try:
            self.prompt_text([{"role": "user", "content": "Hi"}])
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"data.chat_template is not valid Jinja: {error.message} (line {error.lineno})") from None
        except TEMPLATE_ERRORS:
            pass  # it may refuse this conversation and take others

    def prompt_text(self, messages: Messages, tools: Tools = ()) -> str:
        """What the target is asked to continue: ``messages`` and the generation prompt."""
        return self._render(messages, tools, generation_prompt=True)[0]

    def encode(self, conversations: Sequence[Conversation], last_turn_only: bool = False) -> list[Tokenized | Refusal]:
        """Tokenise a batch, in order. What the template refuses comes back as a :class:`Refusal`."""
        rendered = [self._render_conversation(c, last_turn_only) for c in conversations]
        texts = [r.text for r in rendered if isinstance(r, _Rendered)]
        encoded: Iterator[tuple[list[int], list[Span]]] = iter(())
        if texts:
            options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
            batch = self.tokenizer(texts, return_offsets_mapping=self.tokenizer.is_fast, **options)
            encoded = zip(batch["input_ids"], batch.get("offset_mapping", [[]] * len(texts)), strict=True)
        return [self._mask(r, *next(encoded)) if isinstance(r, _Rendered) else r for r in rendered]

    def _pick_template(self, path: Path | str, override: str | None) -> str:
        if override is not None:
            return override
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer in {path} has no chat template: set data.chat_template to one (Jinja text or a path)"
            )
        return str(self.tokenizer.get_chat_template())

    def _render(self, messages: Messages, tools: Tools = (), generation_prompt: bool = False) -> tuple[str, list[Span]]:
        """Text, and the spans between ``{% generation %}`` markers."""
        texts, spans = render_jinja_template(
            conversations=[list(messages)],
            tools=list(tools) or None,
            chat_template=self.template,
            add_generation_prompt=generation_prompt,
            return_assistant_tokens_mask=self.has_markers,
            **{**self.tokenizer.special_tokens_map, **self._kwargs},
        )
        return texts[0], spans[0] if spans else []

    def _render_conversation(self, conversation: Conversation, last_turn_only: bool) -> _Rendered | Refusal:
        if missing := self._left_out(conversation):
            return Refusal(f"the chat template leaves out {missing}: set data.chat_template to one that prints them")
        messages, tools = self._adapted(conversation.messages), conversation.tools
        try:
            if not conversation.answered:
                return _Rendered(self.prompt_text(messages, tools), None)
            if not self.tokenizer.is_fast:
                return Refusal(
                    "it has an answer, and the target's tokenizer (no tokenizer.json) does not tell where its tokens "
                    "are in the text: prompts without an answer can be trained on"
                )
            text, spans = self._render(messages, tools)
            if self.has_markers:
                turns = self._marked_turns(messages, tools, text, spans, last_turn_only)
            else:
                turns = self._locate_turns(messages, tools, text)[-1 if last_turn_only else 0 :]
        except _CannotTell:
            return Refusal(
                "the chat template rewrites its assistant turns, so they cannot be located exactly: put "
                "{% generation %} markers around them in a template of your own (data.chat_template)"
            )
        except TEMPLATE_ERRORS as error:
            return Refusal(f"the chat template refuses it: {printable(str(error))}")
        kept = [span for span in turns if span is not None]
        if not kept:
            return Refusal("the chat template prints no assistant turn whole: there is nothing to learn from")
        return _Rendered(text, kept, (CUT,) if None in turns else ())

    # ---- what the template has a place for ----

    def _left_out(self, conversation: Conversation) -> str:
        """What of ``conversation`` the template would drop; empty if nothing."""
        messages = conversation.messages
        if conversation.tools and not self._prints_tools:
            return "tools"
        if any("tool_calls" in message for message in messages) and self._call_form is None:
            return "tool_calls"
        if any(message["role"] == "tool" for message in messages) and not self._prints_replies:
            return "turns of tools"
        if any("reasoning_content" in message for message in messages) and not self._prints_thoughts:
            return "thoughts (reasoning_content)"
        return ""

    def _adapted(self, messages: Messages) -> list[Message]:
        """``messages`` as this template wants them: it may know no developer, or take arguments of calls as text."""
        knows_developer, adapted = "developer" in self.template, []
        for message in messages:
            if message["role"] == "developer" and not knows_developer:
                message = message | {"role": "system"}
            if "tool_calls" in message and self._call_form is str:
                message = message | {"tool_calls": [_with_text_arguments(call) for call in message["tool_calls"]]}
            adapted.append(message)
        return adapted

    @cached_property
    def _prints_tools(self) -> bool:
        parameters = {"type": "object", "properties": {}, "required": []}
        function = {"name": SENTINEL, "description": "It tells.", "parameters": parameters}
        return self._shows([ASKED], [{"type": "function", "function": function}])

    @cached_property
    def _call_form(self) -> type | None:
        """How the template takes a call's arguments: as an object, as text, or it prints no calls."""
        if self._shows([ASKED, _calling({"of": SENTINEL}), REPLIED]):
            return dict
        return str if self._shows([ASKED, _with_text(_calling({"of": SENTINEL})), REPLIED]) else None

    @cached_property
    def _prints_replies(self) -> bool:
        calling = _calling({}) if self._call_form is dict else _with_text(_calling({}))
        return self._call_form is not None and self._shows([ASKED, calling, REPLIED | {"content": SENTINEL}])

    @cached_property
    def _prints_thoughts(self) -> bool:
        return self._shows([ASKED, {"role": "assistant", "content": "It is.", "reasoning_content": SENTINEL}])

    def _shows(self, messages: Messages, tools: Tools = ()) -> bool:
        try:
            return SENTINEL in self._render(messages, tools)[0]
        except TEMPLATE_ERRORS:
            return False

    # ---- where the assistant's turns are ----

    def _marked_turns(
        self, messages: Messages, tools: Tools, text: str, spans: Sequence[Span], last_turn_only: bool
    ) -> list[Span | None]:
        """The template's own ``spans``; None in the place of turns that it cuts.

        Raises:
            _CannotTell: it marks none, or they cannot be told apart where one may be cut.
        """
        numbers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if last_turn_only:
            spans, numbers = spans[len(self._render(messages[:-1], tools)[1]) :], numbers[-1:]
        may_be_cut = any(thinks(messages[i]) for i in numbers)
        marks = self._marks(messages, tools, text, with_starts=False) if may_be_cut else {}
        if not spans or marks is None or (may_be_cut and len(spans) != len(numbers)):
            raise _CannotTell
        if not may_be_cut:
            return list(spans)
        return [span if is_whole(messages[i], i, marks) else None for i, span in zip(numbers, spans, strict=True)]

    def _locate_turns(self, messages: Messages, tools: Tools, text: str) -> list[Span | None]:
        """Spans of the assistant's turns in ``text``, the rendered ``messages``; None for those that it cuts.

        Raises:
            _CannotTell: of a turn that is whole.
        """
        marks = self._marks(messages, tools, text, with_starts=True)
        if marks is None:
            marks = self._marks(messages, tools, text, with_starts=False)
        if marks is None:
            raise _CannotTell
        spans: list[Span | None] = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                spans.append(self._locate(messages, i, tools, text, marks) if is_whole(message, i, marks) else None)
        return spans

    def _locate(self, messages: Messages, number: int, tools: Tools, text: str, marks: Marks) -> Span:
        """Span of the turn of that ``number``."""
        turn, calls = messages[number], len(messages[number].get("tool_calls", ()))
        start, end = marks.get((number, "start")), marks.get((number, "end"))
        if "reasoning_content" in turn:
            start = self._behind_prompt(messages, number, tools, text)
        elif start is None and calls:
            start = self._before_calls(messages, number, tools, text, marks)
        if start is None:
            start = self._behind_prompt(messages, number, tools, text)
        if end is None or calls:
            place = number, f"call{calls - 1}"
            tail, called = self._behind_calls(messages[: number + 1], tools, place), marks[place]
            if not text.startswith(tail, called):
                raise _CannotTell
            last = next((token for token in self._special_texts if tail.endswith(token)), "")
            end = called + len(tail) - len(last)  # which counts as it follows at once
        return start, end

    def _before_calls(self, messages: Messages, number: int, tools: Tools, text: str, marks: Marks) -> int | None:
        """Where text before the turn's calls would start; None where the template has no place for it."""
        probe = messages[number] | {"content": mark(number, "start")}
        probed, found = take_out(self._render([*messages[:number], probe, *messages[number + 1 :]], tools)[0])
        start = (found or {}).get((number, "start"))
        if start is None or start > marks[number, "call0"] or not text.startswith(probed[:start]):
            return None
        return start

    def _behind_prompt(self, messages: Messages, number: int, tools: Tools, text: str) -> int:
        """Where the prompt of the turn ends. Templates that put tools or the system's turn before the last question
        write an earlier prompt otherwise than ``text`` begins, but not what stands between two turns."""
        before = number - 1
        asked, place = with_marks(messages[before], before, with_start=False), (before, "end")
        prompt, in_prompt = take_out(self.prompt_text([*messages[:before], asked], tools))
        whole, in_text = take_out(self._render([*messages[:before], asked, *messages[number:]], tools)[0])
        at = 0
        if whole == text and in_prompt and in_text and place in in_prompt and place in in_text:
            prompt, at = prompt[in_prompt[place] :], in_text[place]
        if not text.startswith(prompt, at):
            raise _CannotTell
        return at + len(prompt)

    def _behind_calls(self, messages: Messages, tools: Tools, place: tuple[int, str]) -> str:
        """The end of the text of ``messages``, from where the last tool that is called has been named."""
        marked = [*messages[:-1], with_marks(messages[-1], len(messages) - 1, with_start=False)]
        text, marks = take_out(self._render(marked, tools)[0])
        if marks is None or place not in marks:
            raise _CannotTell
        return text[marks[place] :].rstrip()

    def _marks(self, messages: Messages, tools: Tools, text: str, with_starts: bool) -> Marks | None:
        """Where marks in the assistant's turns come out in ``text``; None if they change it, or come out twice."""
        watched = [
            with_marks(message, i, with_starts) if message["role"] == "assistant" else message
            for i, message in enumerate(messages)
        ]
        rest, marks = take_out(self._render(watched, tools)[0])
        return marks if rest == text else None

    def _mask(self, rendered: _Rendered, ids: list[int], offsets: list[Span]) -> Tokenized:
        input_ids = np.array(ids, dtype=np.int32)
        if rendered.spans is None:
            return Tokenized(input_ids, None)
        starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
        special = np.isin(input_ids, self._special_ids)
        mask = np.zeros(len(ids), dtype=bool)
        for start, end in rendered.spans:
            if not self.has_markers:
                following = np.flatnonzero(special & (starts >= end))[:1]
                if following.size and not rendered.text[end : starts[following[0]]].strip():
                    end = ends[following[0]]
            mask |= (starts < end) & (ends > start)
        return Tokenized(input_ids, mask, rendered.changes)


ASKED = {"role": "user", "content": "Is it so?"}
REPLIED = {"role": "tool", "name": "tell", "tool_call_id": "call00001", "content": "It is so."}


def _calling(arguments: dict[str, Any]) -> Message:
    """A turn that calls a tool; some templates want an id of nine letters and digits."""
    call = {"id": "call00001", "type": "function", "function": {"name": "tell", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _with_text(message: Message) -> Message:
    return message | {"tool_calls": [_with_text_arguments(call) for call in message["tool_calls"]]}


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return call | {"function": call["function"] | {"arguments": arguments}}


def template_file(chat_template: str | None) -> Path | None:
    """The file that ``data.chat_template`` names; None where it is Jinja text itself."""
    if chat_template is None or "{%" in chat_template or "{{" in chat_template:
        return None
    return Path(chat_template)


def read_template(chat_template: str | None) -> str | None:
    """The text of ``data.chat_template``, which is Jinja text itself or the path of a file.

    Raises:
        ValueError: neither.
    """
    file = template_file(chat_template)
    try:
        return chat_template if file is None else file.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"data.chat_template {chat_template} is neither Jinja text nor a readable file: {error}"
        ) from None
