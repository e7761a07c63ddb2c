r"""Conversations to token ids and assistant-only loss masks, through the target's own chat template.

A loss mask marks what the target would have generated itself: each assistant turn's text and the token that ends the
turn, never the header that opens it. Where the template has ``{% generation %}`` markers, they say so. Elsewhere the
turn is located exactly in the rendered text:

    ...<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\n...
                                         [     )              where sentinels around its content come out
                                         [               )    on through a special token that follows at once

The sentinels must leave the rest of the text as it was. A template that looks into the content (to part thoughts from
the answer) drops the one in front; then the turn starts where the prompt before it ends, generation prompt included.
Where that fails too, the conversation is rejected with that reason: no mask is a guess.

The text is tokenised once, as a server does it, and a token counts if it covers any character of a turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import jinja2
import numpy as np
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from torchspec.data.conversations import Conversation

Messages = Sequence[dict[str, str]]
Span = tuple[int, int]
SENTINEL = "\ue000torchspec\ue001"
"""Private-use characters: no template trims or splits at them."""
MARKER = re.compile(r"{%-?\s*generation\s*-?%}")


@dataclass(frozen=True, slots=True)
class Tokenized:
    """``input_ids`` int32 [S]; ``loss_mask`` bool [S], or None where the target has yet to answer."""

    input_ids: np.ndarray
    loss_mask: np.ndarray | None


@dataclass(frozen=True, slots=True)
class Refusal:
    reason: str


@dataclass(frozen=True, slots=True)
class _Rendered:
    text: str
    spans: list[Span] | None
    """Characters of the assistant's turns; None for an unanswered conversation."""


class ChatTokenizer:
    """The target's tokenizer and chat template.

    Args:
        path: folder of the target checkpoint.
        chat_template: Jinja text, or path of a file with it, instead of the tokenizer's own (``data.chat_template``).
        trust_remote_code: run tokenizer code that ships with the checkpoint.

    Raises:
        ValueError: no usable tokenizer, no chat template, or a template that is not Jinja.
    """

    def __init__(self, path: Path | str, chat_template: str | None = None, trust_remote_code: bool = False):
        if not Path(path).is_dir():
            raise ValueError(f"target.path {path} is not a folder")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"target.path {path} has no tokenizer that transformers can load: {reason}") from None
        self.template = self._pick_template(path, read_template(chat_template))
        self.has_markers = MARKER.search(self.template) is not None
        added = self.tokenizer.added_tokens_decoder.items()
        self._special_ids = np.array([token_id for token_id, token in added if token.special], dtype=np.int64)
        try:
            self.prompt_text([{"role": "user", "content": "Hi"}])
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"data.chat_template is not valid Jinja: {error.message} (line {error.lineno})") from None
        except jinja2.TemplateError:
            pass  # it may refuse this conversation and take others

    def prompt_text(self, messages: Messages) -> str:
        """What the target is asked to continue: ``messages`` and the generation prompt."""
        return self._render(messages, generation_prompt=True)[0]

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

    def _render(self, messages: Messages, generation_prompt: bool = False) -> tuple[str, list[Span]]:
        """Text, and the spans between ``{% generation %}`` markers."""
        texts, spans = render_jinja_template(
            conversations=[list(messages)],
            chat_template=self.template,
            add_generation_prompt=generation_prompt,
            return_assistant_tokens_mask=self.has_markers,
            **self.tokenizer.special_tokens_map,
        )
        return texts[0], spans[0] if spans else []

    def _render_conversation(self, conversation: Conversation, last_turn_only: bool) -> _Rendered | Refusal:
        messages = conversation.messages
        try:
            if not conversation.answered:
                return _Rendered(self.prompt_text(messages), None)
            if not self.tokenizer.is_fast:
                return Refusal(
                    "it has an answer, and the target's tokenizer (no tokenizer.json) does not tell where its tokens "
                    "are in the text: prompts without an answer can be trained on"
                )
            text, spans = self._render(messages)
            if self.has_markers:
                earlier = len(self._render(messages[:-1])[1])
            else:
                spans = self._locate_turns(messages, text)
                earlier = len(spans) - 1
        except jinja2.TemplateError as error:
            return Refusal(f"the chat template refuses it: {error}")
        if not spans:
            return Refusal(
                "the chat template rewrites its assistant turns, so they cannot be located exactly; put "
                "{% generation %} markers around them in a template of your own (data.chat_template)"
            )
        return _Rendered(text, spans[earlier:] if last_turn_only else spans)

    def _locate_turns(self, messages: Messages, text: str) -> list[Span]:
        """Spans of the assistant's turns in ``text``, the rendered ``messages``; empty where they cannot be told."""
        around = self._sentinels(messages, text, "{0}{1}{0}")
        if around:
            return list(zip(around[::2], around[1::2], strict=True))
        prompts = [self.prompt_text(messages[:i]) for i, m in enumerate(messages) if m["role"] == "assistant"]
        ends = self._sentinels(messages, text, "{1}{0}")
        if not ends or not all(map(text.startswith, prompts)):
            return []
        return list(zip(map(len, prompts), ends, strict=True))

    def _sentinels(self, messages: Messages, text: str, form: str) -> list[int]:
        """Where sentinels in the assistant's turns come out in ``text``; empty if they change or vanish.

        ``form`` places the sentinel ``{0}`` around the content ``{1}``, before trailing white space, which may be
        trimmed.
        """
        watched, expected = [], 0
        for message in messages:
            if message["role"] == "assistant":
                body = message["content"].rstrip()
                content = form.format(SENTINEL, body) + message["content"][len(body) :]
                message = message | {"content": content}
                expected += form.count("{0}")
            watched.append(message)
        pieces = self._render(watched)[0].split(SENTINEL)
        if len(pieces) != expected + 1 or "".join(pieces) != text:
            return []
        return list(accumulate(len(piece) for piece in pieces[:-1]))

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
        return Tokenized(input_ids, mask)


def read_template(chat_template: str | None) -> str | None:
    """The text of ``data.chat_template``, which is Jinja text itself or the path of a file.

    Raises:
        ValueError: neither.
    """
    if chat_template is None or "{%" in chat_template or "{{" in chat_template:
        return chat_template
    try:
        return Path(chat_template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"data.chat_template {chat_template} is neither Jinja text nor a readable file: {error}"
        ) from None
