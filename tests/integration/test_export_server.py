"""An exported draft in the real SGLang server: all of it is loaded, and it is right exactly when it should be.

The draft is trained by the product's own step until it knows a few answers by heart. So its acceptance says whether
training, export and server agree on alignment, aux layers, vocabulary and positions; and every verify step of the
server can be compared with the plain simulation in ``tests/oracles/speculation.py``. All in float32.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.oracles.speculation import Draft, right_drafts
from torchspec.drafts.draft import Batch
from torchspec.drafts.eagle3.model import Eagle3Draft
from torchspec.drafts.eagle3.spec import Eagle3Knobs, Eagle3Spec, default_layers
from torchspec.drafts.export import CONFIG, WEIGHTS, export_draft, read_spec, validate_export
from torchspec.evaluation.evaluate import run_evaluation
from torchspec.evaluation.prompts import EvaluationPrompt, load_prompts
from torchspec.evaluation.result import EvaluationResult, EvaluationSettings
from torchspec.evaluation.serving import Job, Reply, ServingError, serve
from torchspec.target.checkpoint import TargetCheckpoint
from torchspec.target.head import load_target_head

NUM_PROMPTS, ANSWER_TOKENS, DRAFT_TOKENS = 4, 24, 3
AUX_LAYERS = default_layers(30)
SETTINGS = EvaluationSettings(
    num_draft_tokens=DRAFT_TOKENS, max_tokens=ANSWER_TOKENS, dtype="float32", device="cpu", threads=1, concurrency=3
)


@dataclass
class Target:
    model: PreTrainedModel

    @torch.no_grad()
    def states(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Aux states [S, 3H] and last hidden states [S, H] (after the final norm) of ``text``."""
        hidden = self.model(text[None], output_hidden_states=True).hidden_states
        return torch.cat([hidden[k + 1][0] for k in AUX_LAYERS], dim=-1), hidden[-1][0]

    @torch.no_grad()
    def go_on(self, text: Tensor, count: int) -> Tensor:
        """``text`` and ``count`` greedy tokens, whatever they are."""
        step = self.model(text[None], use_cache=True)
        for _ in range(count):
            token = step.logits[0, -1:].argmax(-1)
            text = torch.cat([text, token])
            step = self.model(token[None], past_key_values=step.past_key_values, use_cache=True)
        return text


@pytest.fixture(scope="module")
def target(target_path: Path) -> Target:
    return Target(AutoModelForCausalLM.from_pretrained(target_path, dtype=torch.float32).eval())


@pytest.fixture(scope="module")
def prompts(target_path: Path, tmp_path_factory: pytest.TempPathFactory) -> list[EvaluationPrompt]:
    return load_prompts("builtin:heldout", target_path, tmp_path_factory.mktemp("cache"), NUM_PROMPTS)


