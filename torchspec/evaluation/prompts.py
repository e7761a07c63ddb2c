"""The prompts of an evaluation: any prompt set of the data layer, with the categories it names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torchspec.data.conversations import Pretokenized, Rejected, read_conversations
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
        source: as ``data.train``: also ``builtin:heldout``, ``builtin:mtbench``, ``builtin:humaneval``.

    Raises:
        ValueError: nothing at ``source``, a bad line, or a conversation that the chat template refuses.
    """
    files = find_files(source, cache_dir, "the prompt set")
    questions = []
    for one in read_conversations(files, limit):
        if isinstance(one, Rejected):
            raise ValueError(f"{one.where}: {one.reason}")
        if isinstance(one, Pretokenized):
            raise ValueError(f"prompt {one.id} is tokenised already: an evaluation needs messages")
        questions.append(replace(one, messages=one.messages[:-1]) if one.answered else one)
    if not questions:
        raise ValueError(f"the prompt set {source} holds no conversation")
    prompts = []
    for question, tokens in zip(questions, chat.encode(questions), strict=True):
        if isinstance(tokens, Refusal):
            raise ValueError(f"prompt {question.id}: {tokens.reason}")
        prompts.append(EvaluationPrompt(question.id, question.category, tuple(tokens.input_ids.tolist())))
    return prompts
