"""Architectures that only a checkpoint's own code knows: run by the generic policy where that code is trusted."""

import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, dynamic_module_utils
from transformers.models.llama import configuration_llama, modeling_llama

from meshlm import InferenceConfig, InferenceEngine
from meshlm.policies import GenericSpec
from meshlm.shardformer import open_checkpoint
from tiny import SIZES

pytestmark = pytest.mark.usefixtures("one_thread")

AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
CONFIG = InferenceConfig(device="cpu", trust_remote_code=True, num_kv_blocks=32, max_num_batched_tokens=16)
PROMPTS = [[5, 17, 93, 2, 41, 7, 11], [8], [64, 3, 29]]
GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module", autouse=True)
def module_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where transformers copies the code to before it runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.syspath_prepend(dynamic_module_utils.HF_MODULES_CACHE)
        yield


def own_code(module: object, marker: Path) -> str:
    """Llama's, under another name, and with another residual; notes that it runs."""
    code = inspect.getsource(module).replace("from ... import", "from transformers import")  # type: ignore[arg-type]
    code = code.replace("from ...", "from transformers.").replace("Llama", "Own").replace("_llama", "_own")
    code = code.replace('"llama"', '"own"').replace("residual + hidden_states", "residual + 0.7 * hidden_states")
    return f"{code}\nopen({str(marker)!r}, 'a').close()\n"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of three layers, whose name is that of no module."""
    path = tmp_path_factory.mktemp("checkpoints") / "own-1.5"
    path.mkdir()
    for name, module in (("configuration_own", configuration_llama), ("modeling_own", modeling_llama)):
        (path / f"{name}.py").write_text(own_code(module, path / "executed"))
    fields = {"architectures": ["OwnForCausalLM"], "model_type": "own", "auto_map": AUTO_MAP, "dtype": "float32"}
    (path / "config.json").write_text(json.dumps(SIZES | fields))
    config = AutoConfig.from_pretrained(path, trust_remote_code=True)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, trust_remote_code=True).save_pretrained(path)
    (path / "executed").unlink()
    return path


@pytest.fixture(scope="module")
def expected(directory: Path) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
    outputs = [model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0] for prompt in PROMPTS]
    tokens = [output[len(prompt) :].tolist() for output, prompt in zip(outputs, PROMPTS, strict=True)]
    assert len(tokens[0]) == 12 and len(set(tokens[0])) > 5
    return tokens


def generate(directory: Path, config: InferenceConfig) -> list[list[int]]:
    with InferenceEngine(directory, config) as engine:
        return [list(output.token_ids) for output in engine.generate(PROMPTS, GREEDY, progress=False)]


def fault(directory: Path, trusted: bool) -> str:
    with pytest.raises(ValueError) as error:
        open_checkpoint(directory, trust_remote_code=trusted)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_on_one_rank(directory: Path, expected: list[list[int]]) -> None:
    spec = open_checkpoint(directory, trust_remote_code=True).spec
    assert isinstance(spec, GenericSpec) and spec.architecture == "OwnForCausalLM"
    assert spec.model_class.__module__.startswith("transformers_modules.")
    assert generate(directory, CONFIG) == expected


@pytest.mark.slow
def test_on_ranks_of_our_own(directory: Path, expected: list[list[int]]) -> None:
    """They are sent the class by name, and find its module."""
    assert generate(directory, CONFIG.replace(tp_size=2)) == expected


def test_without_trust_nothing_is_executed(directory: Path, edited: Callable[..., Path]) -> None:
    path = edited()
    marker = directory / "executed"
    marker.unlink(missing_ok=True)
    assert fault(path, trusted=False) == (
        f"architecture OwnForCausalLM is code that {path} brings (auto_map in config.json); it runs only with "
        f"InferenceConfig.trust_remote_code=True"
    )
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        InferenceEngine(path, CONFIG.replace(trust_remote_code=False))
    assert not marker.exists()
    open_checkpoint(path, trust_remote_code=True)
    assert marker.exists()


@pytest.fixture
def edited(directory: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the directory with (file, pattern, replacement) applied, which makes it code that has not yet run."""

    def edit(file: str = "modeling_own.py", pattern: str = r"\Z", replacement: str = "# another\n") -> Path:
        for source in directory.iterdir():
            (tmp_path / source.name).write_bytes(source.read_bytes())
        code, count = re.subn(pattern, replacement, (tmp_path / file).read_text())
        assert count
        (tmp_path / file).write_text(code)
        return tmp_path

    return edit


@pytest.mark.parametrize(
    ("file", "pattern", "replacement", "message"),
    [
        ("configuration_own.py", "base_model_tp_plan", "a_plan", "architecture OwnForCausalLM is not supported: there"),
        ("modeling_own.py", "ALL_ATTENTION_FUNCTIONS.get_interface", "max", "architecture OwnForCausalLM is not supp"),
        ("modeling_own.py", r"\Z", "import nothing_such\n", "its own code, modeling_own.OwnForCausalLM: "),
        ("modeling_own.py", r"\Z", "raise KeyError('such')\n", "its own code, modeling_own.OwnForCausalLM: 'such'"),
        ("modeling_own.py", r"class OwnForCausalLM", "class OtherForCausalLM", "its own code, modeling_own.OwnForCaus"),
        ("config.json", r"AutoModelForCausalLM", "AutoModel", "config.json: its auto_map names no AutoModelForCausal"),
    ],
)
def test_what_is_refused(edited: Callable[..., Path], file: str, pattern: str, replacement: str, message: str) -> None:
    assert message in fault(edited(file, pattern, replacement), trusted=True)
