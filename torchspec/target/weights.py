"""A checkpoint's safetensors files: which tensors there are, what the language model's are called, and their values.

Checkpoints of one family differ in what stands before a name: ``model.``, ``model.language_model.``,
``language_model.model.`` and more. The language model is found by its embedding and its final norm, which are children
of the same module in all of them.

Shapes: O output features (rows), I input features.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
EMBEDDINGS, NORM, HEAD = ("embed_tokens.weight", "word_embeddings.weight"), "norm.weight", "lm_head.weight"
SCALES = ("_scale", "_scale_inv")
"""What is appended to the name of an FP8 tensor for its scales: by compressed-tensors, and by DeepSeek."""
BLOCK = 128
"""Rows and columns that share a scale, unless the config says otherwise."""


@dataclass(frozen=True)
class Weights:
    """The tensors of a folder.

    Args:
        block: rows and columns of an FP8 tensor that share a scale, where scales come by block.
    """

    folder: Path
    block: tuple[int, int] = (BLOCK, BLOCK)

    @cached_property
    def files(self) -> Mapping[str, str]:
        """The file of each tensor. Raises ValueError: there are no weights."""
        from safetensors import safe_open

        if (self.folder / INDEX).is_file():
            files: dict[str, str] = json.loads((self.folder / INDEX).read_text())["weight_map"]
            return files
        if not (self.folder / SINGLE).is_file():
            raise ValueError(
                f"target.path: {self.folder} has no .safetensors weights (neither {SINGLE} nor {INDEX}); others are "
                "not read"
            )
        with safe_open(self.folder / SINGLE, framework="pt") as file:
            return dict.fromkeys(file.keys(), SINGLE)

    @cached_property
    def num_bytes(self) -> int:
        """Of all files. Raises ValueError: one is missing."""
        paths = [self.folder / name for name in sorted(set(self.files.values()))]
        if missing := [path for path in paths if not path.is_file()]:
            raise ValueError(f"target.path: {missing[0]} is missing, which the index lists: is the download complete?")
        return sum(path.stat().st_size for path in paths)

    @cached_property
    def embedding(self) -> str:
        """The name of the language model's. Raises ValueError: there is none."""
        places = [(name.removesuffix(kind), kind) for name in self.files for kind in EMBEDDINGS if name.endswith(kind)]
        found = [place + kind for place, kind in places if place[-1:] in ("", ".") and place + NORM in self.files]
        if not found:
            raise ValueError(
                f"target.path: {self.folder} has no {EMBEDDINGS[0]} with a {NORM} beside it (such as "
                f"model.{EMBEDDINGS[0]} and model.{NORM}): it is not a Llama-like model"
            )
        return min(found, key=len)

    @property
    def prefix(self) -> str:
        """What stands before the names of the language model: ``model.`` in ``model.layers.0.mlp.up_proj.weight``."""
        return next(self.embedding.removesuffix(kind) for kind in EMBEDDINGS if self.embedding.endswith(kind))

    @property
    def norm(self) -> str:
        """The name of the final one."""
        return self.prefix + NORM

    @property
    def head(self) -> str | None:
        """None: the checkpoint has none, as where it is tied to the embedding."""
        found = [name for name in self.files if name == HEAD or name.endswith(f".{HEAD}")]
        return min(found, key=len, default=None)

    def layer(self, number: int) -> str:
        """What stands before the names of a decoder layer."""
        return f"{self.prefix}layers.{number}."

    def layer_tensors(self, number: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape of a decoder layer's weights by their names within it, from the files' headers.

        Raises:
            ValueError: a file is missing.
        """
        prefix, tensors = self.layer(number), {}
        for name in self.files:
            if name.startswith(prefix):
                header = self._open(name).get_slice(name)
                tensors[name.removeprefix(prefix)] = header.get_dtype(), tuple(header.get_shape())
        return tensors

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors and no others, as numbers: codes in FP8 are multiplied by their scales (then float32).

        Raises:
            ValueError: a file or tensor is missing, or it is quantised in another way.
        """
        return {name: self._plain(name) for name in sorted(set(names))}

    def _plain(self, name: str) -> Tensor:
        tensor = self._open(name).get_tensor(name)
        if tensor.is_floating_point() and tensor.element_size() > 1:
            return tensor
        for scales in (name + suffix for suffix in SCALES):
            if tensor.is_floating_point() and scales in self.files:
                return dequantised(tensor, self._open(scales).get_tensor(scales), self.block)
        raise ValueError(
            f"target.path: {name} in {self.folder} is quantised ({str(tensor.dtype).removeprefix('torch.')}) in a way "
            "that is not read here: choose a checkpoint in bfloat16, or one in FP8 with its scales beside"
        )

    def _open(self, name: str) -> Any:
        from safetensors import safe_open

        if name not in self.files:
            raise ValueError(f"target.path: {self.folder} has no tensor {name!r}{self._instead(name)}")
        path = self.folder / self.files[name]
        if not path.is_file():
            raise ValueError(f"target.path: {path} is missing, which the index lists: is the download complete?")
        return safe_open(path, framework="pt")

    def _instead(self, name: str) -> str:
        """What a quantised checkpoint has in place of a weight."""
        module = name.removesuffix("weight")
        packed = sorted(other for other in self.files if other.startswith(module))
        return f", but {packed[0]!r}: quantised weights of this kind are not read here" if packed else ""


def dequantised(codes_OI: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Codes times scales, in float32.

    Args:
        scales: one, one a row ([O] or [O, 1]), or one a block of rows and columns.

    Raises:
        ValueError: there are too many or too few scales.
    """
    scales_OI = scales.float().reshape(len(scales) if scales.dim() else 1, -1)
    for axis, (size, shared) in enumerate(zip(codes_OI.shape, block, strict=True)):
        count = scales_OI.shape[axis]
        each = size if count == 1 else 1 if count == size else shared
        if -(-size // each) != count:
            raise ValueError(
                f"target.path: scales {list(scales.shape)} do not fit a tensor {list(codes_OI.shape)} in blocks of "
                f"{list(block)}"
            )
        scales_OI = scales_OI.repeat_interleave(each, axis).narrow(axis, 0, size)
    return codes_OI.float() * scales_OI
