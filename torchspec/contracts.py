"""The messages that cross a process boundary, and nothing else.

Every actor, worker and command of a run speaks in these frozen dataclasses. The module imports the standard
library and what needs no more than that, so that a process needs neither torch nor ray to read a message.

A *sample* is one prompt in one epoch. It is in exactly one state at a time (see ``controller/ledger.py``) and
its tensors live in the store under ``{key}_{hs,lhs,ids}``; what travels here is metadata.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple

from torchspec.instruments import EMPTY, Histogram
from torchspec.shards import ShardFormula

HELDOUT_EPOCH = -1
"""The epoch number of held-out samples: captured once, evaluated many times, never trained."""

NormState = Literal["post_norm", "pre_norm"]
"""Whether ``lhs`` was taken after or before the target's final norm. SGLang hands over ``post_norm``."""

FailureKind = Literal["retry", "final", "no_room", "no_store"]
"""What a failed lease calls for: another attempt, a rejection, a wait until the store has room, or until it is back.
Only the first two are held against the sample."""


class SampleId(NamedTuple):
    """Names a sample for the whole life of a run: row ``prompt`` of the prompt set in epoch ``epoch``."""

    epoch: int
    prompt: int

    def __str__(self) -> str:
        return f"e{self.epoch}p{self.prompt}"


class RankId(NamedTuple):
    """A training rank. Each time the training group is rebuilt is a *generation* of ranks, numbered through the run,
    so that what a rank of an earlier one still says is not taken for the new one's."""

    generation: int
    rank: int


@dataclass(frozen=True, slots=True)
class Lease:
    """One sample handed to one inference worker.

    ``input_ids`` is the prompt when ``max_new_tokens > 0`` (the target answers, and what it reads while doing so is
    captured: all but the answer's last token) and the whole text to capture otherwise. Token ids are packed
    little-endian int32.
    """

    sample: SampleId
    key: str
    """Store key prefix; unique for each attempt, so a late put of a dead worker can never be read."""
    input_ids: bytes
    loss_mask: bytes
    """Packed mask of ``input_ids`` (``data/masks.py``); empty when the answer has yet to be written."""
    max_new_tokens: int
    seed: int
    """Sampling seed, a function of the run's seed, the epoch and the prompt."""
    credit_bytes: int
    """Upper bound of what the sample may occupy in the store, reserved since the lease was given out."""
    sharding: ShardFormula | None = None
    """How to split what is stored among ranks that share the sample; None: whole."""

    @property
    def max_tokens(self) -> int:
        """That the sample can have."""
        return len(self.input_ids) // 4 + self.max_new_tokens


ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "int32": 4}
"""The dtypes that the store carries, by torch's names, and the bytes of one element."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Global shape and dtype name (``bfloat16``, ``int32``) of one stored tensor."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Of its data.

        Raises:
            ValueError: the store does not carry this dtype.
        """
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"the store does not carry dtype {self.dtype!r}; it carries {', '.join(ITEM_BYTES)}")
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class SampleRef:
    """Where a captured sample lies and how to read it. Shapes: hs [S, F*H], lhs [S, H], ids [S]."""

    sample: SampleId
    key: str
    num_tokens: int
    loss_mask: bytes
    """Packed mask over the ``num_tokens`` tokens."""
    tensors: dict[str, TensorSpec]
    """Suffix (``hs``, ``lhs``, ``ids``) to global shape and dtype."""
    num_bytes: int
    norm_state: NormState
    sharding: ShardFormula | None = None
    """How the objects are split among SP ranks: ``{key}_usp{rank}_{suffix}``. None: ``{key}_{suffix}``."""


MicroBatches = tuple[tuple[SampleRef, ...], ...]
"""One rank's samples of a step, micro-batch by micro-batch."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the target wrote for a prompt, kept with the run so that later epochs only prefill."""

    prompt: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str


@dataclass(frozen=True, slots=True)
class SampleTiming:
    """How long a worker needed for one sample. Durations, because the clocks of two machines differ."""

    queue_seconds: float
    """From the lease's arrival to the engine's taking it on."""
    compute_seconds: float
    """In the engine: prefill, and decode where there was an answer to write."""
    hold_seconds: float
    """From the last token to the start of the put: checks, and puts that were before it."""
    put_seconds: float


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """Counters of one inference worker since it began to ask for leases."""

    worker: str
    samples: int = 0
    tokens: int = 0
    """Tokens captured (prompt, and the answer without its last token)."""
    answer_tokens: int = 0
    put_bytes: int = 0
    put_seconds: float = 0.0
    """Of all puts; they overlap each other and the engine's work."""
    busy_seconds: float = 0.0
    """Holding at least one lease."""
    seconds: float = 0.0
    """Since it began. ``seconds - busy_seconds`` was spent waiting for a lease with empty hands."""
    engine_seconds: float = 0.0
    """With at least one request in the engine; the rest of ``busy_seconds`` was spent on puts alone."""
    failures: int = 0
    """Leases that came to nothing."""
    leases: int = 0
    """That it holds now."""
    put_histogram: Histogram = EMPTY
    """Latencies of puts (``instruments.py``)."""


