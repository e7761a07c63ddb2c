"""Every knob of a run but those of a kind of draft (``drafts/KIND/spec.py``): default, unit, and what it is for.

One pydantic model a section. Unknown keys are refused (``config/load.py`` names the nearest valid one). The resolved
config is saved with the run; it holds no secrets.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import ByteSize, Field, PositiveInt, SerializeAsAny, field_validator, model_validator

from torchspec.data.conversations import COLUMNS
from torchspec.drafts.registry import DEFAULT, KINDS, kind_of
from torchspec.drafts.shape import DraftKnobs
from torchspec.knobs import Section
from torchspec.shards import ShardFormula


class RunConfig(Section):
    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the run's folder, its Ray namespace and its keys in the store."""
    dir: Path = Path("runs")
    """The run's folder is ``{dir}/{name}``: config, answers, rejected samples, checkpoints, exports, logs."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seeds the order of prompts, sampled answers and the draft's initialisation."""


class TargetConfig(Section):
    path: str
    """Folder of the target checkpoint in Hugging Face format (safetensors and tokenizer), or a model's name on the Hub
    (``Qwen/Qwen3-8B``), which is then downloaded to its cache."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What the target runs in, and what its hidden states are stored in. ``auto`` is bfloat16 where the hardware
    multiplies it, else float32."""
    trust_remote_code: bool = False
    """Run Python code that ships with the checkpoint. Off unless you trust its author."""
    aux_layers: list[int] | None = None
    """0-based target layers whose outputs feed the draft. Default: as its kind says."""


class DataConfig(Section):
    train: str = "builtin:train"
    """Conversations: a file (.jsonl, .json, .parquet), a folder of such files, a glob, ``builtin:train``, or
    ``hub:OWNER/NAME:SPLIT`` of the Hugging Face hub. A row has ``messages`` (OpenAI), ``conversations`` (ShareGPT),
    ``prompt``, or ``input_ids`` and ``loss_mask``. ``torchspec data`` shows what is made of them."""
    columns: dict[str, str] = Field(default_factory=dict)
    """What the set calls a row's keys, where that is something else: ``{messages: chat, id: uuid}``."""
    chat_template: str | None = None
    """A Jinja chat template (text or path) instead of the tokenizer's own."""
    template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """More arguments of the chat template, such as ``{enable_thinking: false}``: those that the server will use."""
    max_seq_length: int = Field(default=2048, ge=8)
    """Longest sample in tokens, prompt and answer together."""
    too_long: Literal["reject", "truncate"] = "reject"
    """A longer conversation is rejected, by name, or cut at ``max_seq_length``. A prompt that the target has to answer
    is never cut."""
    min_loss_tokens: int = Field(default=2, ge=1)
    """A sample with fewer tokens to learn from is rejected, by name."""
    last_turn_only: bool = False
    """Learn from the last assistant turn alone instead of from all of them."""
    on_error: Literal["stop", "reject"] = "stop"
    """A malformed line (not JSON, none of the forms of a row) stops the run before it starts, or is listed in
    rejected.jsonl and passed over. A conversation that cannot be used is always listed and passed over."""
    limit: int | None = Field(default=None, ge=1)
    """Use the first so many conversations only."""
    vocab_prompts: int = Field(default=128, ge=1)
    """For a draft with a vocabulary of its own and prompts without an answer: it is counted over the first so many
    answers, then training starts. The store need not hold them all."""
    cache_dir: Path = Path("~/.cache/torchspec")
    """Tokenised data sets and draft vocabularies are kept here under the hash of what they were made from."""

    @field_validator("columns")
    @classmethod
    def check_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        if unknown := sorted(columns.keys() - set(COLUMNS)):
            raise ValueError(f"data.columns: {', '.join(unknown)} is no key of a row; valid: {', '.join(COLUMNS)}")
        return columns


class AnswerConfig(Section):
    max_tokens: int = Field(default=512, ge=1)
    """Longest answer the target writes to a prompt that has none."""
    temperature: float = Field(default=0.0, ge=0)
    """0 is greedy. Drafts that serve sampled traffic gain from a temperature near 1."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample among the likeliest tokens that together have this probability. 1 is all of them."""
    reuse: Path | None = None
    """An ``answers.jsonl`` of an earlier run with the same prompts, target and sampling: what it holds is prefilled,
    not written again, and cut where it is longer than this run allows."""


