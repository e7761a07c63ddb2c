"""Config: recipes, overrides, and one clear line for each thing that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchspec.config.load import load_config, parse_config, save_config, with_values
from torchspec.config.recipe import RECIPES
from torchspec.config.schema import Config

SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml"))

DEEP = "optimizer.betas=" + "[" * 5000


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("target:\n  path: models/x\ntraining:\n  batch_size: 4\n")
    return path


def error_of(recipe: Path, *overrides: str) -> str:
    with pytest.raises(ValueError, match=r"\w") as caught:
        load_config(recipe, overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_are_valid(name: str) -> None:
    assert load_config(f"builtin:{name}").run.name == name


def test_defaults_file_and_overrides_win_in_that_order(recipe: Path) -> None:
    config = load_config(recipe, ["optimizer.lr=1e-3", "optimizer.lr=2e-3", "draft.ttt_length=3"])
    assert (config.training.epochs, config.training.batch_size, config.draft.ttt_length) == (1, 4, 3)
    assert config.optimizer.lr == 2e-3


def test_an_empty_section_is_all_defaults(recipe: Path) -> None:
    recipe.write_text("target: {path: models/x}\ndata:\ntraining:\n")
    assert load_config(recipe) == parse_config({"target": {"path": "models/x"}})
    assert load_config(recipe, ["training.epochs=2"]).training.epochs == 2
    assert error_of(recipe, "target=null") == "target: Field required"
    assert error_of(recipe, "dta=null") == "unknown key dta: did you mean data?"


def test_a_number_in_a_file_is_text_where_text_is_wanted(recipe: Path) -> None:
    recipe.write_text("run: {name: 2024}\ntarget: {path: models/x}\nstore: {segment_bytes: 1.5GB}\n")
    config = load_config(recipe)
    assert (config.run.name, config.store.segment_bytes) == ("2024", 1_500_000_000)
    save_config(config, recipe)
    assert "segment_bytes: 1500000000\n" in recipe.read_text() and load_config(recipe) == config


def test_all_that_contradicts_is_said_at_once(recipe: Path) -> None:
    lines = error_of(
        recipe, "training.dp_size=5", "inference.min_workers=9", "controller.reorder_window=2"
    ).splitlines()
    assert [line.split()[0] for line in lines] == [
        *("inference.min_workers", "training.batch_size", "controller.reorder_window"),
    ]


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("run.seed=7", 7),
        ("run.name='7e2'", "7e2"),
        ("run.name=inf", "inf"),
        ("run.name=2024", "2024"),
        ("run.name=1e5", "1e5"),
        ("run.name=2024-01-02", "2024-01-02"),
        ("run.dir=2024", Path("2024")),
        ("store.segment_bytes=16GiB", 16 << 30),
        ("training.buffer_bytes=512 MiB", 512 << 20),
        ("inference.buffer_bytes=1.5GB", 1_500_000_000),
        ("inference.buffer_bytes=2097152", 2 << 20),
        ("inference.engine_args.revision=1e5", {"revision": 1e5}),
        ("optimizer.eps=1e-6", 1e-6),
        ("optimizer.betas=[0.8, 0.9]", (0.8, 0.9)),
        ("target.aux_layers=[1,14,26]", [1, 14, 26]),
        ("evaluation.heldout=null", None),
        ("evaluation.heldout=data/a=b/*.jsonl", "data/a=b/*.jsonl"),
        ("training.compile=true", True),
        ("training.threads=auto", "auto"),
        ("training.threads=3", 3),
        ("data.cache_dir=/tmp/cache", Path("/tmp/cache")),
        ("inference.engine_args.log_level=info", {"log_level": "info"}),
        ("inference.engine_args.share=2e-1", {"share": 0.2}),
    ],
)
def test_override_forms(recipe: Path, override: str, value: object) -> None:
    config = load_config(recipe, [override])
    section, name = override.partition("=")[0].split(".")[:2]
    assert getattr(getattr(config, section), name) == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("traning.epochs=3", "unknown key traning: did you mean training?"),
        ("training.batchsize=3", "unknown key training.batchsize: did you mean training.batch_size?"),
        ("training.warmup_ratio=0.1", "unknown key training.warmup_ratio: did you mean optimizer.warmup_ratio?"),
        ("store.zzz=1", "unknown key store.zzz: valid keys here are host, master_port, protocol, segment_bytes"),
        ("training.batch_size", "override 'training.batch_size' must look like section.key=value"),
        ("=3", "override '=3' must look like section.key=value"),
        ("target.path.x=1", "override 'target.path.x=1': path is a value, not a section"),
        (DEEP, f"override {DEEP!r}: the value is not valid YAML"),
        ("optimizer.betas=[1,", "override 'optimizer.betas=[1,': the value is not valid YAML"),
    ],
)
def test_malformed_overrides_and_typos_are_one_line(recipe: Path, override: str, message: str) -> None:
    assert error_of(recipe, override) == message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epochs=0", "training.epochs: 0 does not fit; valid: integer, >= 1"),
        ("training.threads=many", "training.threads: 'many' does not fit; valid: integer > 0 | auto"),
        ("inference.threads=0", "inference.threads: 0 does not fit; valid: integer > 0 | auto"),
        ("training.dtype=fp8", "training.dtype: 'fp8' does not fit; valid: auto | bfloat16 | float32"),
        ("optimizer.betas=[0.9]", "optimizer.betas: [0.9] does not fit; valid: [number, number]"),
        ("target.aux_layers=[1,x]", "target.aux_layers: [1, 'x'] does not fit; valid: list of integer | null"),
        ("training.compile=perhaps", "training.compile: 'perhaps' does not fit; valid: true or false"),
        ("data=3", "data: 3 does not fit; valid: keys and their values"),
        (
            "run.name=../up",
            "run.name: '../up' does not fit; valid: text, matching ^[A-Za-z0-9][A-Za-z0-9._-]*$",
        ),
        ("run.dir=[3]", "run.dir: [3] does not fit; valid: path"),
        (
            "store.segment_bytes=lots",
            "store.segment_bytes: 'lots' does not fit; valid: bytes, as 16GiB or 500MB | null, >= 16777216",
        ),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_what_does(recipe: Path, override: str, message: str) -> None:
    assert error_of(recipe, override) == message


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("training.dp_size=5", "training.dp_size"),
        ("controller.reorder_window=2", "controller.reorder_window (2) is smaller than training.batch_size (4)"),
        ("inference.min_workers=9", "inference.min_workers (9) is larger than inference.max_workers (4)"),
        ("monitor.profile_steps=[3, 2]", "monitor.profile_steps ([3, 2])"),
        ("training.sp_ring_size=2", "need training.attention_backend=usp; it is flash"),
        ("training.sp_ulysses_size=0", "training.sp_ulysses_size"),
        ("training.sp_layout=striped", "training.sp_layout"),
    ],
)
def test_what_contradicts_another_key_is_named(recipe: Path, override: str, key: str) -> None:
    message = error_of(recipe, override)
    assert key in message
    assert "\n" not in message and "pydantic" not in message


def test_each_thing_that_is_wrong_has_its_line(recipe: Path) -> None:
    lines = error_of(recipe, "training.epoch=3", "run.seed=-1").splitlines()
    assert len(lines) == 2
    assert any("training.epochs" in line for line in lines) and any("run.seed" in line for line in lines)


def test_the_target_is_required() -> None:
    with pytest.raises(ValueError, match=r"^target: Field required$"):
        parse_config({})


def test_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "absent.yaml"
    assert error_of(path) == f"cannot read the config {path}: No such file or directory"


def test_a_folder_is_no_config(tmp_path: Path) -> None:
    assert error_of(tmp_path) == f"cannot read the config {tmp_path}: Is a directory"


def test_deep_yaml_is_one_line(recipe: Path) -> None:
    recipe.write_text("target: " + "[" * 100_000)
    assert error_of(recipe) == f"{recipe} is not valid YAML: nested too deeply"


def test_broken_yaml_says_where(recipe: Path) -> None:
    recipe.write_text("target:\n  path: [1, 2\ntraining: {\n")
    message = error_of(recipe)
    assert message.startswith(f"{recipe} is not valid YAML") and "line 3" in message and "\n" not in message


def test_yaml_that_is_no_mapping(recipe: Path) -> None:
    recipe.write_text("- a\n- b\n")
    assert error_of(recipe) == f"{recipe} must hold sections (run:, target:, data:, ...), not a list"


def test_the_saved_config_reads_back_equal(recipe: Path, tmp_path: Path) -> None:
    config = load_config(recipe, ["optimizer.lr=2e-3", "inference.engine_args={a: [1, 2]}", "data.limit=9"])
    save_config(config, tmp_path / "saved.yaml")
    again = load_config(tmp_path / "saved.yaml")
    assert again == config and again != Config.model_validate({"target": {"path": "models/x"}})


def test_other_values_are_checked_like_a_config() -> None:
    config = parse_config({"target": {"path": "x"}, "training": {"batch_size": 2}})
    assert with_values(config, {"inference.workers": "auto"}).inference.workers == "auto"
    sizes = {"training.dp_size": 2, "training.attention_backend": "usp", "training.sp_ring_size": 2}
    assert with_values(config, sizes).training.world_size == 4 and config.training.world_size == 1
    with pytest.raises(ValueError, match=r"training\.dp_size \(3\)"):
        with_values(config, {"training.dp_size": 3})
    with pytest.raises(ValueError, match=r"inference\.workers"):
        with_values(config, {"inference.workers": 0})


def test_columns_are_keys_of_a_row() -> None:
    target = {"target": {"path": "x"}}
    assert parse_config({**target, "data": {"columns": {"messages": "chat"}}}).data.columns == {"messages": "chat"}
    with pytest.raises(ValueError, match=r"^data\.columns: mesages is no key of a row; valid: messages, conv"):
        parse_config({**target, "data": {"columns": {"mesages": "chat"}}})
