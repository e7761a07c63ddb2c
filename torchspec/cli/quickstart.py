"""``torchspec quickstart``: from nothing to a measured draft in minutes, on any machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from torchspec.cli.arguments import Overrides
from torchspec.cli.export_eval import settings_of, show_evaluation
from torchspec.cli.train import run_training
from torchspec.run_folder import RunFolder

if TYPE_CHECKING:
    from torchspec.config.schema import Config


def quickstart(
    overrides: Overrides = None,
    kind: Annotated[
        str | None, typer.Option(help="Kind of draft; `torchspec config` names them.", show_default=False)
    ] = None,
) -> None:
    """Train a draft for a 135M LLM on this machine, then measure it in a real SGLang server, if that serves it."""
    from torchspec.config.load import load_config
    from torchspec.drafts.export import read_spec
    from torchspec.drafts.registry import DEFAULT, KINDS
    from torchspec.evaluation.result import EvaluationSettings

    if kind not in (None, *KINDS):
        raise ValueError(f"--kind {kind} must be one of {', '.join(KINDS)}")
    recipe = "quickstart" if kind in (None, DEFAULT) else f"quickstart_{kind}"
    config = load_config(f"builtin:{recipe}", overrides or [])
    config.run.name = unused_name(config)
    summary = run_training(config, resume=False)
    if summary.stopped or summary.export is None:
        return
    spec = read_spec(summary.export)
    try:
        spec.server_args(spec.draft_tokens)
    except ValueError as reason:
        print(f"not measured: {reason}")
        return
    settings = EvaluationSettings(spec.draft_tokens, config.answer.max_tokens, **settings_of(config))
    show_evaluation(
        summary.export, config.target.path, "builtin:heldout", settings, None, RunFolder(summary.run_dir).evaluation
    )


def unused_name(config: Config) -> str:
    """The run's name, numbered if a run has it already: every quickstart is a new run."""
    name, number = config.run.name, 2
    while RunFolder(config.run.dir / name).exists():
        name = f"{config.run.name}-{number}"
        number += 1
    return name
