"""What a source of conversations comes to, for a plan: all rows are read, and an even sample of them tokenised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from torchspec.data.conversations import require_clean
from torchspec.data.prompt_builder import accepted, encode_rows, open_tokenizer
from torchspec.data.prompt_set import TokenizeOptions
from torchspec.data.prompt_sources import find_files
from torchspec.data.rows import Row, read_rows

SAMPLE = 512
"""Up to twice as many conversations are tokenised, and so counted exactly."""


@dataclass(frozen=True, slots=True)
class Survey:
    """Counts over all conversations, estimated from the sample unless it holds all of them."""

    rows: int
    """Conversations that can be used."""
    tokens: int
    """Of those: prompts, and the answers that are given."""
    answer_tokens: int
    """The most that the target writes to prompts without an answer."""
    rejected: tuple[tuple[str, str], ...]
    """Name and reason of each conversation of the sample that cannot be used."""
    changes: dict[str, int]
    """What was changed in conversations of the sample, and in how many."""
    exact: bool


def survey(source: str, tokenizer_path: Path, options: TokenizeOptions, cache_dir: Path, knob: str) -> Survey:
    """Look through ``source``; the arguments are those of :func:`load_or_build`.

    Raises:
        ValueError: nothing at ``source``, malformed rows with ``on_error="stop"``, no usable tokenizer or template.
    """
    files = find_files(source, cache_dir, knob)
    if options.on_error == "stop":
        require_clean(files, options.limit, options.columns)
    count, sample = _sample(islice(read_rows(files), options.limit))
    encoded = encode_rows(sample, open_tokenizer(tokenizer_path, options), options)
    rejected: list[tuple[str, str]] = []
    changes: Counter[str] = Counter()
    prompts = list(accepted(iter(encoded), None, rejected, changes))
    scale = count / max(1, len(sample))
    return Survey(
        rows=round(len(prompts) * scale),
        tokens=round(sum(len(prompt.input_ids) for prompt in prompts) * scale),
        answer_tokens=round(sum(prompt.max_answer_tokens for prompt in prompts) * scale),
        rejected=tuple(rejected),
        changes=dict(changes),
        exact=len(sample) == count,
    )


def _sample(rows: Iterable[Row]) -> tuple[int, list[Row]]:
    """The number of rows, and every n-th of them, for the least power of two n with which they fit the sample."""
    count, stride = 0, 1
    kept: list[Row] = []
    for row in rows:
        if count % stride == 0:
            kept.append(row)
        if len(kept) > 2 * SAMPLE:
            kept, stride = kept[::2], 2 * stride
        count += 1
    return count, kept