@dataclass(frozen=True, slots=True)
class RankReport:
    """Counters of one training rank since it joined. Seconds of the step loop but for ``get_seconds``."""

    rank: int
    step: int = 0
    """The last step it has made."""
    steps: int = 0
    tokens: int = 0
    """Of its own samples; those that share a sample count it once."""
    seconds: float = 0.0
    """Since it joined: the sum of the parts below and little else."""
    wait_seconds: float = 0.0
    """For the next step's samples, the wait that goes on now included."""
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    reduce_seconds: float = 0.0
    """Adding up over the ranks and clipping; a rank that is ahead waits for the others here."""
    optimizer_seconds: float = 0.0
    pause_seconds: float = 0.0
    """Held-out evaluations, checkpoints and exports."""
    get_seconds: float = 0.0
    """Fetching samples from the store, in the background, ahead of the step loop."""
    get_bytes: int = 0
    get_histogram: Histogram = EMPTY
    """Latencies of gets, one a sample."""
    fetched_steps: int = 0
    """Steps fetched and waiting for the step loop."""
    doing: Literal["waiting", "training", "paused"] = "waiting"
    flops: float = 0.0
    """Floating-point operations of the draft, forward and backward (``DraftSpec.flops``)."""
    peak_flops: float | None = None
    """A second, of its device; None where it is not known."""


@dataclass(frozen=True, slots=True)
class RankBatch:
    """One optimizer step's work for one rank. All ranks of a step carry the same flags.

    ``micro_batches`` has the same length on every rank; a rank with nothing to do in one gets an empty tuple and
    still takes part in its collectives.
    """

    step: int
    micro_batches: MicroBatches
    checkpoint: bool = False
    """Save a checkpoint after this step."""
    evaluate: bool = False
    """Run the held-out evaluation after this step."""
    last: bool = False
    """No batch follows."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What rank 0 measured in one optimizer step. Tuples have one entry for each position that is scored."""

    step: int
    loss: float
    loss_per_position: tuple[float, ...]
    accuracy: tuple[float, ...]
    """Right first choices among counted positions (target argmax inside the draft vocabulary)."""
    full_accuracy: tuple[float, ...]
    """The same, out-of-vocabulary targets counted as misses."""
    accept_length: float
    """Simulated: 1 + sum_t prod_{s<=t} full_accuracy_s."""
    learning_rate: float
    grad_norm: float
    tokens: int
    """Tokens of the global batch, all ranks."""
    loss_tokens: int
    wait_seconds: float
    fetch_seconds: float
    compute_seconds: float
    optimizer_seconds: float
    split: Literal["train", "heldout"] = "train"


@dataclass(frozen=True, slots=True)
class RunStatus:
    """A snapshot of a run, what ``torchspec status`` and every view show."""

    run: str
    phase: str
    """counting-vocabulary, training, stopping, stopped or finished."""
    step: int
    total_steps: int
    epoch: int
    epochs: int
    samples: dict[str, int]
    """Ledger state to number of samples: pending, leased, stored, assigned, trained, committed, rejected."""
    store_bytes: int
    store_capacity: int
    credit_bytes: int
    queue_depth: int
    """Samples stored and in order, ready for the next steps."""
    workers: tuple[WorkerReport, ...]
    last_step: StepReport | None
    last_heldout: StepReport | None
    inference_tokens_per_s: float
    inference_samples_per_s: float
    training_tokens_per_s: float
    training_samples_per_s: float
    eta_seconds: float | None
    uptime_seconds: float
    messages: tuple[str, ...] = ()
    """Recent events worth a person's attention, oldest first."""
    export_failure: str = ""
    """Why the draft of the last checkpoint could not be exported; empty where it was, or was not to be."""
    workers_wanted: int = 0
    """Inference workers that there should be; ``workers`` are those that there are."""
    generation: int = 0
    """How often a training group has been started; 0 before the first."""
    dp_size: int = 1
    """Of the training group that is at work, or of the next one."""
    sp_size: int = 1
    closing: bool = False
    """That group makes no more steps than it has: the run ends, or goes on at another size."""
