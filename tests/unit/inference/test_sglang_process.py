"""What an engine is started with: the knobs of its run, and what its user says."""

from __future__ import annotations

from torchspec.config.schema import Config
from torchspec.inference.sglang_process import EngineSpec
from torchspec.store.endpoint import StoreEndpoint


def test_knobs_reach_sglang_and_the_users_own_arguments_win() -> None:
    sections = {
        "target": {"path": "folder", "dtype": "float32"},
        "inference": {"max_concurrency": 3, "max_total_tokens": 999, "engine_args": {"log_level": "info"}},
        "recovery": {"stuck_seconds": 50},
    }
    spec = EngineSpec(Config.model_validate(sections), StoreEndpoint("host:1", "host:2"), (1, 5))
    args = spec.engine_args()
    assert (args["model_path"], args["dtype"], args["return_aux_hidden_state_layer_ids"]) == (
        "folder",
        "float32",
        [1, 5],
    )
    assert args["chunked_prefill_size"] is None, "left open on a GPU: SGLang's own choice"
    assert (args["max_running_requests"], args["max_total_tokens"], args["watchdog_timeout"]) == (3, 999, 50)
    assert (args["log_level"], args["mem_fraction_static"]) == ("info", 0.5)
