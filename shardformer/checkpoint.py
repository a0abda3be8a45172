"""From a model, wherever it is, to what ranks need of it: its numbers, and a source of its weights."""

import json
import re
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import torch
from torch import nn

from ..kernels.eager import ACTIVATIONS, KINDS, activation_kind
from ..policies import DecoderSpec, ModelSpec, Policy, RotarySpec, find_policy, has_policy
from .conversion import converted
from .generic import read_generic, transformers_class
from .sources import GGUFSource, ModuleSource, MXFP4Source, PickledSource, RandomSource, SafetensorsSource
from .weights import CheckpointError, WeightSource, check_checkpoint, check_tied

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Model: TypeAlias = Union[str, Path, nn.Module, "PreTrainedConfig"]

_DEQUANTISED = "mxfp4"  # GPT-OSS is published in no other form


@dataclass(frozen=True)
class Checkpoint:
    """A model whose weights were checked to be complete, not yet read. Can be sent to other processes."""

    spec: ModelSpec
    source: WeightSource
    name: str
    eos_token_ids: tuple[int, ...]  # of the model's config; a generation config may know better


def open_checkpoint(
    model: Model, *, policy: str = "auto", allow_pickle: bool = False, trust_remote_code: bool = False
) -> Checkpoint:
    """Reads a model's config and its tensors' names and shapes.

    model: a directory of safetensors (or, with `allow_pickle`, of .bin files) with a config.json, a GGUF file, a
    transformers module, or a transformers config, which gets random weights. policy: see `InferenceConfig.policy`.
    trust_remote_code: an architecture that only the directory's own code knows may be built by it. Raises ValueError
    (CheckpointError for faulty weights) naming what is wrong; no weight is read.
    """
    if isinstance(model, nn.Module):
        return _open_module(model, policy)
    if not isinstance(model, str | Path):
        return _open_config(model, policy)
    path = Path(model).expanduser()
    if path.is_dir():
        return _open_directory(path, str(model), policy, allow_pickle, trust_remote_code)
    if path.suffix == ".gguf" and path.exists():
        return _open_gguf(path, str(model), policy)
    if path.exists():
        raise ValueError(f"model: {path} is neither a directory nor a .gguf file")
    raise ValueError(
        f"model: {model} does not exist; expected a directory with config.json and *.safetensors, or a GGUF file"
    )


def read_spec(model: Model, *, policy: str = "auto", trust_remote_code: bool = False) -> ModelSpec:
    """What a model's config says of it, whether or not there are weights; the dtype too, float32 if it names none.

    model: as for `open_checkpoint`; of a directory no more is read than its config.json, or a config's own path.
    """
    if isinstance(model, str | Path):
        path = Path(model).expanduser()
        if path.is_dir() or (path.suffix == ".json" and path.exists()):
            return _read_path(path, str(model), policy, trust_remote_code).spec
    return open_checkpoint(model, policy=policy, trust_remote_code=trust_remote_code).spec


def _open_module(model: nn.Module, policy: str) -> Checkpoint:
    config, name = getattr(model, "config", None), type(model).__name__
    if config is None:
        raise ValueError(f"model: a {name} has no transformers config")
    spec = _read_spec(config, [name], name, policy)
    dtype = next((p.dtype for p in model.parameters()), torch.float32)  # its config may remember another
    spec = replace(spec, dtype=str(dtype).removeprefix("torch."))
    source = ModuleSource(model)
    _check_module(model, source)
    unused = re.compile("|".join(f"(?:{pattern})" for pattern in spec.ignored) or "$.")
    source.shapes = {name: shape for name, shape in source.shapes.items() if not unused.fullmatch(name)}
    return _checked(config, spec, source, name)


def _check_module(model: Any, source: ModuleSource) -> None:
    """Proves that a module is what its class and config say, since no more than its weights are taken from it."""
    kind, name = transformers_class([type(model).__name__]), type(model).__name__
    if type(model) is not kind:
        raise ValueError(f"model: {name} is a class of {type(model).__module__}, not of transformers")
    with torch.device("meta"):
        plain = kind._from_config(deepcopy(model.config), dtype=model.dtype)
    modules = dict(model.named_modules())
    for path, module in plain.named_modules():
        found = type(modules.get(path, module))
        if found is not type(module):
            raise ValueError(
                f"model: {path} of this {name} is a {found.__name__}; its config makes it a {type(module).__name__}"
            )
    state = dict(model.named_parameters(remove_duplicate=False))
    tied = model.all_tied_weights_keys
    check_tied(source, {copy: own for copy, own in tied.items() if state.get(copy) is not state.get(own)})


