"""``torchspec export`` and ``eval``: a draft as a folder that servers load, and what it is worth in one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchspec.cli.arguments import complete_run, run_called
from torchspec.cli.units import human_seconds
from torchspec.data.conversations import printable
from torchspec.run_folder import RunFolder

if TYPE_CHECKING:
    from torchspec.config.schema import Config
    from torchspec.evaluation.result import EvaluationSettings


def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT", help="A checkpoint's folder, or a run's or its name.", autocompletion=complete_run
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Where to write. Default: beside the run's checkpoints.", show_default=False)
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32. Default: as the run says.", show_default=False)
    ] = None,
) -> None:
    """Write a checkpoint's draft as a Hugging Face folder that SGLang and vLLM load."""
    from torchspec.cli.tables import shown
    from torchspec.training.weights import export_checkpoint

    run = run_called(checkpoint)
    folder = (run.newest_checkpoint() if run else None) or checkpoint.resolve()
    out = out or RunFolder(folder.parent.parent).exports / folder.name
    print(f"exported to {shown(export_checkpoint(folder, out, dtype))}")


def evaluate(
    draft: Annotated[
        Path,
        typer.Argument(
            metavar="DRAFT", help="An exported draft's folder, or a run's or its name.", autocompletion=complete_run
        ),
    ],
    target: Annotated[
        str | None,
        typer.Option(help="The target's folder, or its name on the Hub. Default: the run's.", show_default=False),
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="Jinja, or its file. Default: the run's, or the target's.", show_default=False)
    ] = None,
    trust_remote_code: Annotated[
        bool | None,
        typer.Option(help="Run code that comes with the target. Default: as the run does.", show_default=False),
    ] = None,
    prompts: Annotated[
        str, typer.Option(help="builtin:heldout, builtin:mtbench, builtin:humaneval, a JSONL path or a glob.")
    ] = "builtin:heldout",
    tokens: Annotated[
        int | None,
        typer.Option(help="Tokens drafted for each verify step. Default: as suits its kind.", show_default=False),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 100,
    concurrency: Annotated[int, typer.Option(help="Requests that the server answers at a time.")] = 32,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first so many prompts.", show_default=False)] = None,
    dtype: Annotated[str, typer.Option(help="In float32, answers with and without the draft are the same.")] = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the result as JSON.", show_default=False)
    ] = None,
) -> None:
    """Measure a draft's accept length and speed in a real SGLang server."""
    from torchspec.drafts.export import read_spec
    from torchspec.evaluation.result import EvaluationSettings

    draft = run.export if (run := run_called(draft)) else draft
    spec, trained = read_spec(draft), config_around(draft)
    if target is None:
        if trained is None:
            raise ValueError(f"{draft} lies in no run, so name the target: torchspec eval {draft} --target FOLDER")
        target = trained.target.path
    tokens = spec.draft_tokens if tokens is None else tokens
    asked = {"chat_template": chat_template, "trust_remote_code": trust_remote_code}
    as_trained = settings_of(trained) if trained else {}
    settings = EvaluationSettings(
        num_draft_tokens=tokens,
        max_tokens=max_tokens,
        concurrency=concurrency,
        dtype=dtype,
        **as_trained | {name: value for name, value in asked.items() if value is not None},
    )
    show_evaluation(draft, target, prompts, settings, limit, json_file)


def show_evaluation(
    draft: Path, target: str, prompts: str, settings: EvaluationSettings, limit: int | None, json_file: Path | None
) -> None:
    """Evaluate and print the tables. Exits with 1, with the reason, if the server fails."""
    import time

    from rich.console import Console

    from torchspec.cli.tables import evaluation_tables
    from torchspec.evaluation.evaluate import run_evaluation
    from torchspec.evaluation.serving import ServingError

    started = time.monotonic()

    def progress(stage: str) -> None:
        print(f"[{human_seconds(time.monotonic() - started):>6}] {stage}", file=sys.stderr, flush=True)

    try:
        result = run_evaluation(draft, target, prompts, settings, limit=limit, progress=progress)
    except ServingError as error:
        print("error: " + "\n".join(map(printable, str(error).split("\n"))), file=sys.stderr)
        raise typer.Exit(1) from None
    if json_file is not None:
        result.save(json_file)
    run = RunFolder.around(draft)
    if run is not None:
        result.record(run)
    Console().print(evaluation_tables(result))


def config_around(draft: Path) -> Config | None:
    """That of the run which ``draft`` lies in, if there is one."""
    from torchspec.config.load import load_config

    run = RunFolder.around(draft)
    return None if run is None else load_config(run.config)


def settings_of(config: Config) -> dict[str, Any]:
    """What an evaluation takes over from the run, so that its prompts have the form that the draft was trained on."""
    return {
        "chat_template": config.data.chat_template,
        "template_kwargs": config.data.template_kwargs,
        "columns": dict(config.data.columns),
        "trust_remote_code": config.target.trust_remote_code,
    }
