"""The command line: what it teaches, how fields become options, what it says of mistakes."""

import io
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import meshlm
from meshlm.config import InferenceConfig, SamplingParams
from meshlm.serving.cli import main
from meshlm.serving.cli.app import app
from meshlm.serving.cli.options import with_options

RUN = CliRunner()

# Of each field: how it is given, and what it is then.
CONFIG: dict[str, tuple[list[str], Any]] = {
    "tp_size": (["--tp-size", "2"], 2),
    "pp_size": (["--pp-size=3"], 3),
    "dp_size": (["--dp-size", "2"], 2),
    "expert_parallel": (["--expert-parallel"], True),
    "dtype": (["--dtype", "bfloat16"], "bfloat16"),
    "device": (["--device", "cuda:1"], "cuda:1"),
    "policy": (["--policy", "generic"], "generic"),
    "attention_backend": (["--attention-backend", "eager"], "eager"),
    "max_model_len": (["--max-model-len", "none"], None),
    "block_size": (["--block-size", "32"], 32),
    "kv_memory_fraction": (["--kv-memory-fraction", "0.5"], 0.5),
    "kv_memory_bytes": (["--kv-memory-bytes", "2GiB"], 2 << 30),
    "num_kv_blocks": (["--num-kv-blocks", "100"], 100),
    "max_num_seqs": (["--max-num-seqs", "8"], 8),
    "max_num_batched_tokens": (["--max-num-batched-tokens", "512"], 512),
    "async_scheduling": (["--no-async-scheduling"], False),
    "cuda_graphs": (["--cuda-graphs"], True),
    "enable_prefix_caching": (["--no-enable-prefix-caching"], False),
    "speculative": (["--speculative", "ngram"], meshlm.SpeculativeConfig(method="ngram")),
    "allow_pickle": (["--allow-pickle"], True),
    "trust_remote_code": (["--trust-remote-code"], True),
    "seed": (["--engine-seed", "7"], 7),
    "start_timeout_s": (["--start-timeout-s", "10"], 10.0),
    "collective_timeout_s": (["--collective-timeout-s", "20"], 20.0),
}
PARAMS: dict[str, tuple[list[str], Any]] = {
    "temperature": (["--temperature", "0.7"], 0.7),
    "top_k": (["--top-k", "-1"], 0),
    "top_p": (["--top-p", "0.9"], 0.9),
    "min_p": (["--min-p", "0.1"], 0.1),
    "seed": (["--seed", "3"], 3),
    "n": (["--n", "2"], 2),
    "best_of": (["--best-of", "2"], 2),
    "num_beams": (["--num-beams", "2"], 2),
    "length_penalty": (["--length-penalty", "-1.5"], -1.5),
    "early_stopping": (["--early-stopping", "true"], True),
    "max_tokens": (["--max-tokens", "5"], 5),
    "min_tokens": (["--min-tokens", "1"], 1),
    "max_total_tokens": (["--max-total-tokens", "9"], 9),
    "stop": (["--stop", "a,b", "--stop", "\n"], ("a,b", "\n")),
    "include_stop_str_in_output": (["--include-stop-str-in-output"], True),
    "stop_token_ids": (["--stop-token-ids", "1,2", "--stop-token-ids", "3"], (1, 2, 3)),
    "eos_token_ids": (["--eos-token-ids", "2"], (2,)),
    "ignore_eos": (["--ignore-eos"], True),
    "repetition_penalty": (["--repetition-penalty", "1.1"], 1.1),
    "presence_penalty": (["--presence-penalty", "-1"], -1.0),
    "frequency_penalty": (["--frequency-penalty", "1"], 1.0),
    "no_repeat_ngram_size": (["--no-repeat-ngram-size", "3"], 3),
    "logit_bias": (["--logit-bias", "5:-100,6:1.5"], {5: -100.0, 6: 1.5}),
    "bad_words": (["--bad-words", "no", "--bad-words", "never"], ("no", "never")),
    "suppress_tokens": (["--suppress-tokens", "4"], (4,)),
    "begin_suppress_tokens": (["--begin-suppress-tokens", "4"], (4,)),
    "allowed_token_ids": (["--allowed-token-ids", "4,5"], (4, 5)),
    "logits_processors": (["--logits-processors", "textwrap:indent"], None),  # looked at by itself
    "structured_outputs": (
        ["--structured-outputs", '{"regex": "a+"}'],
        meshlm.StructuredOutputsParams(regex="a+"),
    ),
    "forced_token_ids": (["--forced-token-ids", "1"], (1,)),
    "logprobs": (["--logprobs", "-1"], -1),
    "prompt_logprobs": (["--prompt-logprobs", "0"], 0),
    "detokenize": (["--no-detokenize"], False),
    "skip_special_tokens": (["--no-skip-special-tokens"], False),
    "truncate_prompt_tokens": (["--truncate-prompt-tokens", "-1"], -1),
    "priority": (["--priority", "-2"], -2),
}


