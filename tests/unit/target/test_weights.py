"""FP8 weights are read as the numbers they stand for; what is packed in other ways is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from torchspec.target.weights import Weights

NAME = "model.layers.0.mlp.up_proj.weight"


def spread(scales: Tensor, shape: tuple[int, int]) -> Tensor:
    """The scale of each element: one of a row, of a column, or of a block of 128."""
    rows, columns = (
        torch.arange(size) // (128 if 1 < n < size else 1) % n for size, n in zip(shape, scales.shape, strict=True)
    )
    return scales[rows][:, columns]


@pytest.mark.parametrize(
    ("suffix", "counts", "stored"),
    [
        ("_scale", (1, 1), (1,)),
        ("_scale", (1, 1), ()),
        ("_scale", (300, 1), (300, 1)),
        ("_scale", (300, 1), (300,)),
        ("_scale_inv", (3, 2), (3, 2)),
    ],
    ids=["one", "a number", "rows", "rows, flat", "blocks"],
)
def test_fp8_is_multiplied_by_its_scales(
    suffix: str, counts: tuple[int, int], stored: tuple[int, ...], tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(300, 200, generator=generator)
    scales = 0.01 + torch.rand(counts, generator=generator)
    codes = (weight_OI / spread(scales, (300, 200))).to(torch.float8_e4m3fn)
    save_file({NAME: codes, NAME + suffix: scales.reshape(stored)}, tmp_path / "model.safetensors")
    found = Weights(tmp_path).read([NAME])[NAME]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, weight_OI, rtol=0.07, atol=0.01)


def test_plain_tensors_stay_as_they_are(tmp_path: Path) -> None:
    weight = torch.randn(4, 4).bfloat16()
    save_file({NAME: weight}, tmp_path / "model.safetensors")
    assert torch.equal(Weights(tmp_path).read([NAME])[NAME], weight)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {NAME: torch.zeros(4, 4).to(torch.float8_e4m3fn)},
            r"is quantised \(float8_e4m3fn\) in a way that is not read",
        ),
        ({NAME: torch.zeros(4, 4, dtype=torch.uint8)}, r"is quantised \(uint8\)"),
        (
            {NAME.replace("weight", "qweight"): torch.zeros(4)},
            "has no tensor .*up_proj.weight', but .*up_proj.qweight'",
        ),
        (
            {NAME: torch.zeros(300, 200).to(torch.float8_e4m3fn), NAME + "_scale_inv": torch.zeros(2, 2)},
            r"scales \[2, 2\] do not fit a tensor \[300, 200\] in blocks of \[128, 128\]",
        ),
    ],
    ids=["no scales", "integers", "packed", "other blocks"],
)
def test_other_codes_are_refused(tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"target\\.path: .*{message}"):
        Weights(tmp_path).read([NAME])


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    index = {"weight_map": {NAME: "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"00001-of-00002\.safetensors is missing, which the index lists"):
        _ = Weights(tmp_path).num_bytes


def test_the_language_model_is_the_one_with_an_embedding_and_a_final_norm(tmp_path: Path) -> None:
    names = [
        "model.visual.blocks.0.norm1.weight",
        "model.language_model.embed_tokens.weight",
        "model.language_model.norm.weight",
        "model.language_model.layers.61.embed_tokens.weight",
        "mtp.norm.weight",
    ]
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "model.safetensors")
    weights = Weights(tmp_path)
    assert (weights.embedding, weights.head) == ("model.language_model.embed_tokens.weight", None)
    assert weights.layer(3) == "model.language_model.layers.3."
