"""A target's folder: the only reader of its config, its end tokens and its weights.

Everything is read when it is first asked for, so that whoever needs the sizes alone loads no weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchspec.target.shape import EXPERTS, TOKENS, UNLIKE_LLAMA, TargetShape

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
OPTIONAL = ("num_key_value_heads", "head_dim", "rope_parameters", *TOKENS)
"""What a target's config may lack for a draft to be derived from it."""
PIECES, PIECE_BYTES = 64, 4096
"""Of each file of weights, that tell them from others."""
SERVERS_MASK = "<|MASK|>"
"""What SGLang takes for the mask token where a tokenizer has it, whatever a draft's folder says."""


@dataclass(frozen=True)
class TargetCheckpoint:
    """A checkpoint in Hugging Face format.

    Args:
        trust_remote_code: run the Python code that comes with it.

    Raises:
        ValueError: the folder is none.
    """

    path: Path
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path).expanduser())
        if not (self.path / CONFIG).is_file():
            raise ValueError(f"target.path: {self.path} is no checkpoint in Hugging Face format: it has no {CONFIG}")

    @cached_property
    def config(self) -> PretrainedConfig:
        """Of the language model."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.path, trust_remote_code=self.trust_remote_code).get_text_config()

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    @cached_property
    def shape(self) -> TargetShape:
        """Raises ValueError: no draft could be trained for such a model."""
        names = (*TargetShape.names().values(), *UNLIKE_LLAMA)
        given = {name: value for name in names if (value := getattr(self.config, name, None)) is not None}
        optional = OPTIONAL if not given.keys() & {*EXPERTS} else (*OPTIONAL, "intermediate_size")
        if missing := [name for name in TargetShape.names().values() if name not in (*given, *optional)]:
            raise ValueError(f"the target's config has no {', '.join(missing)}: it is not a Llama-like model")
        return TargetShape.of_target(given)

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)

    @cached_property
    def end_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer, by the tokenizer and by the generation config."""
        ends = {self.tokenizer.eos_token_id}
        if (self.path / GENERATION_CONFIG).is_file():
            ids = _read_json(self.path / GENERATION_CONFIG).get("eos_token_id")
            ends.update(ids if isinstance(ids, list) else [ids])
        return tuple(sorted(i for i in ends if i is not None))

    @cached_property
    def mask_token_id(self) -> int:
        """A token that no text holds, for what a draft has yet to guess.

        The tokenizer's mask token, else an embedding row without a token, else a special token that has no role and
        that the chat template does not write (one called reserved or unused before others).

        Raises:
            ValueError: there is none.
        """
        tokenizer, size = self.tokenizer, self.shape.vocab_size
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        own = vocabulary.get(SERVERS_MASK, tokenizer.mask_token_id)
        if own is not None and own < size:
            return own
        used = set(vocabulary.values())
        if (free := next((i for i in range(size) if i not in used), None)) is not None:
            return free
        roles, template = {*tokenizer.all_special_ids, *self.end_token_ids}, str(tokenizer.chat_template)
        spare = {
            i: any(word in str(token) for word in ("reserved", "unused"))
            for i, token in tokenizer.added_tokens_decoder.items()
            if token.special and i not in roles and str(token) not in template and i < size
        }
        if not spare:
            raise ValueError(
                f"draft.mask_token_id: {self.path} has no mask token, no embedding row without a token and no special "
                "token to spare; name the id of one that no text holds"
            )
        return max(spare, key=lambda i: (spare[i], i))

    @cached_property
    def num_parameters(self) -> int:
        """From the size of the weights' files, taken for two bytes each. Raises ValueError: there are none."""
        weights = list(self.path.glob("*.safetensors"))
        if not weights:
            raise ValueError(f"target.path: {self.path} has no .safetensors weights")
        return sum(file.stat().st_size for file in weights) // 2

    @cached_property
    def fingerprint(self) -> str:
        """The same for every copy of this checkpoint, and another for other weights, however alike their config."""
        digest = hashlib.sha256()
        for file in sorted(self.path.glob("*.safetensors")):
            size = file.stat().st_size
            digest.update(f"{file.name} {size} ".encode())
            with file.open("rb") as weights:
                for piece in range(PIECES):
                    weights.seek(size * piece // PIECES)
                    digest.update(weights.read(PIECE_BYTES))
        return digest.hexdigest()[:16]

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read the named tensors of the safetensors files, one or several, and no others.

        Raises:
            ValueError: a file or tensor is missing.
        """
        from safetensors import safe_open

        wanted = sorted(set(names))
        files = self._files_of(wanted)
        tensors = {}
        for name in wanted:
            with safe_open(self.path / files[name], framework="pt") as shard:
                if name not in shard.keys():  # noqa: SIM118 (a shard is no dict)
                    raise ValueError(f"target.path: {self.path / files[name]} has no tensor {name!r}")
                tensors[name] = shard.get_tensor(name)
        return tensors

    def layer_tensors(self, number: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape of the weights of a decoder layer, by their names within it; nothing of them is read.

        Raises:
            ValueError: a file is missing.
        """
        from safetensors import safe_open

        prefix = f"model.layers.{number}."
        index = self._files_of([])
        files = {file for name, file in index.items() if name.startswith(prefix)} if index else {SINGLE}
        tensors = {}
        for file in files:
            with safe_open(self.path / file, framework="np") as shard:
                for name in shard.keys():  # noqa: SIM118 (a shard is no dict)
                    if name.startswith(prefix):
                        found = shard.get_slice(name)
                        tensors[name.removeprefix(prefix)] = found.get_dtype(), tuple(found.get_shape())
        return tensors

    def _files_of(self, names: list[str]) -> Mapping[str, str]:
        if not (self.path / INDEX).is_file():
            if not (self.path / SINGLE).is_file():
                raise ValueError(f"target.path: {self.path} has neither {SINGLE} nor {INDEX}")
            return dict.fromkeys(names, SINGLE)
        index: dict[str, str] = _read_json(self.path / INDEX)["weight_map"]
        if missing := [name for name in names if name not in index]:
            raise ValueError(f"target.path: {self.path / INDEX} lists no tensor {missing[0]!r}")
        return index


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text())