@pytest.fixture(scope="module")
def exported(
    target: Target, target_path: Path, prompts: list[EvaluationPrompt], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return learnt_by_heart(target, target_path, prompts, tmp_path_factory.mktemp("export") / "draft")


def learnt_by_heart(
    target: Target, target_path: Path, prompts: list[EvaluationPrompt], folder: Path, **norms: bool
) -> Path:
    """An exported draft that has learnt the answers to all prompts but the last."""
    texts = [target.go_on(torch.tensor(prompt.input_ids), ANSWER_TOKENS) for prompt in prompts[:-1]]
    answers = torch.cat([text[-ANSWER_TOKENS:] for text in texts])
    draft_ids = torch.cat([answers, torch.arange(0, 49152, 97)]).unique()
    checkpoint = TargetCheckpoint(target_path)
    head = load_target_head(checkpoint, torch.float32, "cpu", draft_ids)
    knobs = Eagle3Knobs(vocab_size=len(draft_ids), ttt_length=DRAFT_TOKENS, step_decay=1.0, **norms)
    spec = Eagle3Spec.of(knobs, checkpoint, AUX_LAYERS)
    torch.manual_seed(0)
    draft = Eagle3Draft(spec)
    draft.lm_head.weight.data.copy_(head.draft_head_DH)
    batch = _batch(target, texts)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(40):
        output = draft(batch, head)
        optimizer.zero_grad()
        (output.total / output.denominator).backward()
        optimizer.step()
    assert (output.correct_K / output.counted_K).min() > 0.8, "the draft has not learnt its texts"
    return export_draft(spec, draft.state_dict(), draft_ids, folder, "float32")


def _batch(target: Target, texts: list[Tensor]) -> Batch:
    states = [target.states(text) for text in texts]
    pad = torch.nn.utils.rnn.pad_sequence
    lengths = torch.tensor([len(text) for text in texts])
    masks = [torch.arange(len(text)) >= len(text) - ANSWER_TOKENS for text in texts]
    return Batch(
        hs_BSA=pad([aux for aux, _ in states], batch_first=True),
        lhs_BSH=pad([last for _, last in states], batch_first=True),
        ids_BS=pad(texts, batch_first=True),
        loss_mask_BS=pad(masks, batch_first=True),
        lengths_B=lengths,
        seeds_B=lengths,
    )


@pytest.fixture(scope="module")
def result(exported: Path, target_path: Path, tmp_path_factory: pytest.TempPathFactory) -> EvaluationResult:
    output = tmp_path_factory.mktemp("result") / "result.json"
    result = run_evaluation(exported, target_path, settings=SETTINGS, limit=NUM_PROMPTS, output=output)
    assert json.loads(output.read_text())["overall"]["accept_length"] == result.overall.accept_length
    return result


def test_the_draft_is_right_where_it_was_trained(result: EvaluationResult) -> None:
    assert len(result.prompts) == NUM_PROMPTS
    learnt, steps = result.prompts[:-1], sum(sum(p.histogram) for p in result.prompts[:-1])
    accepted = sum(k * n for prompt in learnt for k, n in enumerate(prompt.histogram))
    assert 1 + accepted / steps > 2.5
    assert min(result.overall.position_acceptance) > 0.3
    assert result.overall.verify_steps < result.with_draft.output_tokens / 1.5


def test_speculation_changes_no_answer(result: EvaluationResult) -> None:
    assert result.identical_outputs == NUM_PROMPTS
    assert result.with_draft.output_tokens == result.without_draft.output_tokens > NUM_PROMPTS * 10


def test_every_verify_step_is_as_simulated(
    result: EvaluationResult, exported: Path, target: Target, prompts: list[EvaluationPrompt]
) -> None:
    replies = [Reply(prompt.output_ids, prompt.histogram) for prompt in result.prompts]
    require_as_simulated(simulated(exported, target), target, prompts, replies)


def test_with_the_norms_of_eagle_3_1_too(
    target: Target, target_path: Path, prompts: list[EvaluationPrompt], tmp_path: Path
) -> None:
    folder = learnt_by_heart(target, target_path, prompts, tmp_path / "draft", fc_norm=True, norm_output=True)
    speculation, ids = read_spec(folder).server_args(DRAFT_TOKENS), [list(prompt.input_ids) for prompt in prompts]
    served = serve(Job(str(target_path), ids, ANSWER_TOKENS, "float32", "cpu", 1, 3, str(folder), speculation))
    draft = simulated(folder, target)
    require_as_simulated(draft, target, prompts, served.replies)
    with pytest.raises(AssertionError, match="other drafts are right"):
        require_as_simulated(replace(draft, norm_output=False), target, prompts, served.replies)


def simulated(folder: Path, target: Target) -> Draft:
    config = target.model.config
    return Draft(
        weights=load_file(folder / WEIGHTS),
        embedding=target.model.get_input_embeddings().weight.detach(),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        theta=config.rope_parameters["rope_theta"],
        eps=config.rms_norm_eps,
        norm_output=json.loads((folder / CONFIG).read_text())["norm_output"],
    )


def require_as_simulated(draft: Draft, target: Target, prompts: list[EvaluationPrompt], replies: list[Reply]) -> None:
    for prompt, served in zip(prompts, replies, strict=True):
        answered = torch.tensor([*prompt.input_ids, *served.output_ids])
        text = target.go_on(torch.tensor(prompt.input_ids), len(served.output_ids) + DRAFT_TOKENS)
        assert torch.equal(text[: len(answered)], answered), "SGLang's greedy answer is not transformers'"
        expected = right_drafts(
            draft, target.states(text)[0], text, len(prompt.input_ids), len(served.output_ids), DRAFT_TOKENS
        )
        histogram = served.histogram + [0] * (DRAFT_TOKENS + 1 - len(served.histogram))
        assert histogram == expected, f"{prompt.id}: other drafts are right"


@pytest.mark.slow
def test_a_renamed_tensor_is_noticed_in_the_server(
    exported: Path, target_path: Path, prompts: list[EvaluationPrompt], tmp_path: Path
) -> None:
    spoiled = Path(shutil.copytree(exported, tmp_path / "draft"))
    tensors = load_file(spoiled / WEIGHTS)
    tensors["midlayer.mlp.down.weight"] = tensors.pop("midlayer.mlp.down_proj.weight")
    save_file(tensors, spoiled / WEIGHTS)
    with pytest.raises(ValueError, match=r"unknown.*midlayer\.mlp\.down\.weight"):
        validate_export(spoiled)
    speculation = read_spec(spoiled).server_args(3)
    job = Job(str(target_path), [list(prompts[0].input_ids)], 4, "float32", "cpu", 1, 1, str(spoiled), speculation)
    with pytest.raises(ServingError, match=r"did not load all of .*model\.layers\.0\.mlp\.down_proj\.weight differ"):
        serve(job)
