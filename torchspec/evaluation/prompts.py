"""The prompts of an evaluation: any prompt set of the data layer, with the categories it names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torchspec.data.conversations import Conversation, read_conversations, require_clean
from torchspec.data.prompt_sources import find_files
from torchspec.data.tokenize import ChatTokenizer, Refusal


@dataclass(frozen=True, slots=True)
class EvaluationPrompt:
    """A conversation up to the turn that the target has to write."""

    id: str
    category: str | None
    input_ids: tuple[int, ...]


def load_prompts(source: str, chat: ChatTokenizer, cache_dir: Path, limit: int | None = None) -> list[EvaluationPrompt]:
    """Tokenise the first ``limit`` conversations of ``source`` as a chat server does; a given last answer is left out.

    Args:
        source: path, glob, ``builtin:heldout``, ``builtin:mtbench``, ``builtin:humaneval``.

    Raises:
        ValueError: nothing at ``source``, a bad line, or a conversation that the chat template refuses.
    """
    files = find_files(source, cache_dir, "the prompt set")
    require_clean(files, limit)
    conversations = [c for c in read_conversations(files, limit) if isinstance(c, Conversation)]
    if not conversations:
        raise ValueError(f"the prompt set {source} holds no conversation")
    questions = [Conversation(c.id, c.messages[:-1] if c.answered else c.messages) for c in conversations]
    # A conversation keeps no category. All lines are clean so far, so each is a line, and lines behind the limit wait.
    rows = (json.loads(line) for file in files for line in file.read_bytes().split(b"\n") if line.strip())
    prompts = []
    for question, tokens, row in zip(questions, chat.encode(questions), rows, strict=False):
        if isinstance(tokens, Refusal):
            raise ValueError(f"prompt {question.id}: {tokens.reason}")
        category = str(row["category"]) if "category" in row else None
        prompts.append(EvaluationPrompt(question.id, category, tuple(tokens.input_ids.tolist())))
    return prompts