@pytest.fixture
def given() -> Iterator[Callable[..., tuple[InferenceConfig, dict[str, Any]]]]:
    """What a command is called with, for arguments."""
    calls: list[Any] = []

    def command(*, params: dict[str, Any], config: InferenceConfig) -> None:
        calls.append((config, params))

    probe = typer.Typer()
    probe.command()(with_options(command))

    def call(*arguments: str) -> tuple[InferenceConfig, dict[str, Any]]:
        done = RUN.invoke(probe, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        config, params = calls.pop()
        return config, params

    yield call


def test_every_field_is_an_option(given: Callable[..., Any]) -> None:
    assert set(CONFIG) == set(InferenceConfig.model_fields) and set(PARAMS) == set(SamplingParams.model_fields)
    for name, (arguments, value) in CONFIG.items():
        config, params = given(*arguments)
        assert (getattr(config, name), config.model_fields_set, params) == (value, {name}, {}), arguments
    for name, (arguments, value) in PARAMS.items():
        if name == "best_of":
            arguments = [*arguments, "--seed", "1"]
        config, params = given(*arguments)
        assert getattr(SamplingParams(**params), name) == value or name == "logits_processors", arguments
        assert name in params and config == InferenceConfig()
    assert given(*PARAMS["logits_processors"][0])[1]["logits_processors"] == [textwrap.indent]


def test_help_has_each_fields_description() -> None:
    done = RUN.invoke(app, ["generate", "--help"])
    words = " ".join(done.stdout.split())
    for owner in (InferenceConfig, SamplingParams):
        for name, field in owner.model_fields.items():
            assert f"--{name.replace('_', '-')}" in words
            description = " ".join(str(field.description).split())[1:]  # with a capital there
            assert description.replace("- ", "-") in words.replace("- ", "-"), name  # a hyphen may end a line
    assert done.exit_code == 0 and "How tokens are chosen:" in done.stdout and "[default: 256]" in words


def test_where_a_setting_comes_from(given: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Option, then environment, then file, then default."""
    file = tmp_path / "mesh.yaml"
    file.write_text("tp_size: 2\npp_size: 2\ndp_size: 2\n")
    monkeypatch.setenv("MESHLM_TP_SIZE", "3")
    monkeypatch.setenv("MESHLM_PP_SIZE", "3")
    config, _ = given("--config", str(file), "--tp-size", "4")
    assert config.mesh_shape == (2, 3, 4) and config.block_size is None


def test_json_from_a_file(given: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "draft.json"
    file.write_text('{"method": "ngram", "num_speculative_tokens": 3}')
    assert given("--speculative", f"@{file}")[0].speculative.num_speculative_tokens == 3
    assert given("--speculative", '{"method": "suffix"}')[0].speculative.method == "suffix"


# ---- help -----------------------------------------------------------------------------------------------------------


def test_help_teaches() -> None:
    done = RUN.invoke(app, ["--help"])
    assert done.exit_code == 0 and done.stderr == ""
    for said in ("Examples:", "meshlm chat demo --tp-size 2", "Exit codes:", "generate", "Complete prompts from"):
        assert said in done.stdout
    for command in ("generate", "chat", "serve", "env", "demo"):
        done = RUN.invoke(app, [command, "--help"])
        assert done.exit_code == 0 and f"Usage: meshlm {command}" in done.stdout and "Examples:" in done.stdout
        assert max(map(len, done.stdout.splitlines())) <= 120, "wrapped, but for examples"
    assert RUN.invoke(app, ["--version"]).stdout == f"meshlm {meshlm.__version__}\n"


def test_help_has_colours_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from meshlm.serving.cli.help import coloured

    text = "Options:\n  --tp-size INT  ranks"
    assert coloured(text) == text
    monkeypatch.setattr("sys.stdout", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[36m--tp-size\x1b[0m INT" in coloured(text)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[36m" not in coloured(text)


def test_help_and_mistakes_import_nothing_heavy() -> None:
    program = """
import sys
from meshlm.serving.cli import main
assert "pydantic" not in sys.modules
assert main(["--help"]) == main(["generate", "--help"]) == main(["serve", "--help"]) == main(["chat", "--help"]) == 0
assert main(["chat", "nowhere"]) == 2
assert not {"torch", "transformers", "fastapi"} & set(sys.modules)
"""
    environment = {**os.environ, "MESHLM_TP_SICE": "2", "MESHLM_API_KEY": "known"}
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    warning, error = done.stderr.splitlines()
    assert warning.startswith("meshlm: warning: environment variable MESHLM_TP_SICE is not known and has no effect; ")
    assert error.startswith("meshlm chat: error: MODEL: nowhere does not exist; ")


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a directory that could be a model, and files that are none."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "words.txt").write_text("")
    (tmp_path / "bad.jsonl").write_text('"a"\n{"prompt": "b", "temprature": 1}\n')
    (tmp_path / "worse.jsonl").write_text("{\n")
    (tmp_path / "mesh.yaml").write_text("tp_sice: 2\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "meshlm: error: no command is given; there are generate, chat, "),
        (["genrate"], "meshlm: error: no such command 'genrate'. Did you mean 'generate'?; see meshlm --help"),
        (
            ["env", "--jsno"],
            "meshlm env: error: no such option: --jsno (Possible options: --json); see meshlm env --help",
        ),
        (["env", "--json=1"], "meshlm env: error: option '--json' does not take a value; see meshlm env --help"),
        (["generate"], "meshlm generate: error: missing argument 'MODEL'; see meshlm generate --help"),
        (["generate", "nowhere", "a"], "meshlm generate: error: MODEL: nowhere does not exist; expected a directory"),
        (["chat", "empty"], "meshlm chat: error: MODEL: empty holds no config.json; expected a directory with"),
        (["serve", "words.txt"], "meshlm serve: error: MODEL: words.txt is neither a directory nor a .gguf file; "),
        (["generate", "model", "--file", "words.txt"], "meshlm generate: error: --file: words.txt holds no prompt"),
        (
            ["generate", "model", "--file", "bad.jsonl"],
            "meshlm generate: error: bad.jsonl:2: temprature: unknown field; the nearest known one is temperature",
        ),
        (["generate", "model", "--file", "worse.jsonl"], "meshlm generate: error: worse.jsonl:1: not JSON: "),
        (
            ["generate", "model", "a", "--tp-size", "0"],
            "meshlm generate: error: --tp-size: 0 is not valid: must be at least 1",
        ),
        (
            ["generate", "model", "a", "--dtype", "int4"],
            "meshlm generate: error: --dtype: 'int4' is not valid: must be one of 'auto', 'float32', ",
        ),
        (
            ["chat", "model", "--kv-memory-bytes", "1000", "--num-kv-blocks", "9"],
            "meshlm chat: error: --kv-memory-bytes=1000 and --num-kv-blocks=9 each fix the size of the KV cache: ",
        ),
        (
            ["generate", "model", "a", "--stop-token-ids", "x"],
            "meshlm generate: error: --stop-token-ids[0]: 'x' is not valid: must be an integer",
        ),
        (
            ["generate", "model", "a", "--structured-outputs", "{"],
            "meshlm generate: error: --structured-outputs: '{' is not valid: must be JSON, or @FILE with it: ",
        ),
        (
            ["generate", "model", "a", "--logits-processors", "nowhere:f"],
            "meshlm generate: error: --logits-processors: ['nowhere:f'] is not valid: must be MODULE:FUNCTION: No ",
        ),
        (["generate", "model", "a", "--seed", "-1"], "meshlm generate: error: --seed: -1 is not valid: "),
        (["generate", "model", "a", "--engine-seed", "x"], "meshlm generate: error: --engine-seed: 'x' is not valid: "),
        (["serve", "model", "--port", "x"], "meshlm serve: error: --port: 'x' is not valid: must be a valid integer; "),
        (
            ["serve", "model", "--drain", "-1"],
            "meshlm serve: error: --drain: '-1' is not valid: must be greater than or ",
        ),
        (["serve", "model", "--tool-parser", "lama"], "meshlm serve: error: --tool-parser: 'lama' is not known; the "),
        (["bench"], "meshlm bench: error: missing command; see meshlm bench --help"),
        (["bench", "serve", "--slow"], "meshlm bench serve: error: no such option: --slow (Possible options: --json, "),
        (["bench", "serve", "--tokenizer", "no"], "meshlm bench serve: error: --tokenizer: no does not exist"),
        (
            ["bench", "serve", "--timeout", "nan"],
            "meshlm bench serve: error: --timeout: nan is not valid: must be a ",
        ),
        (
            ["bench", "serve", "--url", "a:80"],
            "meshlm bench serve: error: --url: 'a:80' is not valid: expected http://HOST",
        ),
        (["bench", "serve", "--url", "http://[::1"], "meshlm bench serve: error: --url: 'http://[::1' is not valid: "),
        (["bench", "serve", "--slo", "ttft:nan"], "meshlm bench serve: error: --slo: 'ttft:nan' is no limit; give "),
        (["serve", "model", "--max-body", "much"], "meshlm serve: error: --max-body: must be a number of bytes, "),
        (["serve", "model", "--api-key", ""], "meshlm serve: error: --api-key: a key must be printable ASCII"),
        (
            ["serve", "model", "--api-key-file", "words.txt"],
            "meshlm serve: error: --api-key-file: words.txt holds",
        ),
        (["chat", "model", "--config", "mesh.yaml"], "meshlm chat: error: --tp-sice: unknown field; the nearest"),
        (["chat", "model", "--config", "mesh.ini"], "meshlm chat: error: mesh.ini: suffix '.ini' is not one of .yaml,"),
        (["chat", "model", "--n", "2"], "meshlm chat: error: --n: a chat shows one answer, as text; leave it out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("folder")
def test_a_mistake_is_one_line(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(arguments)
    said = capsys.readouterr()
    assert said.err.startswith(told) and said.err.count("\n") == 1, said.err
    assert (code, said.out) == (2, "")


@pytest.mark.usefixtures("folder")
def test_a_failure_is_one_line_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["generate", "model", "--file", "gone.txt"]) == 1
    assert capsys.readouterr().err == "meshlm generate: error: gone.txt: No such file or directory\n"
    Path("latin.txt").write_bytes("é".encode("latin-1"))
    assert main(["generate", "model", "--file", "latin.txt"]) == 1
    assert capsys.readouterr().err.startswith("meshlm generate: error: latin.txt is not UTF-8: ")
    monkeypatch.setenv("MESHLM_CACHE", "nothing")
    assert main(["demo", "--offline"]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("meshlm demo: error: ") and said.err.count("\n") == 1 and said.out == ""


def test_an_interrupt(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(offline: bool) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("meshlm.serving.demo_model.demo_model_path", interrupted)
    assert main(["demo"]) == 130 and capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "argv", ["meshlm", "demo"])
    monkeypatch.setattr(sys, "excepthook", None)
    with pytest.raises(KeyboardInterrupt):  # of which the process dies
        main()


def test_streams_that_take_or_give_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as closed:
        for name in ("stdin", "stdout"):  # as by `<&- >&-`
            closed.setattr(sys, name, None)
        assert main(["--version"]) == 0
    with open("/dev/full", "w") as full, monkeypatch.context() as patched:  # and is closed in peace
        patched.setattr(sys, "stdout", full)
        assert main(["--version"]) == 1
    assert capsys.readouterr() == ("", "meshlm: error: No space left on device\n")


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(offline: bool) -> None:
        raise KeyError("ours")

    monkeypatch.setattr("meshlm.serving.demo_model.demo_model_path", wrong)
    with pytest.raises(KeyError):
        main(["demo"])


# ---- demo, env ------------------------------------------------------------------------------------------------------


def test_demo_into_a_closed_pipe(demo_model: Path) -> None:
    """As with `| head -0`: a quiet end."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-P", "-m", "meshlm", "demo", "--offline"]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (141, "")


def test_demo_prints_a_path_and_what_to_try(demo_model: Path) -> None:
    done = RUN.invoke(app, ["demo", "--offline"])
    assert (done.exit_code, done.stdout) == (0, f"{demo_model}\n") and "meshlm chat demo" in done.stderr


def test_env(monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON and nothing else, text in a pipe, a table on a terminal."""
    found = json.loads(RUN.invoke(app, ["env", "--json"]).stdout)
    assert found["devices"][0]["device"] == "cpu"
    assert set(found["devices"][0]["attention"]["eager"]) == {"float32", "bfloat16", "float16"}
    text = RUN.invoke(app, ["env"]).stdout
    assert "auto takes  " in text and "┃" not in text
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("typer.testing._NamedTextIOWrapper.isatty", lambda self: self.name == "<stdout>", raising=False)
    table = RUN.invoke(app, ["env"]).stdout
    assert "┃" in table and "attention" in table and "auto takes" in table and found["devices"][0]["name"] in table
