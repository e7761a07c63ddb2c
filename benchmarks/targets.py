"""Which families of targets TorchSpec trains drafts for: each is taken all the way, and what stops one is said.

    python -m benchmarks.targets [--only FAMILY ...] [--stages STAGE ...] [--overrides key=value ...] [--page]

A tiny random checkpoint of each family (``families.py``) goes through

    plan      torchspec plan
    capture   states of every layer that a draft may read, as the store has them, against transformers' hidden states
    train     torchspec train: three steps on real SGLang, Mooncake and Ray, then the export
    serve     torchspec eval: SGLang with the draft, every parameter of it checked, greedy answers as without it

The table says ``ok``, or the line that a user reads. Writes benchmarks/results/targets.json; ``--page`` writes
docs/targets.md from it instead.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel

from benchmarks.families import FAMILIES, LAYERS, make_checkpoint
from torchspec.config.schema import Config
from torchspec.contracts import TensorSpec
from torchspec.data.builtin_target import CACHE, MODEL
from torchspec.inference.engine import TargetEngine
from torchspec.inference.sglang_process import EngineSpec
from torchspec.store.client import StoreNode
from torchspec.store.hidden_state_store import HiddenStateStore
from torchspec.store.master import MooncakeMaster

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks/results/targets.json", ROOT / "docs/targets.md"
STAGES = ("plan", "capture", "train", "serve")
AUX_LAYERS = tuple(range(1, LAYERS - 1)), (2, 4)
"""All that a draft may read; and two more, since SGLang's models may count otherwise where the first is not 1."""
TOLERANCE = 2e-3
"""Relative error of a token's state in float32. One layer off is an error of 0.2 and more."""
PROMPTS = ([5, 17, 4093, 198, 7] * 9, [31, 64, 77], [100 + 7 * i for i in range(200)])
COMPLAINT = re.compile(r"error: |the state of |[\w.]+(Error|Exception)\b")
SECONDS = 600.0
"""What a stage may take."""
HEADING = """# Targets

Which families of models TorchSpec trains drafts for, as `python -m benchmarks.targets` found it on a CPU with SGLang
0.5.23. A tiny random checkpoint of each, made by transformers' own classes, is planned (`plan`); the states of every
layer that a draft may read are captured, all at once and two alone, and held against transformers' (`capture`); a draft
is trained for three steps and exported (`train`), and served, every parameter of it checked (`serve`). The table says
which of these were tried and went well, and what stopped the next one. `torchspec plan` refuses by name what SGLang
cannot capture, or not on a CPU. GPUs run more than a CPU; what can be captured is the same.

| family | architecture | went well | what stopped it |
|---|---|---|---|
"""


@dataclass
class Outcome:
    """What came of one family: ``ok`` by stage, or the line that stopped it."""

    family: str
    architecture: str
    stages: dict[str, str] = field(default_factory=dict)


def judge(family: str, folder: Path, overrides: Sequence[str] = (), stages: Sequence[str] = STAGES) -> Outcome:
    """Take one family through the stages, to the first that stops it."""
    checkpoint = folder / "checkpoint"
    model = make_checkpoint(family, checkpoint, (CACHE / MODEL).expanduser())
    outcome = Outcome(family, type(model).__name__)
    torch.save(reference_states(model), folder / "reference.pt")
    del model
    recipe = write_recipe(checkpoint, folder)
    torchspec = [Path(sys.executable).with_name("torchspec")]
    commands = {
        "plan": [*torchspec, "plan", recipe, *overrides],
        "capture": [sys.executable, "-m", "benchmarks.targets", "--capture", folder],
        "train": [*torchspec, "train", recipe, *overrides],
        "serve": [*torchspec, "eval", folder / "runs/targets/export", "--limit", "2", "--max-tokens", "16"],
    }
    for stage in stages:
        outcome.stages[stage] = run_stage([str(part) for part in commands[stage]])
        if outcome.stages[stage] != "ok":
            break
    return outcome


