"""A chat template: what it makes of messages, and what it has no place for.

A template drops in silence what it was not written for, so that is tried with messages that hold a sentinel. Where it
wants the same in another form (arguments of calls as text, ids of calls as Mistral's, no developer), they are adapted.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from torchspec.data.conversations import Conversation, Message

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
SHORT_ID = re.compile("[A-Za-z0-9]{9}")
"""What Mistral's templates take for the id of a call."""


class ChatTemplate:
    """A template with its arguments.

    Args:
        text: Jinja.
        arguments: of the template, beside messages and tools.
    """

    def __init__(self, text: str, arguments: Mapping[str, Any]):
        if ours := OUR_ARGUMENTS & arguments.keys():
            raise ValueError(f"data.template_kwargs: {', '.join(sorted(ours))} cannot be set, conversations do that")
        self.text, self._arguments = text, arguments
        self.has_markers = MARKER.search(text) is not None
        try:
            self.prompt([{"role": "user", "content": "Hi"}])
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"data.chat_template is not valid Jinja: {error.message} (line {error.lineno})") from None
        except TEMPLATE_ERRORS:
            pass  # it may refuse this conversation and take others

    def prompt(self, messages: Messages, tools: Tools = ()) -> str:
        """What the target is asked to continue: ``messages`` and the generation prompt."""
        return self.render(messages, tools, generation_prompt=True)[0]

    def render(self, messages: Messages, tools: Tools = (), generation_prompt: bool = False) -> tuple[str, list[Span]]:
        """Text, and the spans between ``{% generation %}`` markers."""
        texts, spans = render_jinja_template(
            conversations=[list(messages)],
            tools=list(tools) or None,
            chat_template=self.text,
            add_generation_prompt=generation_prompt,
            return_assistant_tokens_mask=self.has_markers,
            **self._arguments,
        )
        return texts[0], spans[0] if spans else []

    def left_out(self, conversation: Conversation) -> str:
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

    def adapted(self, messages: Messages) -> list[Message]:
        """``messages`` as this template wants them: it may know no developer, or take arguments of calls as text."""
        knows_developer, adapted = "developer" in self.text, []
        for message in messages:
            if message["role"] == "developer" and not knows_developer:
                message = message | {"role": "system"}
            if "tool_calls" in message and self._call_form is str:
                message = message | {"tool_calls": [_with_text_arguments(call) for call in message["tool_calls"]]}
            adapted.append(_with_short_ids(message) if self._wants_short_ids else message)
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
        return self._call_form is not None and self._shows(self._dialogue("call00001"))

    @cached_property
    def _wants_short_ids(self) -> bool:
        """Whether it refuses the ids that OpenAI's calls have."""
        return self._prints_replies and not self._shows(self._dialogue("call_AbCdEfGhIjKlMnOpQrStUvWx"))

    def _dialogue(self, name: str) -> Messages:
        """With a call of that id, and a reply to look for."""
        calling = _calling({}) if self._call_form is dict else _with_text(_calling({}))
        calls = [call | {"id": name} for call in calling["tool_calls"]]
        return [ASKED, calling | {"tool_calls": calls}, REPLIED | {"content": SENTINEL, "tool_call_id": name}]

    @cached_property
    def _prints_thoughts(self) -> bool:
        return self._shows([ASKED, {"role": "assistant", "content": "It is.", "reasoning_content": SENTINEL}])

    def _shows(self, messages: Messages, tools: Tools = ()) -> bool:
        try:
            return SENTINEL in self.render(messages, tools)[0]
        except TEMPLATE_ERRORS:
            return False


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


def _with_short_ids(message: Message) -> Message:
    if "tool_calls" in message:
        return message | {"tool_calls": [call | {"id": _short_id(call.get("id"))} for call in message["tool_calls"]]}
    return message | {"tool_call_id": _short_id(message.get("tool_call_id"))} if message["role"] == "tool" else message


def _short_id(name: Any) -> str:
    """One of Mistral's for any other, the same for the same."""
    name = str(name)
    return name if SHORT_ID.fullmatch(name) else hashlib.sha256(name.encode()).hexdigest()[:9]


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
