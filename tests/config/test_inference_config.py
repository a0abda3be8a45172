import json
import math
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from meshlm.config import ConfigError, InferenceConfig


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("MESHLM_"):
            monkeypatch.delenv(name)


def origins(config: InferenceConfig) -> dict[str, str]:
    """The describe() table's first and last columns."""
    rows = [line.split(maxsplit=2) for line in config.describe().splitlines()]
    return {field: origin for field, _, origin in rows}


def test_defaults() -> None:
    config = InferenceConfig()
    assert (config.world_size, config.mesh_shape) == (1, (1, 1, 1))
    assert (config.dtype, config.device, config.attention_backend) == ("auto", "auto", "auto")
    assert (config.max_num_seqs, config.max_num_batched_tokens, config.seed) == (256, 2048, 0)
    assert set(origins(config).values()) == {"default"}


def test_mesh_shape_has_tp_innermost() -> None:
    config = InferenceConfig(tp_size=2, pp_size=3, dp_size=5)
    assert (config.world_size, config.mesh_shape) == (30, (5, 3, 2))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tp_size": 0}, "InferenceConfig.tp_size: 0 is not valid: must be at least 1"),
        ({"pp_size": -3}, "InferenceConfig.pp_size: -3 is not valid: must be at least 1"),
        ({"dp_size": "two"}, "InferenceConfig.dp_size: 'two' is not valid: must be an integer, at least 1"),
        ({"tp_size": True}, "InferenceConfig.tp_size: True is not valid: must not be true or false"),
        ({"tp_size": 2.5}, "InferenceConfig.tp_size: 2.5 is not valid: must be an integer, at least 1"),
        ({"tp_sise": 2}, "InferenceConfig.tp_sise: unknown field; the nearest known one is tp_size"),
        (
            {"dtype": "int8"},
            "InferenceConfig.dtype: 'int8' is not valid: must be one of 'auto', 'float32', 'bfloat16' or 'float16'",
        ),
        ({"device": "gpu"}, "InferenceConfig.device: 'gpu' is not valid: must be auto, cpu, cuda or cuda:N"),
        ({"device": "cuda:"}, "InferenceConfig.device: 'cuda:' is not valid: must be auto, cpu, cuda or cuda:N"),
        ({"kv_memory_fraction": 0}, "InferenceConfig.kv_memory_fraction: 0 is not valid: must be in (0, 1]"),
        ({"kv_memory_fraction": 1.5}, "InferenceConfig.kv_memory_fraction: 1.5 is not valid: must be in (0, 1]"),
        (
            {"kv_memory_bytes": "2 parsecs"},
            "InferenceConfig.kv_memory_bytes: '2 parsecs' is not valid: "
            "must be a number of bytes, such as 1073741824 or '2GiB', greater than 0",
        ),
        (
            {"kv_memory_fraction": 0.5, "num_kv_blocks": 64},
            "InferenceConfig: kv_memory_fraction=0.5 and num_kv_blocks=64 "
            "each fix the size of the KV cache: give at most one",
        ),
        ({"seed": -1}, "InferenceConfig.seed: -1 is not valid: must be in [0, 9223372036854775807]"),
        ({"start_timeout_s": 0}, "InferenceConfig.start_timeout_s: 0 is not valid: must be greater than 0"),
        (
            {"collective_timeout_s": math.inf},
            "InferenceConfig.collective_timeout_s: inf is not valid: must be a finite number, greater than 0",
        ),
        (
            {"tp_size": 0, "max_num_seqs": 0},
            "InferenceConfig.tp_size: 0 is not valid: must be at least 1; "
            "InferenceConfig.max_num_seqs: 0 is not valid: must be at least 1",
        ),
    ],
)
def test_a_mistake_is_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        InferenceConfig(**values)
    assert str(error.value) == message


def test_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        InferenceConfig().tp_size = 2


def test_bytes_with_a_unit() -> None:
    assert InferenceConfig(kv_memory_bytes="2GiB").kv_memory_bytes == 2 * 2**30  # type: ignore[arg-type]


def test_precedence_and_origin_of_all_four_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cfg.yaml"
    file.write_text("tp_size: 2\npp_size: 2\ndp_size: 2\n")
    monkeypatch.setenv("MESHLM_TP_SIZE", "3")
    monkeypatch.setenv("MESHLM_PP_SIZE", "3")
    config = InferenceConfig.from_file(file, tp_size=4)
    assert (config.tp_size, config.pp_size, config.dp_size, config.block_size) == (4, 3, 2, None)
    found = origins(config)
    assert found["tp_size"] == "constructor"
    assert found["pp_size"] == "environment MESHLM_PP_SIZE"
    assert found["dp_size"] == f"file {file}"
    assert found["block_size"] == "default"


