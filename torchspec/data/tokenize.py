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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from torchspec.data.chat_template import TEMPLATE_ERRORS, ChatTemplate, Messages, Span, Tools, read_template
from torchspec.data.conversations import Conversation, printable
from torchspec.data.marks import Marks, is_whole, mark, take_out, thinks, with_marks

CUT = "turns that the chat template does not print whole carry no loss"
REWRITTEN = (
    "the chat template rewrites its assistant turns, so they cannot be located exactly: put {% generation %} markers "
    "around them in a template of your own (data.chat_template)"
)
THOUGHTLESS = (
    "the prompt of its turn leaves no room for its thoughts (reasoning_content): data.template_kwargs may have "
    "switched them off"
)


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

    def __init__(self, reason: str = REWRITTEN):
        super().__init__(reason)


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
        text = self._pick_template(path, read_template(chat_template))
        self.template = ChatTemplate(text, self.tokenizer.special_tokens_map | dict(template_kwargs or {}))
        special = {token_id: token for token_id, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        self._special_ids = np.array(list(special), dtype=np.int64)
        self._special_texts = tuple(token.content for token in special.values())

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

    def _render_conversation(self, conversation: Conversation, last_turn_only: bool) -> _Rendered | Refusal:
        if missing := self.template.left_out(conversation):
            return Refusal(f"the chat template leaves out {missing}: set data.chat_template to one that prints them")
        messages, tools = self.template.adapted(conversation.messages), conversation.tools
        try:
            if not conversation.answered:
                return _Rendered(self.template.prompt(messages, tools), None)
            if not self.tokenizer.is_fast:
                return Refusal(
                    "it has an answer, and the target's tokenizer (no tokenizer.json) does not tell where its tokens "
                    "are in the text: prompts without an answer can be trained on"
                )
            text, spans = self.template.render(messages, tools)
            if self.template.has_markers:
                turns = self._marked_turns(messages, tools, text, spans, last_turn_only)
            else:
                turns = self._locate_turns(messages, tools, text)[-1 if last_turn_only else 0 :]
        except _CannotTell as error:
            return Refusal(str(error))
        except TEMPLATE_ERRORS as error:
            return Refusal(f"the chat template refuses it: {printable(str(error))}")
        kept = [span for span in turns if span is not None]
        if not kept:
            return Refusal("the chat template prints no assistant turn whole: there is nothing to learn from")
        return _Rendered(text, kept, (CUT,) if None in turns else ())

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
            spans, numbers = spans[len(self.template.render(messages[:-1], tools)[1]) :], numbers[-1:]
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
        probed, found = take_out(self.template.render([*messages[:number], probe, *messages[number + 1 :]], tools)[0])
        start = (found or {}).get((number, "start"))
        if start is None or start > marks[number, "call0"] or not text.startswith(probed[:start]):
            return None
        return start

    def _behind_prompt(self, messages: Messages, number: int, tools: Tools, text: str) -> int:
        """Where the prompt of the turn ends. Templates that put tools or the system's turn before the last question
        write an earlier prompt otherwise than ``text`` begins, but not what stands between two turns."""
        before = number - 1
        asked, place = with_marks(messages[before], before, with_start=False), (before, "end")
        prompt, in_prompt = take_out(self.template.prompt([*messages[:before], asked], tools))
        whole, in_text = take_out(self.template.render([*messages[:before], asked, *messages[number:]], tools)[0])
        at = 0
        if whole == text and in_prompt and in_text and place in in_prompt and place in in_text:
            prompt, at = prompt[in_prompt[place] :], in_text[place]
        if not text.startswith(prompt, at):
            raise _CannotTell(THOUGHTLESS if "reasoning_content" in messages[number] else REWRITTEN)
        return at + len(prompt)

    def _behind_calls(self, messages: Messages, tools: Tools, place: tuple[int, str]) -> str:
        """The end of the text of ``messages``, from where the last tool that is called has been named."""
        marked = [*messages[:-1], with_marks(messages[-1], len(messages) - 1, with_start=False)]
        text, marks = take_out(self.template.render(marked, tools)[0])
        if marks is None or place not in marks:
            raise _CannotTell
        return text[marks[place] :].rstrip()

    def _marks(self, messages: Messages, tools: Tools, text: str, with_starts: bool) -> Marks | None:
        """Where marks in the assistant's turns come out in ``text``; None if they change it, or come out twice."""
        watched = [
            with_marks(message, i, with_starts) if message["role"] == "assistant" else message
            for i, message in enumerate(messages)
        ]
        rest, marks = take_out(self.template.render(watched, tools)[0])
        return marks if rest == text else None

    def _mask(self, rendered: _Rendered, ids: list[int], offsets: list[Span]) -> Tokenized:
        input_ids = np.array(ids, dtype=np.int32)
        if rendered.spans is None:
            return Tokenized(input_ids, None)
        starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
        special = np.isin(input_ids, self._special_ids)
        mask = np.zeros(len(ids), dtype=bool)
        for start, end in rendered.spans:
            if not self.template.has_markers:
                following = np.flatnonzero(special & (starts >= end))[:1]
                if following.size and not rendered.text[end : starts[following[0]]].strip():
                    end = ends[following[0]]
            mask |= (starts < end) & (ends > start)
        return Tokenized(input_ids, mask, rendered.changes)
