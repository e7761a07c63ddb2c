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


def load_prompts(source: str, target_path: Path, cache_dir: Path, limit: int | None = None) -> list[EvaluationPrompt]:
    """Tokenise the first ``limit`` conversations of ``source`` as a chat server does; a given last answer is left out.

    Args:
        source: path, glob, ``builtin:heldout``, ``builtin:mtbench``, ``builtin:humaneval``.

    Raises:
        ValueError: nothing at ``source``, a bad line, or a target without a usable chat template.
    """
    files = find_files(source, cache_dir, "the prompt set")
    require_clean(files, limit)
    categories = _categories(files)
    conversations = [c for c in read_conversations(files, limit) if isinstance(c, Conversation)]
    if not conversations:
        raise ValueError(f"the prompt set {source} holds no conversation")
    questions = [Conversation(c.id, c.messages[:-1] if c.answered else c.messages) for c in conversations]
    prompts = []
    for question, tokens in zip(questions, ChatTokenizer(target_path).encode(questions), strict=True):
        if isinstance(tokens, Refusal):
            raise ValueError(f"prompt {question.id}: {tokens.reason}")
        prompts.append(EvaluationPrompt(question.id, categories.get(question.id), tuple(tokens.input_ids.tolist())))
    return prompts


def _categories(files: list[Path]) -> dict[str, str]:
    """``category`` of each conversation that has one, and an id to find it by."""
    rows = (json.loads(line) for file in files for line in file.read_bytes().splitlines() if line.strip())
    return {str(row["id"]): str(row["category"]) for row in rows if "id" in row and "category" in row}