def run_stage(command: list[str]) -> str:
    """``ok``, or the first complaint in what it printed: others follow from that."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL, cwd=ROOT
        )
    except subprocess.TimeoutExpired:
        return f"not done after {SECONDS:.0f} s"
    if done.returncode == 0:
        return "ok"
    lines = [*done.stdout.splitlines(), *done.stderr.splitlines()]
    return next(filter(COMPLAINT.match, lines), f"exit code {done.returncode}")


def write_recipe(checkpoint: Path, folder: Path) -> Path:
    """Three steps, as small as they can be."""
    recipe = {
        "run": {"name": "targets", "dir": str(folder / "runs")},
        "target": {"path": str(checkpoint), "dtype": "float32"},
        "data": {"train": "builtin:train", "limit": 8, "max_seq_length": 320, "vocab_prompts": 4},
        "answer": {"max_tokens": 16},
        "draft": {"vocab_size": 1024, "ttt_length": 2},
        "training": {"max_steps": 3, "batch_size": 2, "dtype": "float32"},
        "monitor": {"ui": False, "trackers": []},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@torch.inference_mode()
def reference_states(model: PreTrainedModel) -> list[torch.Tensor]:
    """Outputs [L + 1, S, H] of the embedding and all layers for each of :data:`PROMPTS`, the last after the norm."""
    texts = [torch.tensor([prompt]) for prompt in PROMPTS]
    return [torch.cat(model(text, output_hidden_states=True).hidden_states) for text in texts]


def capture(folder: Path) -> None:
    """Capture :data:`PROMPTS` in a real engine and hold all states against the reference; raises where they differ."""
    reference = torch.load(folder / "reference.pt", weights_only=True)
    sections = {
        "target": {"path": str(folder / "checkpoint"), "dtype": "float32"},
        "inference": {"max_total_tokens": 16384, "buffer_bytes": 16 << 20},
    }
    config = Config.model_validate(sections)
    with ExitStack() as stack:
        master = MooncakeMaster(folder / "mooncake_master.log")
        stack.callback(master.stop)
        stack.callback(StoreNode(master.endpoint, 256 << 20).close)
        client = HiddenStateStore(master.endpoint, 16 << 20)
        stack.callback(client.close)
        runner = stack.enter_context(asyncio.Runner())
        for layers in AUX_LAYERS:
            engine = TargetEngine(EngineSpec(config, master.endpoint, layers))
            try:
                for number, (prompt, expected) in enumerate(zip(PROMPTS, reference, strict=True)):
                    key = f"{layers[0]}/{number}"
                    compare(client, key, runner.run(engine.capture(key, prompt)).tensors, layers, expected)
            finally:
                engine.stop()


def compare(
    client: HiddenStateStore, key: str, tensors: dict[str, TensorSpec], layers: Sequence[int], expected: torch.Tensor
) -> None:
    """Exits with the first layer that is off."""
    buffer = client.get(key, tensors)
    length, hidden = expected.shape[1:]
    states = [*buffer.views["hs"].view(length, len(layers), hidden).unbind(1), buffer.views["lhs"]]
    for layer, found in zip((*layers, LAYERS - 1), states, strict=True):
        wanted = expected[layer + 1]
        error = float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())
        if not error < TOLERANCE:
            nearest = min(range(LAYERS + 1), key=lambda i: float((found - expected[i]).norm()))
            what = "" if nearest == layer + 1 else f"; it is that of layer {nearest - 1}"
            sys.exit(f"the state of layer {layer} is {error:.1e} off{what}")
    client.release(buffer)


def known() -> dict[str, Any]:
    """The outcomes so far, by family."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def row(family: str, outcome: dict[str, Any]) -> str:
    """Of the page's table: the stages that went well, then what stopped the next."""
    stages = outcome["stages"]
    cells = [", ".join(stage for stage in stages if stages[stage] == "ok")]
    cells.append("".join(f"{stage}: {said}" for stage, said in stages.items() if said != "ok"))
    return f"| {family} | `{outcome['architecture']}` | {' | '.join(cells)} |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(FAMILIES), default=tuple(FAMILIES))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--overrides", nargs="+", default=[], help="of the recipe, such as draft.kind=dflash")
    parser.add_argument("--capture", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--page", action="store_true", help="write docs/targets.md")
    options = parser.parse_args()
    if options.capture is not None:
        capture(options.capture)
        return
    if options.page:
        results = known()
        PAGE.write_text(HEADING + "".join(row(family, results[family]) for family in FAMILIES if family in results))
        return
    for family in options.only:
        with tempfile.TemporaryDirectory(prefix="torchspec-targets-") as name:
            outcome = judge(family, Path(name), options.overrides, options.stages)
        print(family, outcome.stages, flush=True)
        RESULTS.write_text(json.dumps(known() | {family: asdict(outcome)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