def _open_config(config: Any, policy: str) -> Checkpoint:
    from transformers import PreTrainedConfig

    if not isinstance(config, PreTrainedConfig):
        raise ValueError(
            f"model: a {type(config).__name__} is not a model; expected a path, a transformers module or its config"
        )
    name = f"{type(config).__name__} with random weights"
    spec = _read_spec(config, config.architectures or [_architecture_of(config)], name, policy)
    return _checked(config, spec, RandomSource(spec.shapes(), spec.dtype), name)


def _open_gguf(path: Path, name: str, policy: str) -> Checkpoint:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"{path}: not a readable GGUF file: {_one_line(error)}") from error
    source = GGUFSource(path, config)
    spec = _read_spec(config, config.architectures or [_architecture_of(config)], name, policy)
    return _checked(config, _of_dtype(spec, config, source), source, name)


def _open_directory(path: Path, name: str, policy: str, allow_pickle: bool, trust_remote_code: bool) -> Checkpoint:
    found = _read_path(path, name, policy, trust_remote_code)
    config, spec = found.config, found.spec
    source = _open_files(path, allow_pickle)
    source = MXFP4Source(source) if found.quant_method == _DEQUANTISED else source
    spec = _of_dtype(spec, config, source)
    if source.shapes != spec.shapes():
        try:
            source = converted(source, config, found.runs_code)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from error
    return _checked(config, spec, source, name)


@dataclass(frozen=True)
class _Read:
    """What a config.json says."""

    config: Any  # transformers'
    spec: ModelSpec
    runs_code: bool  # that the directory brings
    quant_method: str | None


def _read_path(path: Path, name: str, policy: str, trust_remote_code: bool) -> _Read:
    """path: of a directory with a config.json, or of such a file."""
    from transformers import AutoConfig

    file = path / "config.json" if path.is_dir() else path
    fields = _read_fields(file)
    architectures = fields.get("architectures") or []
    runs_code = _needs_remote_code(fields, file.parent, trust_remote_code)
    method = (fields.get("quantization_config") or {}).get("quant_method")
    if method not in (None, _DEQUANTISED):
        raise CheckpointError(
            f"{file}: weights quantised by {method} (quantization_config) are not supported; use the model in "
            f"bfloat16, float16 or float32"
        )
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=runs_code)
    except Exception as error:
        raise CheckpointError(f"{file}: {_one_line(error)}") from error
    own = _own_class(fields["auto_map"], file.parent) if runs_code else None
    return _Read(config, _read_spec(config, architectures, name, policy, own), runs_code, method)


def _read_fields(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise CheckpointError(f"{file.parent}: holds no config.json")
    try:
        fields = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file}: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{file}: not a table of fields")
    return fields


def _needs_remote_code(fields: dict[str, Any], path: Path, trusted: bool) -> bool:
    """Whether only code that the checkpoint brings knows its architecture. Raises ValueError where nothing does, or
    where that code is not trusted; it names the supported ones before transformers names its own."""
    architectures = fields.get("architectures") or []
    if has_policy(architectures) or transformers_class(architectures) is not None:
        return False
    if not fields.get("auto_map"):
        find_policy(architectures)
    if not trusted:
        raise ValueError(
            f"architecture {', '.join(architectures)} is code that {path} brings (auto_map in config.json); it "
            f"runs only with InferenceConfig.trust_remote_code=True"
        )
    return True


