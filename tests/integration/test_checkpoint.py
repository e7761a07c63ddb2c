"""Checkpoints of real runs: exact resume, rotation, pointers, warm start, a full disk, the wrong folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.integration.trainer_harness import (
    AUX_LAYERS,
    DRAFT_IDS,
    Bench,
    Outcome,
    Step,
    make_config,
    put_samples,
    run_script,
    spec_of,
)
from torchspec.config.load import load_config
from torchspec.config.schema import Config, OptimizerConfig
from torchspec.contracts import SampleRef
from torchspec.drafts.export import validate_export
from torchspec.network import free_port
from torchspec.parallel.mesh import join_ranks
from torchspec.run_folder import RunFolder
from torchspec.training.checkpoint import (
    CheckpointInfo,
    load_weights,
    read_info,
    restore_checkpoint,
    save_checkpoint,
    training_state,
)
from torchspec.training.learner import build_draft
from torchspec.training.optimizer import build_optimizer
from torchspec.training.schedule import Schedule
from torchspec.training.weights import export_checkpoint, load_draft

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def batches(bench: Bench) -> list[list[SampleRef]]:
    lengths = [[31, 8, 12, 20], [25, 10, 11], [17], [9, 19, 23]]
    return [put_samples(bench.client, ls, prefix=f"b{i}", first=10 * i) for i, ls in enumerate(lengths)]


@dataclass
class Run:
    config: Config
    outcome: Outcome

    @property
    def checkpoint(self) -> Path:
        folder = RunFolder(self.config.run_dir).newest_checkpoint()
        assert folder is not None
        return folder


@pytest.fixture(scope="module")
def straight(bench: Bench, batches: list[list[SampleRef]], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Four steps without a break; saved, though no step asks for it, because the run ended between two saves."""
    config = make_config(bench.target, tmp_path_factory.mktemp("straight") / "run", optimizer={"eps": 1e-4})
    return Run(config, run_script(config, bench.endpoint, [Step(b) for b in batches]))


