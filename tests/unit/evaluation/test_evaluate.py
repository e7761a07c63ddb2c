"""Figures of an evaluation, where they are written down, and what it refuses before a server is started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.cli.commands import rendered
from torchspec.cli import export_eval
from torchspec.cli.export_eval import show_evaluation
from torchspec.cli.tables import evaluation_tables
from torchspec.config.load import parse_config, save_config
from torchspec.drafts.eagle3.spec import Eagle3Knobs, Eagle3Spec
from torchspec.drafts.export import DraftExport
from torchspec.evaluation import evaluate, serving
from torchspec.evaluation.evaluate import require_match, run_evaluation
from torchspec.evaluation.prompts import EvaluationPrompt
from torchspec.evaluation.result import Acceptance, EvaluationResult, EvaluationSettings, PromptResult
from torchspec.evaluation.serving import Job, Reply, Served, ServingError, serve
from torchspec.monitor.series import read_series
from torchspec.run_folder import RunFolder
from torchspec.target.checkpoint import TargetCheckpoint

PROMPTS = [
    PromptResult("a", "code", [7] * 11, [2, 1, 0, 2], True),
    PromptResult("b", "maths", [7] * 4, [3], False),
    PromptResult("c", "code", [7] * 5, [1, 1, 1], True),
    PromptResult("d", None, [7], [], True),
]


def export_for(target_path: Path) -> DraftExport:
    spec = Eagle3Spec.of(Eagle3Knobs(vocab_size=8192), TargetCheckpoint(target_path), None)
    return DraftExport(Path("draft"), spec, "bfloat16")


def export_draft_of(target_path: Path, folder: Path) -> None:
    """Just enough of one for its settings to be read."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(export_for(target_path).spec.hf_config("bfloat16")))
    (folder / "model.safetensors").touch()


def test_acceptance_follows_from_the_histograms() -> None:
    # Steps with exactly 0, 1, 2, 3 right drafts: 6, 2, 1, 2.
    figures = Acceptance.of(PROMPTS, num_draft_tokens=3)
    assert (figures.prompts, figures.verify_steps, figures.correct_drafts, figures.output_tokens) == (4, 11, 10, 21)
    assert figures.accept_length == pytest.approx(1 + 10 / 11)
    assert figures.position_acceptance == pytest.approx((5 / 11, 3 / 11, 2 / 11))
    assert figures.accept_length == pytest.approx(1 + sum(figures.position_acceptance))
    assert figures.server_accept_length == pytest.approx(21 / 11)


def test_acceptance_needs_a_verify_step() -> None:
    with pytest.raises(ValueError, match="never verified a draft"):
        Acceptance.of(PROMPTS[3:], num_draft_tokens=3)


@pytest.fixture
def result() -> EvaluationResult:
    """What an evaluation makes of two known servings; the servers themselves are in the integration tests."""
    drafted = Served([Reply(p.output_ids, p.histogram) for p in PROMPTS], seconds=2.0, sglang_version="0.5.23")
    plain = Served([Reply(p.output_ids if p.identical else [1], []) for p in PROMPTS], 3.0, "0.5.23")
    prompts = [EvaluationPrompt(p.id, p.category, (1, 2)) for p in PROMPTS]
    settings = EvaluationSettings(device="cpu", dtype="bfloat16", threads=1)
    return evaluate._compare(drafted, plain, prompts, settings, "draft", "target", "mine.jsonl")


def test_servings_are_compared(result: EvaluationResult) -> None:
    assert result.overall == Acceptance.of(PROMPTS, 3)
    assert list(result.categories) == ["code", "maths"]
    assert result.categories["code"].accept_length == pytest.approx(1 + 10 / 8)
    assert result.categories["maths"].accept_length == 1
    assert result.identical_outputs == 3
    assert result.with_draft.tokens_per_s == pytest.approx(21 / 2)
    assert result.without_draft.tokens_per_s == pytest.approx(18 / 3)
    assert result.speed_up == pytest.approx(10.5 / 6)
    assert result.prompts == PROMPTS


def test_the_result_is_saved_as_json_and_shown_as_tables(result: EvaluationResult, tmp_path: Path) -> None:
    result.save(tmp_path / "deep" / "result.json")
    saved = json.loads((tmp_path / "deep" / "result.json").read_text())
    assert saved["overall"]["accept_length"] == result.overall.accept_length
    assert saved["settings"]["num_draft_tokens"] == 3
    assert saved["prompts"][1] == {
        "id": "b",
        "category": "maths",
        "output_ids": [7, 7, 7, 7],
        "histogram": [3],
        "identical": False,
    }
    text = rendered(evaluation_tables(result), width=80)
    for figure in ("code", "1.909", "45.5 27.3 18.2", "10.5", "1.75x", "3 of 4 answers identical"):
        assert figure in text, figure