def _own_class(auto_map: dict[str, str], path: Path) -> Any:
    """The causal language model that a checkpoint's own code defines, which is executed."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    reference = auto_map.get("AutoModelForCausalLM")
    if reference is None:
        raise CheckpointError(f"{path / 'config.json'}: its auto_map names no AutoModelForCausalLM")
    try:
        return get_class_from_dynamic_module(reference, path, local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"{path}: its own code, {reference}: {_one_line(error)}") from error


def _open_files(path: Path, allow_pickle: bool) -> WeightSource:
    pickles = sorted(path.glob("pytorch_model*.bin"))
    if not pickles or any(path.glob("*.safetensors*")):
        return SafetensorsSource(path)
    if not allow_pickle:
        raise CheckpointError(
            f"{path}: its weights are only in {pickles[0].name}, a pickle, and reading one can execute code from it; "
            f"if you trust it, set InferenceConfig.allow_pickle=True"
        )
    return PickledSource(path)


def _architecture_of(config: Any) -> str:
    """The causal language model that transformers makes of a config that names none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type)


def _policy_of(architectures: list[str]) -> Policy | None:
    return find_policy(architectures) if has_policy(architectures) else None


def _read_spec(config: Any, architectures: list[str], name: str, policy: str, own: Any = None) -> ModelSpec:
    """By the family's own policy where it has one, else, or if `policy` says so, by the generic one.

    own: the class of a model that only the checkpoint's code knows.
    """
    usual = _architecture_of(config)
    is_usual = own is not None or _policy_of(architectures) is _policy_of([usual])
    is_by_hand = policy != "generic" and has_policy(architectures)
    if not (is_usual and is_by_hand):  # only then transformers' code of the model is imported, which takes a second
        generic = own or transformers_class(architectures)
        if generic is not None and not is_usual:
            find_policy(architectures)  # raises where there is none, as for a model without its head
            raise ValueError(
                f"{name}: architectures names {', '.join(architectures)}, but the causal language model of model_type "
                f"{config.model_type!r} is {usual}"
            )
        if generic is not None and not is_by_hand:
            return read_generic(config, generic)
    spec = find_policy(architectures).spec(config, read_rotary)
    check_spec(spec, name)
    return spec


def _of_dtype(spec: ModelSpec, config: Any, source: WeightSource) -> ModelSpec:
    """With the files' dtype, where the config names none."""
    return spec if getattr(config, "dtype", None) is not None else replace(spec, dtype=source.dtype)


def _checked(config: Any, spec: ModelSpec, source: WeightSource, name: str) -> Checkpoint:
    check_checkpoint(spec.shapes(), spec.ignored, source, name)
    eos = getattr(config, "eos_token_id", None)
    return Checkpoint(spec, source, name, () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def check_spec(spec: ModelSpec, name: str) -> None:
    """Raises ValueError where a config asks for what our layers do not have."""
    if not isinstance(spec, DecoderSpec):
        return
    for layer in set(spec.layers):
        activation = getattr(layer.mlp, "activation", None)
        if activation is not None and activation_kind(activation) not in KINDS:
            raise ValueError(
                f"{name}: activation {activation!r} is not supported; supported: {', '.join(sorted(ACTIVATIONS))}"
            )


def read_rotary(config: Any, layer_type: str | None = None) -> RotarySpec:
    """RoPE frequencies of a transformers config, by transformers' own functions for every scaling kind.

    layer_type: of layers, where the config has parameters for each.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters, kwargs = getattr(config, "rope_parameters", None), {}
    if parameters is None:  # GPT-J and its like, older than the name
        parameters = {"rope_type": "default", "rope_theta": 10000.0}
    elif layer_type is not None and layer_type in parameters:
        parameters, kwargs = parameters[layer_type], {"layer_type": layer_type}
    kind = parameters.get("rope_type", "default")
    if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
        known = ", ".join(sorted(ROPE_INIT_FUNCTIONS))
        raise ValueError(f"rope_type {kind!r} is not known; known: default, {known}")
    if kind == "default":
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        dim = getattr(config, "rotary_dim", None) or int(head_dim * parameters.get("partial_rotary_factor", 1.0))
        inv_freq = 1.0 / (parameters["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))
        scaling = 1.0
    else:
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), **kwargs)
    # These two choose frequencies by the length of the sequence: past the original length keys that are cached
    # already would be wrong.
    changing = kind in ("dynamic", "longrope")
    limit = parameters.get("original_max_position_embeddings", config.max_position_embeddings) if changing else None
    return RotarySpec(tuple(inv_freq.tolist()), float(scaling), limit)
