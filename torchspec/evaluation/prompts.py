"""The prompts of an evaluation: any prompt set of the data layer, with the categories it names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torchspec.data.conversations import Conversation, Pretokenized, read_conversations
from torchspec.data.prompt_set import count_reasons
from torchspec.data.prompt_sources import find_files
from torchspec.data.tokenize import ChatTokenizer, Refusal


@dataclass(frozen=True, slots=True)
class EvaluationPrompt:
    """A conversation up to the turn that the target has to write."""

    id: str
    category: str | None
    input_ids: tuple[int, ...]


def load_prompts(
    source: str,
    chat: ChatTokenizer,
    cache_dir: Path,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    told: Callable[[str], None] = lambda message: None,
) -> list[EvaluationPrompt]:
    """Tokenise the first ``limit`` conversations of ``source`` as a chat server does; a given last answer is left out.

    Args:
        source: as ``data.train``: also ``builtin:heldout``, ``builtin:mtbench``, ``builtin:humaneval``.
        columns: as ``data.columns``.
        told: of each reason for which conversations cannot be used, and how many.

    Raises:
        ValueError: nothing at ``source``, a malformed row, or no conversation that can be used.
    """
    questions, rejected = [], list[tuple[str, str]]()
    for one in read_conversations(find_files(source, cache_dir, "the prompt set"), limit, columns):
        if isinstance(one, Conversation):
            questions.append(replace(one, messages=one.messages[:-1]) if one.answered else one)
        elif isinstance(one, Pretokenized):
            rejected.append((one.id, "tokenised already: an evaluation needs messages"))
        elif one.malformed:
            raise ValueError(f"{one.where}: {one.reason}")
        else:
            rejected.append((one.id, one.reason))
    prompts = []
    for question, tokens in zip(questions, chat.encode(questions), strict=True):
        if isinstance(tokens, Refusal):
            rejected.append((question.id, tokens.reason))
        else:
            prompts.append(EvaluationPrompt(question.id, question.category, tuple(tokens.input_ids.tolist())))
    reasons = [f"{count:,} left out: {reason}" for reason, count in count_reasons(rejected).items()]
    if not prompts:
        raise ValueError(f"the prompt set {source} holds no conversation to ask; {'; '.join(reasons) or 'it is empty'}")
    for reason in reasons:
        told(f"prompts {source}: {reason}")
    return prompts