def test_the_run_that_the_draft_comes_from_knows_what_it_is_worth(result: EvaluationResult, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for _ in range(2):
        result.record(run)
    first, second = read_series(run.evaluations)
    assert first["accept_length"] == second["accept_length"] == pytest.approx(1 + 10 / 11)
    assert (first["draft"], first["num_draft_tokens"], first["speed_up"]) == ("draft", 3, pytest.approx(1.75))
    told = read_series(run.events)[-1]
    assert told["kind"] == "evaluated" and told["message"].endswith("on mine.jsonl: accept length 1.91")


def test_the_command_writes_the_result_notes_it_in_the_run_and_prints_it(
    result: EvaluationResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(tmp_path)
    run.config.touch()
    monkeypatch.setattr(evaluate, "run_evaluation", lambda *_, **__: result)
    show_evaluation(run.export, "target", "mine.jsonl", result.settings, None, run.evaluation)
    assert json.loads(run.evaluation.read_text())["overall"]["accept_length"] == result.overall.accept_length
    (noted,) = read_series(run.evaluations)
    assert noted["accept_length"] == result.overall.accept_length
    assert "1.75x" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_draft_tokens": 0}, "num_draft_tokens is 0, but must be at least 1"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"dtype": "fp32"}, "dtype is 'fp32', but must be one of auto, bfloat16, float16, float32"),
        ({"device": "tpu"}, "device is 'tpu', but must be one of auto, cpu, cuda"),
    ],
)
def test_settings_are_checked(setting: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationSettings(**setting)


def test_settings_are_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": False, "amx_bf16": False})
    resolved = evaluate._resolve(EvaluationSettings())
    assert (resolved.device, resolved.dtype, resolved.threads) == ("cpu", "float32", os.cpu_count())
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": False, "amx_bf16": True})
    assert evaluate._resolve(EvaluationSettings()).dtype == "bfloat16"
    with pytest.raises(ValueError, match="device is cuda"):
        evaluate._resolve(EvaluationSettings(device="cuda"))
    given = EvaluationSettings(device="cpu", dtype="float16", threads=3)
    assert evaluate._resolve(given) == given


@pytest.mark.parametrize(
    ("change", "layers", "message"),
    [
        ({"hidden_size": 2048}, None, "another target: hidden size 2048, but the target's is 576"),
        ({"vocab_size": 32000}, None, "another target: vocabulary 32000, but the target's is 49152"),
        ({}, (1, 15, 28, 30), "reads layers .*30.*but the target has 30"),
    ],
)
def test_a_draft_of_another_target_is_refused(
    target_path: Path, change: dict, layers: tuple[int, ...] | None, message: str
) -> None:
    export, target = export_for(target_path), TargetCheckpoint(target_path)
    require_match(export, target)
    spec = replace(export.spec, target=replace(target.shape, **change), layers=layers or export.spec.layers)
    with pytest.raises(ValueError, match=message):
        require_match(replace(export, spec=spec), target)


def test_what_cannot_be_evaluated_is_refused_before_a_server_starts(
    target_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "serve", lambda job: pytest.fail("a server was started"))
    with pytest.raises(ValueError, match="not an exported draft"):
        run_evaluation(tmp_path, target_path)
    with pytest.raises(ValueError, match="not an exported draft: its architectures are"):
        run_evaluation(target_path, target_path)

    export = export_for(target_path)
    monkeypatch.setattr(evaluate, "validate_export", lambda folder: export)
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
        run_evaluation(tmp_path, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no-such-file"):
        run_evaluation(tmp_path, target_path, "no-such-file.jsonl")
    long = EvaluationPrompt("long", None, (1,) * 8100)
    monkeypatch.setattr(evaluate, "load_prompts", lambda *_: [long])
    with pytest.raises(ValueError, match=r"prompt long has 8100 tokens; with max_tokens=100 .* context of 8192"):
        run_evaluation(tmp_path, target_path)


def test_engine_arguments(target_path: Path) -> None:
    job = Job("target", [[1] * 10, [1] * 20], 30, "float32", "cpu", 1, concurrency=2, engine_args={"log_level": "info"})
    speculation = export_for(target_path).spec.server_args(5)
    plain, drafted = job.sglang_args(), replace(job, draft="draft", speculation=speculation).sglang_args()
    assert plain["log_level"] == "info"
    assert plain["max_total_tokens"] >= 2 * (20 + 30)
    added = {name: value for name, value in drafted.items() if name not in plain}
    assert added == {
        "speculative_algorithm": "EAGLE3",
        "speculative_draft_model_path": "draft",
        "speculative_num_steps": 5,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": 6,
    }


def test_a_draft_may_name_a_shorter_context_than_its_target_has() -> None:
    plain = Job("target", [[1]], 4, "float32", "cpu", 1, 1)
    knob = "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"
    assert replace(plain, draft="draft").environment()[knob] == "1" and knob not in plain.environment()


def test_what_sglang_serves_no_such_draft_for_is_refused_before_an_engine_starts(
    target_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = export_for(target_path)
    monkeypatch.setattr(Eagle3Spec, "server_args", lambda spec, tokens: {"speculative_algorithm": "DFLASH"})
    monkeypatch.setattr(evaluate, "validate_export", lambda folder: export)
    monkeypatch.setattr(TargetCheckpoint, "architecture", "Qwen2ForCausalLM")
    monkeypatch.setattr(evaluate, "serve", lambda job: pytest.fail("an engine"))
    with pytest.raises(ValueError, match=r"serves no DFlash drafts for Qwen2ForCausalLM"):
        run_evaluation("draft", target_path, settings=EvaluationSettings(device="cpu"), limit=1)


def test_an_engine_ends_answers_where_the_target_does_and_trusts_as_it_is_told(
    target_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export, jobs = export_for(target_path), []

    def serve(job: Job) -> Served:
        jobs.append(job)
        return Served([Reply([7, 2], [1]) for _ in job.prompts], 1.0, "0.5.23")

    monkeypatch.setattr(evaluate, "validate_export", lambda folder: export)
    monkeypatch.setattr(evaluate, "serve", serve)
    template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    settings = EvaluationSettings(device="cpu", chat_template=template, trust_remote_code=True)
    run_evaluation("draft", target_path, settings=settings, limit=1)
    for job in jobs:
        assert (job.end_token_ids, job.sglang_args()["trust_remote_code"]) == ([2], True)
    text = TargetCheckpoint(target_path).tokenizer.decode(jobs[0].prompts[0])
    assert text.startswith("<") and text.endswith(">") and "im_start" not in text


def test_the_command_evaluates_a_draft_as_its_run_was_trained(
    result: EvaluationResult, target_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple] = []
    monkeypatch.setattr(export_eval, "show_evaluation", lambda *given: asked.append(given))
    tree = {
        "target": {"path": "the/runs/target", "trust_remote_code": True},
        "data": {"chat_template": "{{ messages }}", "template_kwargs": {"enable_thinking": False}},
    }
    tree["data"]["columns"] = {"prompt": "question"}
    draft = RunFolder(tmp_path).export
    export_draft_of(target_path, draft)
    with pytest.raises(ValueError, match=r"lies in no run, so name the target: torchspec eval .* --target FOLDER"):
        export_eval.evaluate(draft)
    save_config(parse_config(tree), RunFolder(tmp_path).config)
    export_eval.evaluate(draft)
    export_eval.evaluate(draft, "another", "{{ other }}", False)
    (_, target, _, settings, *_), (_, other, _, changed, *_) = asked
    assert (target, settings.chat_template, settings.trust_remote_code) == ("the/runs/target", "{{ messages }}", True)
    assert settings.template_kwargs == {"enable_thinking": False}
    assert settings.columns == {"prompt": "question"}
    assert (other, changed.chat_template, changed.trust_remote_code) == ("another", "{{ other }}", False)


def test_the_command_takes_a_run_by_its_folder_or_name(
    target_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(export_eval, "show_evaluation", lambda draft, *_: asked.append(draft))
    monkeypatch.chdir(tmp_path)
    run = RunFolder(Path("runs/mine"))
    run.path.mkdir(parents=True)
    save_config(parse_config({"target": {"path": "target"}}), run.config)
    with pytest.raises(ValueError, match=r"runs/mine/export is not an exported draft: it has no config\.json"):
        export_eval.evaluate(Path("mine"))
    export_draft_of(target_path, run.export)
    for name in ("mine", "runs/mine", "runs/mine/export"):
        export_eval.evaluate(Path(name))
    assert asked == [run.export] * 3
    with pytest.raises(ValueError, match="nowhere is not an exported draft"):
        export_eval.evaluate(Path("nowhere"))


def test_an_engine_that_does_not_start_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.CompletedProcess([], -signal.SIGALRM)
    monkeypatch.setattr(serving.subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(ServingError, match="the SGLang engine had not started after 900 s"):
        serve(Job("target", [[1]], 30, "float32", "cpu", 1, concurrency=1))
