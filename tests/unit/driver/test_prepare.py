"""Every recipe that we show can be planned; what is wrong with one is said at once, and what a resume will do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from tests.checkpoints import PARAMETERS, hollow_checkpoint
from torchspec.config.load import load_config, parse_config
from torchspec.data.prompt_set import PromptSet
from torchspec.driver import plan as planning
from torchspec.driver import prepare, sizes
from torchspec.driver.plan import Plan
from torchspec.driver.prepare import make_plan_for
from torchspec.run_folder import RunFolder
from torchspec.training.schedule import Schedule

ROOT = Path(__file__).parents[3]
RECIPES = sorted(path.stem for path in ROOT.glob("configs/*.yaml"))
FENCE = re.compile(r"```yaml\n(.*?)```", re.DOTALL)
SHOWN = {
    f"{path.name}-{n}": text
    for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
    for n, text in enumerate(FENCE.findall(path.read_text()))
}


@pytest.fixture
def qwen(target_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A target of Qwen3-8B's sizes without weights, in a folder with the data that recipes name; 23 GiB of memory."""
    folder = hollow_checkpoint(tmp_path / "target", target_path)
    (tmp_path / "data").mkdir()
    for name in ("train", "heldout"):
        lines = [json.dumps({"prompt": f"What is {name} {i}?"}) for i in range(200)]
        (tmp_path / "data" / f"{name}.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    for module in (sizes, planning):
        monkeypatch.setattr(module, "usable_memory", lambda: 23 << 30)
    monkeypatch.setattr(sizes, "device_memory", lambda device: 23 << 30)
    return folder


def shown(name: str) -> dict[str, Any]:
    """A recipe of a document; where it is a part of one, with the rest of the README's."""
    (readme,) = (text for key, text in SHOWN.items() if key.startswith("README"))
    return yaml.safe_load(readme) | yaml.safe_load(SHOWN[name])


def planned(tree: dict[str, Any], target: Path, **changes: Any) -> Plan:
    tree["target"]["path"] = str(target)
    for dtype in ("target", "training"):  # as on a GPU, or on a CPU of a server
        tree[dtype] = tree.get(dtype, {}) | {"dtype": "bfloat16"}
    return make_plan_for(parse_config(tree | changes))[0]


@pytest.mark.parametrize("name", SHOWN)
def test_what_the_documents_show_can_be_planned(name: str, qwen: Path) -> None:
    plan = planned(shown(name), qwen)
    assert plan.tokens_per_sample == 4096 and plan.store_samples >= 17
    assert plan.memory_bytes > 2 * 2 * PARAMETERS > plan.memory_available, "that it takes a larger machine is said"


def test_the_kubernetes_recipe_can_be_planned(qwen: Path) -> None:
    (recipe,) = (
        document["data"]["recipe.yaml"]
        for document in yaml.safe_load_all((ROOT / "configs/launch/kuberay.yaml").read_text())
        if document["kind"] == "ConfigMap"
    )
    tree = yaml.safe_load(recipe)
    tree["data"] |= {"train": "data/*.jsonl", "cache_dir": "cache"}
    assert planned(tree, qwen).store_samples >= 16


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_have_no_less_than_when_they_named_their_sizes(name: str, target_path: Path) -> None:
    plan, _ = make_plan_for(load_config(ROOT / "configs" / f"{name}.yaml", [f"target.path={target_path}"]))
    had = {
        "store.segment_bytes": 1 << 30,
        "inference.max_concurrency": 32,
        "inference.max_total_tokens": 16384,
        "inference.chunked_prefill_size": 2048,
        "inference.buffer_bytes": 34 * 320 * 576 * 4 * 2,
        "training.buffer_bytes": 64 << 20,
        "training.loss_chunk_tokens": 1024,
    }
    assert ("SGLang cannot serve a P-EAGLE draft" in plan.target.get("serving", "")) == (name == "quickstart_peagle")
    assert set(plan.found) == set(had)
    assert all(plan.found[knob] >= size for knob, size in had.items())
    same = ("inference.max_concurrency", "inference.max_total_tokens", "training.loss_chunk_tokens")
    assert all(plan.found[knob] == had[knob] for knob in same)


def test_all_that_is_wrong_is_said_at_once(qwen: Path) -> None:
    tree = shown(next(iter(SHOWN)))
    tree |= {"store": {"segment_bytes": "1GiB"}, "inference": {"buffer_bytes": "200MiB", "max_total_tokens": 4096}}
    tree["controller"] = {"reorder_window": 64}
    tree["evaluation"]["heldout"] = "absent.jsonl"
    tree["training"]["init_from"] = "nowhere"
    with pytest.raises(ValueError, match=r"\w") as caught:
        planned(tree, qwen)
    lines = str(caught.value).splitlines()
    knobs = ["inference.max_total_tokens", "store.segment_bytes", "inference.buffer_bytes"]
    assert [line.split()[0] for line in lines[:3]] == knobs
    assert any("controller.reorder_window (64) is smaller than data.vocab_prompts (128)" in line for line in lines)
    assert any(f"evaluation.heldout {qwen.parent / 'absent.jsonl'}: no such file" in line for line in lines)
    assert any("training.init_from" in line and "nowhere is neither a checkpoint" in line for line in lines)


def test_a_vocabulary_that_nobody_counts_needs_no_window(qwen: Path) -> None:
    tree = shown(next(iter(SHOWN))) | {"controller": {"reorder_window": 64}}
    assert planned(tree | {"draft": {"vocab_size": "all"}}, qwen).store_samples >= 17


def told(monkeypatch: pytest.MonkeyPatch, step: int, steps: int) -> list[str]:
    """By a resume to ``steps`` from a checkpoint of a run that was to have 100."""
    info, messages = SimpleNamespace(step=step, schedule=Schedule(((0, 100),))), list[str]()
    monkeypatch.setattr(prepare, "read_info", lambda folder: info)
    config = parse_config({"target": {"path": "x"}, "optimizer": {"lr": 1.0, "schedule": "linear", "warmup_ratio": 0}})
    prepare._tell_schedule(Path("checkpoint"), steps, config, messages.append)
    return messages


def test_a_resume_says_what_becomes_of_the_learning_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(monkeypatch, step=60, steps=100) == told(monkeypatch, step=60, steps=60) == []
    assert told(monkeypatch, step=60, steps=1060) == [
        "1,060 steps instead of 100: the learning rate goes on with 4.10e-01, and what was left of its schedule is "
        "spread over the steps to come"
    ]
    with pytest.raises(
        ValueError, match=r"training\.epochs, training\.max_steps: the learning rate has come to its end"
    ):
        told(monkeypatch, step=100, steps=200)


NOTHING = np.zeros(0, dtype=np.int32)
TRAIN = PromptSet(
    ids=[],
    token_ids=NOTHING,
    offsets=np.zeros(1, dtype=np.int64),
    packed_masks=NOTHING,
    max_answer_tokens=NOTHING,
    rejected=[("a", "too long: 9"), ("b", "too long: 8"), ("c", "odd")],
    content_hash="",
    changes={"joined": 2},
)


def test_changes_and_rejections_are_told_by_reason_and_listed_by_name(tmp_path: Path) -> None:
    told: list[str] = []
    prepare._tell_changes(TRAIN, told.append)
    assert told == [
        "data.train: 2 changed: joined",
        "data.train: 2 rejected: too long",
        "data.train: 1 rejected: odd",
    ]
    folder = RunFolder(tmp_path)
    prepare._list_rejected(folder, TRAIN, None)
    assert [json.loads(line) for line in folder.rejected.read_text().splitlines()] == [
        {"id": "a", "reason": "too long: 9"},
        {"id": "b", "reason": "too long: 8"},
        {"id": "c", "reason": "odd"},
        {"changed": "joined", "count": 2},
    ]


def test_tokenising_is_told_a_twentieth_at_a_time() -> None:
    told: list[str] = []
    progress = prepare._told(told.append)
    for done in range(0, 1001, 10):
        progress(done, done / 1000)
    assert len(told) == 19
    assert told[0] == "tokenised 50 conversations, 5%" and told[-1] == "tokenised 950 conversations, 95%"


def test_a_run_that_cannot_fit_into_the_memory_is_not_started(
    target_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps({"prompt": f"What is {i}?"}) for i in range(8)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    tree = {
        "run": {"dir": str(tmp_path)},
        "target": {"path": str(target_path)},
        "data": {"train": str(tmp_path / "train.jsonl"), "cache_dir": str(tmp_path)},
        "training": {"batch_size": 4},
    }
    assert prepare.prepare(parse_config(tree), False, print).plan.store_samples >= 4
    monkeypatch.setattr(planning, "usable_memory", lambda: 2 << 30)
    with pytest.raises(ValueError, match=r"would take about [0-9.]+ GiB of memory, of 2\.0 GiB that this machine has"):
        prepare.prepare(parse_config(tree), False, print)
    joined = parse_config(tree | {"cluster": {"address": "auto"}})
    assert prepare.prepare(joined, False, print).plan.memory_available == 2 << 30, (
        "a cluster has more than this machine"
    )


def test_a_resume_without_the_checkpoint_that_is_committed_is_refused_and_says_what_to_do(tmp_path: Path) -> None:
    """It began again at step 0, without a word."""
    run = RunFolder(tmp_path)
    run.journal.write_text('{"event": "started"}\n{"event": "committed", "step": 4}\n')
    with pytest.raises(
        ValueError, match=r"step_000004 is gone .* there is no other: start a new run, with another run"
    ):
        prepare._checkpoint(run, "latest")
    run.checkpoint(2).mkdir(parents=True)
    (run.checkpoint(2) / "ledger.json").touch()
    with pytest.raises(
        ValueError, match=rf"go on from an older one \(2\) with `torchspec resume {tmp_path} --from STEP"
    ):
        prepare._checkpoint(run, "latest")
    assert prepare._checkpoint(run, "2") == run.checkpoint(2)