def test_describe_is_a_table() -> None:
    lines = InferenceConfig(tp_size=2).describe().splitlines()
    assert lines[0] == "tp_size                 2      constructor"
    assert lines[-1] == "collective_timeout_s    300.0  default"
    assert len(lines) == len(InferenceConfig.model_fields)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.yaml", "tp_size: 2\nkv_memory_bytes: 1KiB\nenable_prefix_caching: no\n"),
        ("c.yml", "{tp_size: 2, kv_memory_bytes: 1024, enable_prefix_caching: false}"),
        ("c.toml", 'tp_size = 2\nkv_memory_bytes = "1KiB"\nenable_prefix_caching = false\n'),
        ("c.JSON", json.dumps({"tp_size": 2, "kv_memory_bytes": 1024, "enable_prefix_caching": False})),
    ],
)
def test_file_formats(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    expected = InferenceConfig(tp_size=2, kv_memory_bytes=1024, enable_prefix_caching=False)
    assert InferenceConfig.from_file(str(tmp_path / name)) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.yaml", "tp_sise: 2", "InferenceConfig.tp_sise: unknown field; the nearest known one is tp_size (file {})"),
        ("c.toml", "tp_size = 0", "InferenceConfig.tp_size: 0 is not valid: must be at least 1 (file {})"),
        ("c.ini", "", "{}: suffix '.ini' is not one of .yaml, .yml, .toml, .json"),
        ("c.json", None, "{}: no such file"),
    ],
)
def test_mistakes_in_a_file_name_the_file(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as error:
        InferenceConfig.from_file(tmp_path / name)
    assert str(error.value) == message.format(tmp_path / name)


@pytest.mark.parametrize(("name", "text"), [("c.yaml", "a: ["), ("c.yaml", "- 1"), ("c.json", "{"), ("c.toml", "a")])
def test_an_unreadable_file_is_one_line(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as error:
        InferenceConfig.from_file(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name}: cannot be read as a table of fields: ")
    assert "\n" not in str(error.value)


def test_a_mistake_in_the_environment_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHLM_TP_SIZE", "0")
    with pytest.raises(ConfigError) as error:
        InferenceConfig()
    assert str(error.value) == (
        "InferenceConfig.tp_size: '0' is not valid: must be at least 1 (environment MESHLM_TP_SIZE)"
    )


def test_environment_none_and_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c.json").write_text('{"block_size": 8, "max_model_len": 64}')
    monkeypatch.setenv("MESHLM_BLOCK_SIZE", "none")
    monkeypatch.setenv("MESHLM_MAX_MODEL_LEN", "")
    config = InferenceConfig.from_file(tmp_path / "c.json")
    assert (config.block_size, config.max_model_len) == (None, 64)


def test_an_unknown_variable_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHLM_TP_SISE", "2")
    monkeypatch.setenv("MESHLM_CACHE", "/tmp")  # known, if not a field
    with pytest.warns(UserWarning) as caught:
        InferenceConfig()
    assert [str(warning.message) for warning in caught] == [
        "environment variable MESHLM_TP_SISE is not known and has no effect; the nearest known one is MESHLM_TP_SIZE"
    ]
    assert caught[0].filename == __file__


def test_pickle_keeps_origins_and_does_not_read_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHLM_PP_SIZE", "2")
    config = InferenceConfig(tp_size=2)
    pickled = pickle.dumps(config)
    monkeypatch.setenv("MESHLM_PP_SIZE", "7")
    monkeypatch.setenv("MESHLM_DP_SIZE", "7")
    copy = pickle.loads(pickled)
    assert copy == config
    assert copy.describe() == config.describe()


def test_replace_validates_and_keeps_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "c.toml"
    file.write_text("pp_size = 2")
    config = InferenceConfig.from_file(file, kv_memory_bytes=1024)
    file.unlink()
    monkeypatch.setenv("MESHLM_DP_SIZE", "7")
    monkeypatch.setenv("MESHLM_UNKNOWN", "7")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        changed = config.replace(tp_size=2)
    assert (changed.tp_size, changed.pp_size, changed.dp_size, changed.kv_memory_bytes) == (2, 2, 1, 1024)
    assert origins(changed) == {**origins(config), "tp_size": "constructor"}
    assert config.tp_size == 1
    with pytest.raises(ConfigError, match="kv_memory_bytes=1024 and num_kv_blocks=3 each fix"):
        config.replace(num_kv_blocks=3)
    assert config.replace(num_kv_blocks=3, kv_memory_bytes=None).num_kv_blocks == 3
    with pytest.raises(ConfigError, match="nearest known one is seed"):
        config.replace(sed=3)


def test_equality_is_of_values_not_of_origins(monkeypatch: pytest.MonkeyPatch) -> None:
    given = InferenceConfig(tp_size=2)
    monkeypatch.setenv("MESHLM_TP_SIZE", "2")
    read = InferenceConfig()
    assert given == read
    assert hash(given) == hash(read)
    assert given != given.replace(tp_size=3)


def test_importing_config_is_light() -> None:
    code = "import sys, meshlm.config; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
