"""Makes the actors of a run: what each is told, which resources it takes, where its output goes.

Every actor writes to ``{run_dir}/logs/{name}.log``, native libraries and child processes included, because the file
takes the place of its standard output and error.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from torchspec.config.load import with_values
from torchspec.config.schema import Config
from torchspec.controller.controller import Controller
from torchspec.controller.spec import ControllerSpec
from torchspec.controller.steps import GroupPlan
from torchspec.data.vocabulary import DraftVocab
from torchspec.driver.placement import Placement, RankSlots
from torchspec.driver.plan import plan_threads
from torchspec.driver.prepare import Prepared
from torchspec.inference.sglang_process import EngineSpec
from torchspec.inference.worker import InferenceWorker
from torchspec.knobs import found
from torchspec.processes.janitor import MARK, start_janitor
from torchspec.store.client import StoreNode
from torchspec.store.endpoint import StoreEndpoint
from torchspec.training.trainer import Trainer, TrainerSpec

LONG_POLLS = 10_000
"""Calls that the controller holds open at a time: every worker and rank waits in one."""
RANK_CALLS = 2
"""``run`` and ``ping``."""
NODE_CALLS = 3
"""``hold``, ``ping`` and ``close``."""


def logged(base: type) -> type:
    """``base`` with its output in a file, given as the first argument of the constructor, and a janitor of its own."""

    class Logged(base):
        def __init__(self, log_path: Path, *args: Any):
            take_over_output(log_path)
            self._janitor = start_janitor(log_path.stem)
            super().__init__(*args)

    Logged.__name__ = Logged.__qualname__ = base.__name__
    return Logged


def take_over_output(path: Path) -> None:
    """Append this process's standard output and error, and its log records, to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, sys.stdout.fileno())
    os.dup2(file, sys.stderr.fileno())
    os.close(file)
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, force=True, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )


def actor_environment(mark: str, threads: int, temp_dir: Path, cache_dir: Path) -> dict[str, str]:
    """Environment variables of an actor and of its children.

    SGLang leaves its sockets in the temporary folder, and whatever is killed leaves all it has there: so ``temp_dir``
    is the run's own, which the driver's janitor removes; on a machine that does not have it, it is the usual one. What
    torch compiles is worth keeping beyond the run.
    """
    return {
        MARK: mark,
        "OMP_NUM_THREADS": str(threads),
        "TMPDIR": str(temp_dir),
        "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(cache_dir / "torchinductor")),
    }


class ActorFactory:
    """Starts actors of one run, with their temporary files in ``temp_dir`` on the driver's machine."""

    def __init__(self, prepared: Prepared, endpoint: StoreEndpoint, placement: Placement, temp_dir: Path):
        self._prepared, self._config, self._endpoint = prepared, prepared.config, endpoint
        self._placement, self._temp_dir = placement, temp_dir
        self._workers = self._nodes = 0

    def log_path(self, name: str) -> Path:
        return self._prepared.folder.log(name)

    def store_node(self) -> Any:
        """A new store node; of those before it none is left."""
        self._nodes += 1
        options = {"max_concurrency": NODE_CALLS, "incarnation": self._nodes, **self._placement.beside_the_driver()}
        size = found(self._config.store.segment_bytes)
        return self._start(StoreNode, "store-node", 1, 0, self._endpoint, size, **options)

    def controller(self) -> Any:
        prepared, resolved = self._prepared, self._prepared.resolved
        spec = ControllerSpec(
            config=self._config,
            train=prepared.train,
            heldout=prepared.heldout,
            geometry=resolved.geometry,
            halo=resolved.draft.halo,
            vocab_size=resolved.target.shape.vocab_size,
            target_fingerprint=resolved.target.fingerprint,
            draft_vocab_size=resolved.draft.vocab_size,
            end_token_ids=resolved.target.end_token_ids,
            endpoint=self._endpoint,
            credit_bytes=prepared.plan.credit_bytes,
            run_dir=prepared.folder.path,
        )
        options = {"max_concurrency": LONG_POLLS, "max_restarts": -1, **self._placement.beside_the_driver()}
        return self._start(Controller, "controller", 1, 0, spec, **options)

    def worker(self, controller: Any, pool: int) -> tuple[str, Any]:
        """A new inference worker, one of ``pool`` that share the cores; its name is never used again."""
        name = f"worker-{self._workers}"
        self._workers += 1
        prepared, resolved = self._prepared, self._prepared.resolved
        pooled = with_values(self._config, {"inference.workers": pool})
        fair = plan_threads(pooled, prepared.plan.cores, resolved.on_gpu)
        engine = EngineSpec(
            config=self._config,
            endpoint=self._endpoint,
            aux_layers=resolved.draft.layers,
            device="cuda" if resolved.on_gpu else "cpu",
            threads=min(fair.inference, prepared.plan.threads.inference),
        )
        gpus = self._config.inference.tp_size if resolved.on_gpu else 0
        told = name, controller, engine
        return name, self._start(InferenceWorker, name, engine.threads, gpus, *told, **self._placement.worker())

    def rank_slots(self, plan: GroupPlan) -> RankSlots:
        """Ask for the slots of a generation."""
        _, threads, gpus = self._rank_size(plan)
        return self._placement.ranks(plan.training.world_size, threads, gpus)

    def _rank_size(self, plan: GroupPlan) -> tuple[Config, int, int]:
        """A generation's config, and the CPUs and GPUs of each of its ranks."""
        config = self._config.model_copy(update={"training": plan.training})
        threads = plan_threads(config, self._prepared.plan.cores, self._prepared.resolved.on_gpu).training
        return config, threads, 1 if self._prepared.resolved.on_gpu else 0

    def trainers(self, vocabulary: DraftVocab, plan: GroupPlan, slots: RankSlots) -> list[Any]:
        """The actors of a generation that has its slots, one a rank, told where to meet."""
        prepared, training, draft = self._prepared, plan.training, self._prepared.resolved.draft
        config, threads, gpus = self._rank_size(plan)
        address, port = ray.get(slots.meeting)
        actors = []
        for rank in range(training.world_size):
            spec = TrainerSpec(
                config=config,
                generation=plan.generation,
                rank=rank,
                world_size=training.world_size,
                address=address,
                port=port,
                threads=threads,
                draft_ids=vocabulary.target_ids,
                draft=draft,
                geometry=replace(prepared.resolved.geometry, sharding=training.shard_formula(draft.halo)),
                total_steps=prepared.total_steps,
                endpoint=self._endpoint,
                run_dir=prepared.folder.path,
                resume=plan.resume,
            )
            options = {"max_concurrency": RANK_CALLS, "incarnation": plan.generation, **slots.places[rank]}
            actors.append(self._start(Trainer, f"trainer-{rank}", threads, gpus, spec, **options))
        return actors

    def _start(
        self, cls: type, name: str, threads: int, gpus: int, *args: Any, incarnation: int = 1, **options: Any
    ) -> Any:
        """An actor, and its log file, called ``name``. Ray knows a later incarnation by another name, because that of
        one that was killed is free only a little later."""
        cache_dir = self._config.data.cache_dir
        environment = actor_environment(self._prepared.mark, threads, self._temp_dir, cache_dir)
        alone = self._config.cluster.address is None  # on a machine of its own, a pool may grow beyond the cores
        actor = ray.remote(logged(cls)).options(
            name=name if incarnation == 1 else f"{name}.{incarnation}",
            num_cpus=0 if alone or cls in (Controller, StoreNode) else threads,
            num_gpus=gpus,
            runtime_env={"env_vars": environment},
            **options,
        )
        return actor.remote(self.log_path(name), *args)
