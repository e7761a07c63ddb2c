"""Greedy text of the target with and without an EAGLE3 draft, from real SGLang engines in this process.

    python speculation_process.py MODEL DRAFT

Prints one JSON object: the prompts' output ids both ways, and what the server says about acceptance. A process of its
own, because SGLang's engines end by killing every child of theirs.
"""

from __future__ import annotations

import json
import os
import sys

PROMPTS = [[1, 4093, 198, 1780, 314, 253], [1, 4093, 198, 57], [1, *range(900, 1100)], [1, 28, 28, 28, 28, 28]]
NEW_TOKENS = 32


def generate(model: str, **speculation: object) -> list[dict]:
    import sglang

    engine = sglang.Engine(
        model_path=model,
        device="cpu",
        dtype="float32",
        attention_backend="torch_native",
        sampling_backend="pytorch",
        disable_cuda_graph=True,
        disable_radix_cache=True,
        skip_tokenizer_init=True,
        mem_fraction_static=0.1,
        max_total_tokens=4096,
        max_running_requests=8,
        chunked_prefill_size=64,
        log_level="error",
        **speculation,
    )
    sampling = {"max_new_tokens": NEW_TOKENS, "temperature": 0.0, "ignore_eos": True}
    replies = engine.generate(input_ids=PROMPTS, sampling_params=sampling)
    engine.shutdown()
    return replies


def main() -> None:
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    model, draft = sys.argv[1:]
    plain = [reply["output_ids"] for reply in generate(model)]
    speculative = generate(
        model,
        speculative_algorithm="EAGLE3",
        speculative_draft_model_path=draft,
        speculative_num_steps=3,
        speculative_eagle_topk=1,
        speculative_num_draft_tokens=4,
    )
    print(
        json.dumps(
            {
                "plain": plain,
                "speculative": [reply["output_ids"] for reply in speculative],
                "verify_steps": sum(reply["meta_info"]["spec_verify_ct"] for reply in speculative),
                "accepted": sum(reply["meta_info"]["spec_num_correct_drafts"] for reply in speculative),
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    main()