@pytest.fixture(scope="module")
def finished(bench: Bench, batches: list[list[SampleRef]], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Five steps, a checkpoint after each, an evaluation after the first three, exported."""
    heldout = put_samples(bench.client, [12, 30], prefix="heldout", first=50)
    config = make_config(
        bench.target,
        tmp_path_factory.mktemp("finished") / "run",
        evaluation={"heldout": "unused"},
        checkpoint={"keep": 1, "export": True, "export_dtype": "float32"},
    )
    steps = [Step(batches[0], checkpoint=True, evaluate=number < 4) for number in range(1, 6)]
    return Run(config, run_script(config, bench.endpoint, steps, heldout=heldout))


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())


def interrupted(
    bench: Bench, batches: list[list[SampleRef]], run_dir: Path, worlds: tuple[int, int]
) -> tuple[Outcome, Outcome]:
    """Two steps with ``worlds[0]`` ranks, then two more in new processes, ``worlds[1]`` of them."""
    config = make_config(bench.target, run_dir, optimizer={"eps": 1e-4})
    steps = [Step(b) for b in batches]
    first = run_script(config, bench.endpoint, steps[:2], world=worlds[0], total_steps=4)
    second = run_script(
        config,
        bench.endpoint,
        steps[2:],
        world=worlds[1],
        total_steps=4,
        first_step=3,
        resume=RunFolder(run_dir).newest_checkpoint(),
    )
    assert first.errors == second.errors == []
    assert [r.step for r in second.reports] == [3, 4]
    return first, second


def test_resume_is_exact(bench: Bench, batches: list[list[SampleRef]], straight: Run, tmp_path: Path) -> None:
    first, second = interrupted(bench, batches, tmp_path / "run", worlds=(1, 1))

    assert first.losses + second.losses == straight.outcome.losses
    assert_equal(second.start, first.weights)
    assert_equal(second.weights, straight.outcome.weights)
    assert not torch.equal(second.weights["fc.weight"], second.start["fc.weight"])
    assert second.draws == straight.outcome.draws


@pytest.mark.slow
def test_resume_with_another_number_of_ranks(
    bench: Bench, batches: list[list[SampleRef]], straight: Run, tmp_path: Path
) -> None:
    first, second = interrupted(bench, batches, tmp_path / "run", worlds=(3, 2))

    assert_equal(second.start, first.weights)
    assert second.losses == pytest.approx(straight.outcome.losses[2:], rel=1e-5)
    for name, weight in straight.outcome.weights.items():
        assert (second.weights[name] - weight).norm() < 1e-5 * weight.norm(), name


def test_pointers_and_rotation(finished: Run) -> None:
    assert finished.outcome.errors == []
    root = finished.config.run_dir / "checkpoints"
    scores = {r.step: r.accept_length for r in finished.outcome.reports if r.split == "heldout"}
    assert sorted(scores) == [1, 2, 3]
    best = max(scores, key=lambda step: (scores[step], -step))
    assert read_info(root / "best").step == best
    assert read_info(root / "best").accept_length == scores[best]
    assert read_info(root / "latest").step == 5
    assert read_info(root / "latest").accept_length is None
    assert sorted(f.name for f in root.iterdir() if not f.is_symlink()) == [f"step_{best:06d}", "step_000005"]
    committed = [entry for entry in finished.outcome.log if entry[0] == "committed"]
    assert [entry[1] for entry in committed] == [1, 2, 3, 4, 5]
    assert [entry[1] for entry in committed if entry[3]][-1] == best


def test_a_checkpoint_holds_ledger_config_and_vocabulary(finished: Run) -> None:
    assert json.loads((finished.checkpoint / "ledger.json").read_text()) == {"step": 5}
    assert load_config(finished.checkpoint / "config.yaml") == finished.config
    weights, draft_ids = load_weights(finished.checkpoint)
    assert_equal(weights, finished.outcome.weights)
    assert draft_ids.tolist() == DRAFT_IDS.tolist()


def test_export_after_a_save_and_by_hand(finished: Run, tmp_path: Path) -> None:
    folder = finished.config.run_dir / "export"
    assert validate_export(folder).spec.layers == AUX_LAYERS
    weights, draft_ids = load_draft(folder)
    assert_equal(weights, finished.outcome.weights)
    assert draft_ids.tolist() == DRAFT_IDS.tolist()
    best = finished.config.run_dir / "checkpoints" / "best"
    by_hand = load_draft(export_checkpoint(best, tmp_path / "export"))[0]
    assert_equal(by_hand, load_weights(best)[0])


@pytest.mark.parametrize("kind", ["checkpoint", "export"])
def test_warm_start_takes_the_weights_of_common_tokens(finished: Run, bench: Bench, tmp_path: Path, kind: str) -> None:
    source = finished.checkpoint if kind == "checkpoint" else finished.config.run_dir / "export"
    cold = make_config(bench.target, tmp_path / "run")
    warm = make_config(bench.target, tmp_path / "run", training={"init_from": str(source)})
    draft_ids = torch.tensor([0, 1, 2, 31, 62])  # the even ones were trained

    fresh = dict(build_draft(cold, spec_of(cold, len(draft_ids)), draft_ids, None, CPU)[0].named_parameters())
    started = dict(build_draft(warm, spec_of(warm, len(draft_ids)), draft_ids, None, CPU)[0].named_parameters())

    trained = finished.outcome.weights
    for name in trained.keys() - {"lm_head.weight"}:
        assert torch.equal(started[name], trained[name]), name
    head = started["lm_head.weight"]
    assert torch.equal(head[[0, 2, 4]], trained["lm_head.weight"][[0, 1, 31]])
    assert torch.equal(head[[1, 3]], fresh["lm_head.weight"][[1, 3]])


def test_a_full_disk_is_one_clear_error_and_keeps_what_was_saved(
    bench: Bench, batches: list[list[SampleRef]], straight: Run
) -> None:
    root = straight.config.run_dir / "checkpoints"
    before = {f: f.read_bytes() for f in root.rglob("*") if f.is_file()}

    outcome = run_script(
        straight.config,
        bench.endpoint,
        [Step(batches[1], checkpoint=True)],
        world=2,
        first_step=5,
        resume=straight.checkpoint,
        file_limit=16 << 10,  # less than a rank's share of the state
    )

    assert [type(e).__name__ for e in outcome.errors] == ["CheckpointError"] * 2
    message = str(outcome.errors[0])
    assert all(part in message for part in ("step_000005", "File too large", "MiB free", "checkpoint.keep"))
    assert not [entry for entry in outcome.log if entry[0] == "committed"]
    assert {f: f.read_bytes() for f in root.rglob("*") if f.is_file()} == before


def test_wrong_folders_are_named(finished: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training\.init_from"):
        read_info(finished.config.run_dir / "export")
    with pytest.raises(ValueError, match="latest is one"):
        read_info(finished.config.run_dir / "checkpoints")
    with pytest.raises(ValueError, match="neither a checkpoint"):
        load_draft(tmp_path)


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group in this very process."""
    join_ranks(0, 1, "127.0.0.1", free_port("127.0.0.1"), CPU, stuck_seconds=600.0)
    yield
    dist.destroy_process_group()


def test_resume_takes_dtypes_from_the_data(one_rank: None, bench: Bench, tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.randn(4, 3))
    optimizer = build_optimizer([parameter], OptimizerConfig())
    parameter.grad = torch.randn(4, 3)
    optimizer.step()
    state = training_state({"x": parameter}, optimizer, torch.arange(4))
    state["optimizer.x.exp_avg"] = state["optimizer.x.exp_avg"].bfloat16()
    save_checkpoint(
        tmp_path / "step_000001",
        state,
        CheckpointInfo(1, Schedule(((0, 1),)), spec_of(make_config(bench.target, tmp_path / "run")), None),
        {},
        generation=1,
        fence=lambda: None,
    )
    fresh = nn.Parameter(torch.zeros(4, 3))
    other = build_optimizer([fresh], OptimizerConfig())

    restore_checkpoint(tmp_path / "step_000001", {"x": fresh}, other, torch.arange(4))

    assert torch.equal(fresh, parameter)
    restored = other.state[fresh]
    assert restored["exp_avg"].dtype == torch.bfloat16
    assert restored["exp_avg"].any()
    assert torch.equal(restored["exp_avg"], state["optimizer.x.exp_avg"])
    assert torch.equal(restored["exp_avg_sq"], optimizer.state[parameter]["exp_avg_sq"])
    assert restored["step"].item() == 1


def test_a_checkpoint_of_another_draft_or_vocabulary_is_refused(
    finished: Run, bench: Bench, tmp_path: Path, one_rank: None
) -> None:
    config = make_config(bench.target, tmp_path / "run")

    def restore(draft_ids: Tensor) -> None:
        draft, _ = build_draft(config, spec_of(config, len(draft_ids)), draft_ids, None, CPU)
        parameters = dict(draft.named_parameters())
        optimizer = build_optimizer(parameters.values(), config.optimizer)
        restore_checkpoint(finished.checkpoint, parameters, optimizer, draft_ids)

    restore(torch.from_numpy(DRAFT_IDS))
    with pytest.raises(ValueError, match=r"lm_head\.weight is \[32, 32\] there and \[31, 32\] here"):
        restore(torch.from_numpy(DRAFT_IDS[1:]))
    with pytest.raises(ValueError, match="another draft vocabulary"):
        restore(torch.from_numpy(DRAFT_IDS + 1))
