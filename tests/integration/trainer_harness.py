"""Runs real trainer ranks (Ray actors, gloo, a real store) against a controller that follows a script."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.integration.scripted_controller import ScriptedController, Step
from tests.integration.store_harness import running_store
from torchspec.config.load import parse_config
from torchspec.config.schema import Config
from torchspec.contracts import RankReport, SampleId, SampleRef, StepReport
from torchspec.data.masks import pack_mask
from torchspec.drafts.registry import KINDS
from torchspec.drafts.spec import DraftSpec
from torchspec.network import free_port
from torchspec.shards import ShardFormula
from torchspec.store.endpoint import StoreEndpoint
from torchspec.store.geometry import SampleGeometry
from torchspec.store.hidden_state_store import HiddenStateStore
from torchspec.target.checkpoint import TargetCheckpoint
from torchspec.training.trainer import Trainer, TrainerSpec
from torchspec.training.weights import gather_weights

HIDDEN, VOCAB, AUX_LAYERS = 32, 64, (1, 2, 3)
GEOMETRY = SampleGeometry(num_aux=3, hidden_size=HIDDEN, dtype="float32")
DRAFT_IDS = np.arange(0, VOCAB, 2, dtype=np.int64)
TTT = 3


@dataclass
class Bench:
    """What the tests of a module share."""

    endpoint: StoreEndpoint
    client: HiddenStateStore
    target: Path


@contextmanager
def running_bench(folder: Path) -> Iterator[Bench]:
    """A store, a Ray cluster, a tiny target."""
    with running_store(folder, 64 << 20) as store:
        client = HiddenStateStore(store.endpoint, 8 << 20, "training.buffer_bytes")
        try:
            with running_ray():
                yield Bench(store.endpoint, client, make_target(folder / "target"))
        finally:
            client.close()


@contextmanager
def running_ray() -> Iterator[None]:
    """A Ray cluster whose actors find this checkout."""
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    ray.init(
        address="local",  # not one that happens to run on this machine
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        runtime_env={"env_vars": environment},
    )
    try:
        yield
    finally:
        ray.shutdown()


def make_target(folder: Path) -> Path:
    """A tiny Llama checkpoint with random weights."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,  # teachers that are sure of something
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_config(target: Path, run_dir: Path, **sections: Mapping[str, Any]) -> Config:
    tree: dict[str, dict[str, Any]] = {
        "run": {"name": run_dir.name, "dir": str(run_dir.parent), "seed": 5},
        "target": {"path": str(target), "dtype": "float32"},
        "draft": {"ttt_length": TTT, "vocab_size": len(DRAFT_IDS)},
        "training": {
            **{"dtype": "float32", "device": "cpu", "micro_batch_size": 2, "batch_size": 6},
            **{"buffer_bytes": 64 << 20, "loss_chunk_tokens": 1024},
        },
        "optimizer": {"lr": 0.01, "warmup_ratio": 0.2, "weight_decay": 0.1},
        "checkpoint": {"export": False},
    }
    for name, knobs in sections.items():
        tree[name] = {**tree.get(name, {}), **knobs}
    return parse_config(tree)


def spec_of(config: Config, vocab_size: int = len(DRAFT_IDS)) -> DraftSpec:
    """The draft that ``config`` asks for, with a vocabulary of this size."""
    knobs = config.draft.model_copy(update={"vocab_size": vocab_size})
    return KINDS[knobs.kind].of(knobs, TargetCheckpoint(Path(config.target.path)), AUX_LAYERS)


def put_samples(
    store: HiddenStateStore,
    lengths: Sequence[int],
    *,
    prefix: str,
    first: int = 0,
    unsupervised: Sequence[int] = (),
    sharding: ShardFormula | None = None,
) -> list[SampleRef]:
    """Store samples of random states, equal for equal prompt numbers; the last two thirds of each are supervised."""
    refs = []
    for prompt, length in enumerate(lengths, start=first):
        generator = torch.Generator().manual_seed(prompt)
        tensors = GEOMETRY.tensors(length)
        buffer = store.allocate(tensors)
        buffer.views["hs"].normal_(generator=generator)
        buffer.views["lhs"].normal_(generator=generator)
        buffer.views["ids"].random_(VOCAB, generator=generator)
        mask = [prompt not in unsupervised and 3 * i >= length for i in range(length)]
        key = f"{prefix}-{prompt}"
        put = store.put(key, buffer, sharding)
        num_bytes, packed = put.result(timeout=60), pack_mask(mask)
        refs.append(SampleRef(SampleId(0, prompt), key, length, packed, tensors, num_bytes, "post_norm", sharding))
    return refs


class Rank(Trainer):
    """A trainer rank that a test can look into."""

    def weights(self) -> dict[str, Tensor]:
        return gather_weights(self.learner.parameters)

    def draw(self) -> list[float]:
        """The next random numbers, which tell whether the generator's state is what it should be."""
        return torch.rand(3).tolist()

    def limit_files(self, size: int) -> None:
        """Let every write beyond ``size`` bytes of a file fail in this process, as on a full disk."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@dataclass
class Outcome:
    """What a scripted run led to."""

    log: list[tuple[Any, ...]]
    reports: list[StepReport]
    start: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    draws: list[float] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    ranks: dict[int, RankReport] = field(default_factory=dict)
    """The last word of each rank about itself."""

    @property
    def losses(self) -> list[float]:
        return [r.loss for r in self.reports if r.split == "train"]


def run_script(
    config: Config,
    endpoint: StoreEndpoint,
    steps: Sequence[Step],
    *,
    world: int = 1,
    total_steps: int | None = None,
    resume: Path | None = None,
    first_step: int = 1,
    heldout: Sequence[SampleRef] = (),
    file_limit: int | None = None,
    draft_ids: np.ndarray = DRAFT_IDS,
) -> Outcome:
    """Train ``steps`` with ``world`` new rank processes. Errors of ranks are collected, not raised."""
    training, draft = config.training, spec_of(config, len(draft_ids))
    controller = ray.remote(ScriptedController).options(num_cpus=0)
    controller = controller.remote(steps, world, first_step, heldout, training.sp_size)
    spec = TrainerSpec(
        config=config,
        generation=1,
        rank=0,
        world_size=world,
        address="127.0.0.1",
        port=free_port("127.0.0.1"),
        threads=1,
        draft_ids=draft_ids,
        draft=draft,
        geometry=replace(GEOMETRY, sharding=training.shard_formula(draft.halo)),
        total_steps=total_steps or first_step + len(steps) - 1,
        endpoint=endpoint,
        run_dir=config.run_dir,
        resume=resume,
    )
    ranks = [
        ray.remote(Rank).options(num_cpus=0, max_concurrency=2).remote(replace(spec, rank=r)) for r in range(world)
    ]
    outcome = Outcome([], [])
    try:
        outcome.start = ray.get([rank.weights.remote() for rank in ranks], timeout=120)[0]
        if file_limit is not None:
            ray.get([rank.limit_files.remote(file_limit) for rank in ranks])
        for run in [rank.run.remote(controller) for rank in ranks]:
            try:
                ray.get(run, timeout=120)
            except ray.exceptions.RayTaskError as error:
                outcome.errors.append(error.cause)
        if not outcome.errors:
            outcome.weights = ray.get([rank.weights.remote() for rank in ranks], timeout=60)[0]
            outcome.draws = ray.get(ranks[0].draw.remote())
        outcome.log, outcome.reports, outcome.ranks = ray.get(controller.told.remote())
    finally:
        for actor in [*ranks, controller]:
            ray.kill(actor)
    return outcome