class InferenceConfig(Section):
    workers: PositiveInt | Literal["auto"] = 1
    """SGLang engines. They pull work, so uneven speed and late joiners need no setting. ``auto`` holds as many as the
    trainers need not to wait; ``torchspec scale`` changes it while the run goes on."""
    min_workers: int = Field(default=1, ge=1)
    """Fewest engines of ``workers: auto``, and how many it starts with."""
    max_workers: int = Field(default=4, ge=1)
    """Most engines of ``workers: auto``."""
    tp_size: int = Field(default=1, ge=1)
    """Tensor parallelism inside one engine (GPUs)."""
    threads: PositiveInt | Literal["auto"] = "auto"
    """CPU threads of one engine. ``auto`` shares the node's cores among both pools."""
    max_concurrency: int | None = Field(default=None, ge=1)
    """Samples one engine works on at a time. Default: 32 on a CPU, 128 on a GPU, and no more than its share of
    ``controller.reorder_window``."""
    chunked_prefill_size: int | None = Field(default=None, ge=16)
    """Tokens of one prefill chunk. Default: 2048 on a CPU, SGLang's own choice on a GPU."""
    max_total_tokens: int | None = Field(default=None, ge=64)
    """KV-cache pool of one engine, in tokens. Default: on a CPU room for ``max_concurrency`` of the longest samples, at
    most 32768 tokens unless a single one needs more; SGLang's own choice on a GPU."""
    mem_fraction_static: float | None = Field(default=None, gt=0, lt=1)
    """Share of the memory that weights and KV cache may take. Default: SGLang's own choice on a GPU, half on a CPU,
    where ``max_total_tokens`` decides how much of it is used."""
    buffer_bytes: ByteSize | None = Field(default=None, ge=1 << 20)
    """Registered host buffer of one engine, which gathers the states of the samples it works on. Default: room for
    ``max_concurrency`` of the largest and two on their way to the store, at most 4 GiB."""
    engine_args: dict[str, Any] = Field(default_factory=dict)
    """More arguments of ``sglang.Engine``, for what this section does not name."""

    @property
    def first_workers(self) -> int:
        """Engines that a run starts with."""
        return self.min_workers if self.workers == "auto" else self.workers

    @property
    def most_workers(self) -> int:
        """Engines that a run may come to have by itself."""
        return self.max_workers if self.workers == "auto" else self.workers


class StoreConfig(Section):
    segment_bytes: ByteSize | None = Field(default=None, ge=16 << 20)
    """Memory of the Mooncake store on one node. Default: room for ``controller.reorder_window`` of the longest samples,
    at most a quarter of the machine's memory, at least 1 GiB; pages are touched as samples arrive."""
    protocol: Literal["tcp", "rdma"] = "tcp"
    """Transport between hosts."""
    host: str | None = None
    """Address that the master binds, and so the network that the run uses. Default: loopback, or on a cluster of
    several machines the address that the driver's node has in it."""
    master_port: int | None = Field(default=None, ge=1, le=65535)
    """Fixed port of the master. Default: a free one."""


class ControllerConfig(Section):
    reorder_window: int = Field(default=256, ge=1)
    """How many samples beyond the oldest untrained one may be in the making. Bounds what a slow prompt holds up."""
    max_attempts: int = Field(default=3, ge=1)
    """A sample that has failed so often, or been in so many deaths of workers (the last one alone), is rejected."""
    prefetch_steps: int = Field(default=2, ge=1)
    """Batches handed to a rank before it has finished the current one, that one included."""


