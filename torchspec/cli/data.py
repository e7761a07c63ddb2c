"""``torchspec data``: what a run learns from, token by token, and what became of the rest."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchspec.cli.arguments import ConfigFile, Overrides

if TYPE_CHECKING:
    import numpy as np
    from rich.console import RenderableType

    from torchspec.config.schema import Config
    from torchspec.data.prompt_set import PromptSet

BINS = 12
"""Of the histogram."""
BAR = 40
"""Characters of its longest bar."""


def data(
    config: ConfigFile,
    overrides: Overrides = None,
    id: Annotated[
        str | None, typer.Option("--id", help="Show the conversation with this id.", show_default=False)
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Show so many conversations.")] = 2,
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show what CONFIG trains on: text with the loss mask drawn over it, lengths, and what was dropped, and why."""
    from rich.console import Console

    from torchspec.config.load import load_config

    checked = load_config(config, overrides or [])
    prompts = _read(checked)
    summary = summarise(prompts)
    summary["samples"] = _samples(checked, prompts, _rows(prompts, id, limit))
    if json:
        Console().print_json(data=summary)
    else:
        Console(highlight=False).print(data_view(summary, checked.data.train))


def _read(config: Config) -> PromptSet:
    """The training data, tokenised now unless that has been done; the run uses the same."""
    from functools import partial

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from torchspec.data.prompt_builder import load_or_build
    from torchspec.driver.prepare import read_prompts

    columns = TextColumn("tokenised {task.fields[done]:,} conversations"), BarColumn(), TaskProgressColumn()
    console = Console(stderr=True)
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=1.0, done=0)
        read = partial(load_or_build, progress=lambda done, share: bar.update(task, completed=share, done=done))
        return read_prompts(config, "data.train", read)


def _rows(prompts: PromptSet, name: str | None, limit: int) -> list[int]:
    """Those to show. Raises ValueError: there is none of that name."""
    if name is None:
        return list(range(min(limit, len(prompts))))
    if name in prompts.ids:
        return [prompts.ids.index(name)]
    reason = dict(prompts.rejected).get(name)
    raise ValueError(f"{name} is rejected: {reason}" if reason else f"--id: no conversation is called {name}")


def summarise(prompts: PromptSet) -> dict[str, Any]:
    """Figures of a set: counts, lengths in tokens, and reasons with the first conversation that has each."""
    import numpy as np

    from torchspec.data.prompt_set import count_reasons

    lengths = np.diff(prompts.offsets)
    percentiles = np.percentile(lengths if len(lengths) else [0], (0, 50, 90, 100)).tolist()
    first: dict[str, dict[str, str]] = {}
    for name, reason in prompts.rejected:
        first.setdefault(reason.partition(": ")[0], {"first": name, "why": reason})
    return {
        "conversations": len(prompts),
        "to_answer": int(np.count_nonzero(prompts.max_answer_tokens)),
        "tokens": len(prompts.token_ids),
        "loss_tokens": int(np.bitwise_count(prompts.packed_masks).sum()),
        "lengths": dict(zip(("least", "median", "90%", "most"), map(round, percentiles), strict=True)),
        "histogram": _histogram(lengths),
        "changes": prompts.changes,
        "rejected": {
            reason: {"count": count, **first[reason]} for reason, count in count_reasons(prompts.rejected).items()
        },
    }


def _histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """Lengths in tokens, in no more than :data:`BINS` ranges of the same width."""
    import numpy as np

    if not len(lengths):
        return []
    least, most = int(lengths.min()), int(lengths.max())
    width = -(-(most - least + 1) // BINS)
    counts = np.bincount((lengths - least) // width).tolist()
    starts = range(least, most + 1, width)
    return [
        {"from": start, "to": min(start + width - 1, most), "count": count}
        for start, count in zip(starts, counts, strict=True)
    ]


def _samples(config: Config, prompts: PromptSet, rows: list[int]) -> list[dict[str, Any]]:
    """Rows as text, in pieces that are learnt or not."""
    import numpy as np
    from transformers import AutoTokenizer

    from torchspec.data.masks import unpack_mask

    path, samples = Path(config.target.path).expanduser(), []
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=config.target.trust_remote_code)
    for row in rows:
        ids, packed = prompts.input_ids(row), prompts.loss_mask(row)
        mask = np.zeros(len(ids), dtype=bool) if packed is None else np.array(unpack_mask(packed, len(ids)))
        bounds = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
        # a piece decoded by itself may lose the space that it begins with
        texts = [tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False) for end in bounds]
        pieces = [
            {"text": text[len(before) :], "learnt": bool(mask[begin])}
            for begin, (before, text) in zip(bounds, pairwise(texts), strict=False)
        ]
        counts = {"tokens": len(ids), "loss_tokens": int(mask.sum())}
        room = int(prompts.max_answer_tokens[row])
        samples.append({"id": prompts.ids[row], **counts, "max_answer_tokens": room, "text": pieces})
    return samples


def data_view(summary: dict[str, Any], source: str) -> RenderableType:
    """The same for people: samples last, what is learnt in them on green."""
    from rich.console import Group
    from rich.text import Text

    from torchspec.cli.tables import pairs_table

    answers = f", {summary['to_answer']:,} of them for the target to answer" if summary["to_answer"] else ""
    lengths = ", ".join(f"{name} {length:,}" for name, length in summary["lengths"].items())
    figures = {
        "conversations": f"{summary['conversations']:,}{answers}",
        "tokens": f"{summary['tokens']:,}, {summary['loss_tokens']:,} of them to learn from",
        "lengths": lengths,
    }
    most = max([1, *(part["count"] for part in summary["histogram"])])
    for part in summary["histogram"]:
        bar, span = "█" * -(-BAR * part["count"] // most), f"{part['from']:,} to {part['to']:,}"
        figures[f"{span if part['from'] < part['to'] else part['to']} tokens"] = f"{bar} {part['count']:,}"
    parts: list[RenderableType] = [pairs_table(source, figures)]
    parts += [Text(f"{count:,} changed: {what}") for what, count in summary["changes"].items()]
    for why in summary["rejected"].values():
        names = f"{why['first']}, ..." if why["count"] > 1 else why["first"]
        parts.append(Text(f"{why['count']:,} rejected: {why['why']} ({names})", style="yellow"))
    for sample in summary["samples"]:
        room = sample["max_answer_tokens"]
        fate = f"the target answers, up to {room:,} tokens" if room else f"{sample['loss_tokens']:,} to learn from"
        parts.append(Text(f"\n{sample['id']}  {sample['tokens']:,} tokens, {fate}", style="bold"))
        parts.append(_drawn(sample["text"]))
    return Group(*parts)


def _drawn(pieces: list[dict[str, Any]]) -> Any:
    """Text with the loss mask drawn over it, control codes escaped."""
    from rich.text import Text

    from torchspec.data.conversations import printable

    drawn = Text()
    for piece in pieces:
        lines = "\n".join(map(printable, piece["text"].split("\n")))
        drawn.append(lines, style="black on green" if piece["learnt"] else "dim")
    return drawn
