"""``torchspec init``: a commented recipe to start from."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from torchspec.cli.units import human_count

if TYPE_CHECKING:
    from torchspec.driver.resolve import Resolved

RECIPE = """\
# A draft for {name}: {parameters} parameters, {layers} layers, {vocabulary:,} tokens, a context of {context:,}.
# `torchspec config` documents every key. Any of them can be set on the command line, too: optimizer.lr=1e-4
#
#   torchspec plan {file}      what it needs, before anything starts
#   torchspec train {file}     add --detach to run it in the background

run:
  name: {run}

target:
  path: {target}

data:
  train: {data}  # .jsonl, .json or .parquet, a folder, a glob, hub:OWNER/NAME; see docs/data.md
  # columns: {{messages: chat}}              where the set calls its keys otherwise
  # template_kwargs: {{enable_thinking: false}}    what the server will hand to the chat template
  max_seq_length: {longest}  # prompt and answer together; longer ones are rejected by name

answer:  # the target answers conversations that end with a user turn
  max_tokens: {answer}
  temperature: 0  # as the draft will be served: 0 is greedy; near 1 for sampled traffic

inference:
  workers: 1  # SGLang engines; auto: as many as training needs

draft:
  kind: eagle3  # or dflash, peagle
  vocab_size: {draft_vocabulary}  # of its own, counted from the answers; all: the target's

training:
  epochs: 2  # answers are written in the first, only read in later ones
  batch_size: 8
  # dp_size: 2             more ranks, each with samples of its own

optimizer:
  lr: 1.0e-4  # for hours; minutes want 2.0e-3, days 5.0e-5

evaluation:
  heldout: {heldout}  # like data.train; null: none

checkpoint:
  every_steps: 200
"""
LONGEST = 2048
"""Tokens of a sample, if the target reads so many."""


def init(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The target's folder, or its name on the Hub.")],
    data: Annotated[
        str, typer.Option(help="A file (.jsonl, .json, .parquet), a folder, a glob, or hub:OWNER/NAME.")
    ] = "builtin:train",
    heldout: Annotated[
        str | None, typer.Option(help="The like to score drafts on. Default: with builtin:train, builtin:heldout.")
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Where to write it.")] = Path("recipe.yaml"),
) -> None:
    """Write a commented recipe for TARGET to start from. Exits with 1, with the reason, if it cannot be run here."""
    from torchspec.config.load import load_config, parse_config
    from torchspec.driver.prepare import make_plan_for
    from torchspec.driver.resolve import resolve

    if out.exists():
        raise ValueError(f"{out} exists already: choose another file with --out")
    folder = Path(target).expanduser()
    path = str(folder.absolute()) if folder.exists() else target
    if heldout is None and data == "builtin:train":
        heldout = "builtin:heldout"
    resolved = resolve(parse_config({"target": {"path": path}, "data": {"train": data}}))
    out.write_text(recipe_for(resolved, data, heldout, quote(str(out))))
    print(f"wrote {out}; next: torchspec plan {quote(str(out))}")
    try:
        make_plan_for(load_config(out))
    except ValueError as error:
        print(f"on this machine it does not plan as it stands:\n{error}", file=sys.stderr)
        raise typer.Exit(1) from None


def recipe_for(resolved: Resolved, data: str, heldout: str | None, file: str) -> str:
    """The text of a recipe for a target, with its data and all else that takes more than one sensible value.

    Args:
        file: where it will lie, as a shell takes it.
    """
    from torchspec.driver.sizes import RESERVED_TOKENS

    config, target, shape = resolved.config, resolved.target, resolved.draft.target
    context = target.config.max_position_embeddings
    longest = min(LONGEST, context - RESERVED_TOKENS)
    name = Path(config.target.path).name
    return RECIPE.format(
        name=name,
        parameters=human_count(target.num_parameters),
        layers=target.num_layers,
        vocabulary=shape.vocab_size,
        context=context,
        file=file,
        run=json.dumps(re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "run"),
        target=json.dumps(config.target.path),
        data=json.dumps(data),
        longest=longest,
        answer=min(512, longest // 2),
        draft_vocabulary=resolved.draft.vocab_size or "all",
        heldout=json.dumps(heldout),
    )