class OptimizerConfig(Section):
    lr: float = Field(default=5e-5, gt=0)
    """Peak learning rate. 5e-5 suits days, 2e-3 suits minutes."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the gradient's running mean and of its running square."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator of AdamW's update."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay: each step shrinks the weights by ``lr`` times this."""
    clip: float = Field(default=0.5, gt=0)
    """Largest global gradient norm."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after the warm-up. ``wsd`` holds the peak, then decays linearly over ``decay_ratio``."""
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    """Share of all steps spent on the linear warm-up."""
    decay_ratio: float = Field(default=0.2, gt=0, le=1)
    """Share of all steps that ``wsd`` decays over."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """Where the schedule ends, as a share of ``lr``."""


class TrainingConfig(Section):
    epochs: int = Field(default=1, ge=1)
    """How often each prompt is trained on. From the second time on, its answer is only prefilled."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after so many steps, whatever ``epochs`` says."""
    batch_size: int = Field(default=8, ge=1)
    """Samples of one optimizer step, over all data-parallel ranks."""
    micro_batch_size: int = Field(default=4, ge=1)
    """Samples a rank works on at once; the rest of its share is accumulated."""
    dp_size: int = Field(default=1, ge=1)
    """Data-parallel ranks: each has samples of its own."""
    attention_backend: Literal["flash", "usp"] = "flash"
    """``usp`` shares every sample among ``sp_ulysses_size * sp_ring_size`` ranks (sequence parallelism), for samples
    too long for one. There are ``dp_size`` times as many ranks then."""
    sp_ulysses_size: int = Field(default=1, ge=1)
    """Ranks that split the attention heads of a sample; must divide the draft's query heads. Cheapest inside a node."""
    sp_ring_size: int = Field(default=1, ge=1)
    """Ranks (or groups of Ulysses ranks) that pass keys and values around; any number."""
    sp_layout: Literal["contiguous", "zigzag"] = "zigzag"
    """``zigzag`` gives a rank one early and one late part of a sample, so that all have the same work in a ring."""
    sp_gather_once: bool = True
    """Gather a sample's keys and values once and keep them. Off sends them around the ring in each step of the draft:
    less memory, as many times the traffic."""
    sharding: Literal["fsdp2", "replicated"] = "fsdp2"
    """``fsdp2`` shards weights, gradients and optimizer over all ranks; ``replicated`` keeps them whole on each."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Autocast dtype; the weights' masters are float32. ``auto`` as for ``target.dtype``."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` takes CUDA where there is one."""
    threads: PositiveInt | Literal["auto"] = "auto"
    """CPU threads of one rank. ``auto`` shares the node's cores among both pools."""
    compile: bool = False
    """Compile the draft with torch.compile; falls back to eager, with a warning, where no compiler is found."""
    activation_checkpointing: bool = False
    """Recompute the decoder layer in the backward pass: less memory, more time."""
    loss_chunk_tokens: int | None = Field(default=None, ge=16)
    """Positions whose logits exist at the same time. Default: 1024, fewer where their logits over the target's
    vocabulary would take more than a 32nd of the memory. Lower it when the loss runs out of memory."""
    buffer_bytes: ByteSize | None = Field(default=None, ge=1 << 20)
    """Registered host buffer of one rank, into which samples arrive. Default: two of the largest, at least 64 MiB."""
    init_from: Path | None = None
    """Start from the weights of this checkpoint or exported draft (weights only: fresh optimizer, schedule, ledger)."""

    @property
    def sp_size(self) -> int:
        """Ranks that share a sample."""
        return self.sp_ulysses_size * self.sp_ring_size

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.dp_size * self.sp_size

    def total_steps(self, prompts: int, rejected: int = 0) -> int:
        """Optimizer steps of a run over so many prompts, of whose samples so many are rejected."""
        steps = -(-(prompts * self.epochs - rejected) // self.batch_size)
        return min(steps, self.max_steps) if self.max_steps is not None else steps

    def shard_formula(self, halo: int | None) -> ShardFormula | None:
        """How samples are split among the ranks that share them; None where every rank holds them whole.

        Args:
            halo: of the draft's spec.

        Raises:
            ValueError: samples of this kind of draft cannot be shared.
        """
        if self.attention_backend != "usp":
            return None
        if halo is None:
            raise ValueError("training.attention_backend=usp: ranks cannot share the samples of this kind of draft")
        return ShardFormula(self.sp_ulysses_size, self.sp_ring_size, self.sp_layout, halo)


class EvaluationConfig(Section):
    heldout: str | None = None
    """Held-out conversations (like ``data.train``), scored during the run without touching the training queue."""
    samples: int = Field(default=32, ge=1)
    """Use the first so many of them."""
    every_steps: int = Field(default=100, ge=1)
    """Score them after so many steps, and before each checkpoint but one that a stop asks for."""


class CheckpointConfig(Section):
    every_steps: int = Field(default=200, ge=1)
    """Save after so many steps; also at the end and at a stop."""
    keep: int = Field(default=3, ge=1)
    """Newest checkpoints kept. ``best`` (by held-out simulated accept length) is kept beside them; one saved at a
    stop has no score, so it is never ``best``."""
    export: bool = True
    """Write the Hugging Face folder of the draft after every save."""
    export_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """What the exported weights are rounded to."""


class ClusterConfig(Section):
    address: str | None = None
    """An existing Ray cluster (``auto``, ``host:port``). Default: start one on this machine."""
    nodes: int = Field(default=1, ge=1)
    """Wait until the existing cluster has so many nodes; with more than one, also until it answers at all."""
    wait_seconds: float = Field(default=600.0, gt=0)
    """How long to wait for them."""
    inference_resource: str | None = None
    """Ray resource of the nodes that inference workers go to, as in ``ray start --resources='{"torchspec_inference":
    1}'``. Default: any node."""
    training_resource: str | None = None
    """Ray resource of the nodes that training ranks go to. Default: any node."""
    num_cpus: int | None = Field(default=None, ge=1)
    """Cores of the cluster started here. Default: all of the machine's."""
    dashboard: bool = False
    """Start Ray's own dashboard, on loopback."""


class RecoveryConfig(Section):
    hang_seconds: float = Field(default=15.0, ge=2)
    """A part of the run that has given no sign of life for so long is killed and replaced. A machine that is busy
    beyond its cores needs more; seconds in which the driver itself was stopped do not count."""
    start_seconds: float = Field(default=900.0, ge=10)
    """What an engine or a training rank has to start up, its model loaded, before it is taken for hung."""
    stuck_seconds: float = Field(default=600.0, ge=10)
    """A collective of the training ranks, or a step of an engine's scheduler, that takes longer is stuck, though its
    process lives: the ranks start anew, the engine is replaced."""
    max_restarts: int = Field(default=3, ge=0)
    """How often the training group, or the controller, is restarted without a new step in between. Then the run fails
    and says why; it can be resumed."""


class MonitorConfig(Section):
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(default=["tensorboard"])
    """Where figures go besides the run's folder. TensorBoard's logs lie in that; W&B and MLflow are extras
    (``torchspec[wandb]``, ``torchspec[mlflow]``) and go where their own environment variables say."""
    project: str = "torchspec"
    """Project of W&B, experiment of MLflow."""
    live: Literal["auto", "on", "off"] = "auto"
    """The terminal view while training; ``auto`` shows it on a terminal and prints plain lines elsewhere."""
    every_steps: int = Field(default=10, ge=1)
    """Plain lines: one each so many steps."""
    history_seconds: float = Field(default=2.0, ge=0, le=2)
    """Write down so often how the run is doing, for the page, ``torchspec top`` and ``status``. 0: never."""
    profile_steps: tuple[PositiveInt, PositiveInt] | None = None
    """Profile these steps, first and last, with torch's profiler: a trace of each rank in the run's ``profile``."""
    ui: bool = True
    """Serve the run's page on loopback while it runs, to who has its token (``ui_token`` in the run's folder)."""
    ui_port: int | None = Field(default=None, ge=1, le=65535)
    """Port of the page. Default: 8790, or a free one where that is taken."""
    peak_flops: float | None = Field(default=None, gt=0)
    """Floating-point operations a second of one rank's device, for model FLOPs utilisation. Default: as NVIDIA says for
    common GPUs in bfloat16; unknown elsewhere, and utilisation is left out."""


class Config(Section):
    """The whole of a run."""

    run: RunConfig = Field(default_factory=RunConfig)
    target: TargetConfig
    data: DataConfig = Field(default_factory=DataConfig)
    answer: AnswerConfig = Field(default_factory=AnswerConfig)
    inference: InferenceConfig = Field(default_factory=InferenceConfig)
    store: StoreConfig = Field(default_factory=StoreConfig)
    controller: ControllerConfig = Field(default_factory=ControllerConfig)
    draft: SerializeAsAny[DraftKnobs] = Field(default_factory=KINDS[DEFAULT].Knobs)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    recovery: RecoveryConfig = Field(default_factory=RecoveryConfig)
    monitor: MonitorConfig = Field(default_factory=MonitorConfig)

    @model_validator(mode="before")
    @classmethod
    def fill_empty_sections(cls, tree: dict[str, Any]) -> dict[str, Any]:
        """``data:`` with nothing below it is null to YAML, and all defaults to us."""
        return {name: value for name, value in tree.items() if value is not None or name not in cls.model_fields}

    @field_validator("draft", mode="before")
    @classmethod
    def parse_draft(cls, section: Any) -> Any:
        """The knobs of its kind, and no other's."""
        kind = kind_of(section)
        if kind not in KINDS:
            raise ValueError(f"draft.kind: {kind!r} does not fit; valid: {' | '.join(KINDS)}")
        return KINDS[kind].Knobs.model_validate({} if section is None else section)

    @model_validator(mode="after")
    def check_together(self) -> Config:
        """What fits each by itself must fit the others, too."""
        inference, training, window = self.inference, self.training, self.controller.reorder_window
        steps, wrong = self.monitor.profile_steps, list[str]()
        if inference.min_workers > inference.max_workers:
            wrong.append(
                f"inference.min_workers ({inference.min_workers}) is larger than inference.max_workers "
                f"({inference.max_workers})"
            )
        if training.batch_size < training.dp_size:
            wrong.append(
                f"training.batch_size ({training.batch_size}) is smaller than training.dp_size "
                f"({training.dp_size}): some ranks would never train; raise the one or lower the other"
            )
        if window < training.batch_size:
            wrong.append(
                f"controller.reorder_window ({window}) is smaller than training.batch_size ({training.batch_size}): "
                "a batch could never fill"
            )
        if training.attention_backend != "usp" and training.sp_size > 1:
            wrong.append(
                f"training.sp_ulysses_size ({training.sp_ulysses_size}) and training.sp_ring_size "
                f"({training.sp_ring_size}) need training.attention_backend=usp; it is {training.attention_backend}"
            )
        if steps is not None and steps[0] > steps[1]:
            wrong.append(f"monitor.profile_steps ({list(steps)}) must be a first and a last step, in this order")
        if wrong:
            raise ValueError("\n".join(wrong))
        return self

    @property
    def run_dir(self) -> Path:
        return self.run.dir / self.run.name
