"""A target's folder: the only reader of its config, its end tokens and its weights.

Everything is read when it is first asked for, so that whoever needs the sizes alone loads no weights.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchspec.target.shape import EXPERTS, TOKENS, UNLIKE_LLAMA, TargetShape
from torchspec.target.weights import BLOCK, Weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
OPTIONAL = ("num_key_value_heads", "head_dim", "rope_parameters", *TOKENS)
"""What a target's config may lack for a draft to be derived from it."""
PIECES, PIECE_BYTES = 64, 4096
"""Of each file of weights, that tell them from others."""
OFFSET_NORMS = re.compile("gemma(2|3_text)?|qwen3_next|qwen3_5.*")
"""Types of language models whose norms multiply by one plus their weights."""
SERVERS_MASK = "<|MASK|>"
"""What SGLang takes for the mask token where a tokenizer has it, whatever a draft's folder says."""
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py")
"""Config, tokenizer, weights, and code that comes with them."""


def find_checkpoint(path: str | Path) -> Path:
    """The folder that ``target.path`` names: one here, else the copy of a model on the Hugging Face Hub.

    The Hub's own cache and variables (``HF_HOME``, ``HF_TOKEN``, ``HF_HUB_OFFLINE``) decide where it lies, who asks,
    and whether anything is downloaded.

    Raises:
        ValueError: there is no such folder, and the Hub has no such model, or does not give it away.
    """
    folder = Path(path).expanduser()
    if folder.exists() or not HUB_NAME.fullmatch(str(path)):
        return folder
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=list(HUB_FILES), ignore_patterns=["*/*", "consol*"]))
    except errors.GatedRepoError:
        reason = "its owner grants access on request: ask for it on its page, then set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        reason = "there is none of that name (a private one needs HF_TOKEN)"
    except errors.LocalEntryNotFoundError:
        reason = "the Hub cannot be reached from here, and its cache has no copy"
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        reason = _first_line(error)
    raise ValueError(
        f"target.path: {path} is neither a folder here nor a model that the Hugging Face Hub gives: {reason}"
    )


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
        if not self.path.is_dir():
            raise ValueError(f"target.path: there is no folder {self.path} (models on the Hub are called OWNER/NAME)")
        if not (self.path / CONFIG).is_file():
            raise ValueError(f"target.path: {self.path} is no checkpoint in Hugging Face format: it has no {CONFIG}")

    @cached_property
    def whole_config(self) -> PretrainedConfig:
        """Of the whole model, which may see or hear. Raises ValueError: transformers cannot read it."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(self._unreadable("config", error)) from None

    @property
    def config(self) -> PretrainedConfig:
        """Of the language model."""
        return self.whole_config.get_text_config()

    @property
    def architecture(self) -> str:
        """The name of the model's class, as servers know it."""
        return (self.whole_config.architectures or [self.whole_config.model_type])[0]

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
        """Raises ValueError: transformers cannot read it."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(self._unreadable("tokenizer", error)) from None

    @cached_property
    def end_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer, by the tokenizer, the config and the generation config."""
        configs = self.config, self.whole_config
        sources = [self.tokenizer.eos_token_id, *(getattr(config, "eos_token_id", None) for config in configs)]
        if (self.path / GENERATION_CONFIG).is_file():
            sources.append(_read_json(self.path / GENERATION_CONFIG).get("eos_token_id"))
        ends = {i for ids in sources for i in (ids if isinstance(ids, list) else [ids])}
        return tuple(sorted(ends - {None}))

    @cached_property
    def weights(self) -> Weights:
        return Weights(self.path, self._block)

    @cached_property
    def head(self) -> str:
        """The name of the tensor that makes logits: the embedding, where the two are tied.

        Raises:
            ValueError: they are not, and there is no head.
        """
        tied, weights = getattr(self.config, "tie_word_embeddings", False), self.weights
        if not tied and weights.head is not None:
            return weights.head
        if not tied and not getattr(self.whole_config, "tie_word_embeddings", False):
            raise ValueError(f"target.path: {self.path} has no lm_head.weight, and its config does not tie the head")
        return weights.embedding

    @property
    def logit_scale(self) -> float:
        """What logits are multiplied by: Cohere's ``logit_scale``; Granite divides by ``logits_scaling``."""
        return getattr(self.config, "logit_scale", None) or 1 / (getattr(self.config, "logits_scaling", None) or 1)

    @property
    def logit_cap(self) -> float | None:
        """c of Gemma's soft cap: logits become ``c * tanh(logits / c)``."""
        return getattr(self.config, "final_logit_softcapping", None) or None

    @property
    def embedding_scale(self) -> float:
        """What the target's own layers get embeddings multiplied by: Gemma by ``sqrt(H)``."""
        is_gemma = self.config.model_type.startswith("gemma")
        return self.config.hidden_size**0.5 if is_gemma else getattr(self.config, "embedding_multiplier", None) or 1.0

    @property
    def norm_offset(self) -> float:
        """What is added to the weights of norms before they multiply."""
        return 1.0 if OFFSET_NORMS.fullmatch(self.config.model_type) else 0.0

    def facts(self) -> dict[str, str]:
        """What was found, for a person to check, by name.

        Raises:
            ValueError: the weights lack what training needs, or a file.
        """
        ends = ", ".join(f"{i} ({self.tokenizer.convert_ids_to_tokens(i)})" for i in self.end_token_ids)
        method = self._quantisation.get("quant_method", "none")
        return {
            "architecture": self.architecture,
            "layers": f"{self.num_layers} of {self.shape.hidden_size:,} features",
            "vocabulary": f"{self.shape.vocab_size:,} tokens; an answer ends with {ends or 'none of them'}",
            "context": f"{self.shape.max_position_embeddings:,} tokens",
            "head": "tied to the embedding" if self.head == self.weights.embedding else self.head,
            "weights": f"{self.num_parameters * 2 / 2**30:.2f} GiB, quantisation: {method}",
        }

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

    @property
    def num_parameters(self) -> int:
        """From the size of the weights' files, taken for two bytes each. Raises ValueError: there are none."""
        return self.weights.num_bytes // 2

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

    @property
    def _quantisation(self) -> Mapping[str, Any]:
        found = getattr(self.whole_config, "quantization_config", None) or {}
        return found if isinstance(found, Mapping) else found.to_dict()

    @property
    def _block(self) -> tuple[int, int]:
        """Rows and columns that share a scale, in the words of DeepSeek or of compressed-tensors."""
        groups = self._quantisation.get("config_groups", {}).values()
        sizes = [(group.get("weights") or {}).get("block_structure") for group in groups]
        rows, columns = self._quantisation.get("weight_block_size") or next(filter(None, sizes), (BLOCK, BLOCK))
        return rows, columns

    def _unreadable(self, what: str, error: Exception) -> str:
        reason = _first_line(error)
        if "trust_remote_code" in str(error):
            reason = "it needs the code that comes with it; if you trust its author, set target.trust_remote_code=true"
        return f"target.path: transformers cannot read the {what} in {self.path}: {reason}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text())
