"""`InferenceShardformer`: from a model and a mesh to this rank's stage, loaded and bound."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import torch
from torch import nn

from ..config import InferenceConfig
from ..kernels import select_ops
from ..kernels.eager import ACTIVATIONS
from ..mesh.collectives import Communicator
from ..mesh.launch import RankPlace, torchrun_place
from ..mesh.process_group_mesh import ProcessGroupMesh
from ..policies import DecoderSpec, ModelSpec, RotarySpec, find_policy
from .backends import Workload, tune
from .linear import Slices
from .rebinding import bind
from .shard import Shards, split_layers
from .stage import PipelineStage
from .weights import (
    CheckpointError,
    GGUFSource,
    ModuleSource,
    RandomSource,
    SafetensorsSource,
    WeightSource,
    check_checkpoint,
    load_weights,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Model: TypeAlias = Union[str, Path, nn.Module, "PreTrainedConfig"]

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Checkpoint:
    """A model whose weights were checked to be complete, not yet read. Can be sent to other processes."""

    spec: ModelSpec
    source: WeightSource
    name: str
    eos_token_ids: tuple[int, ...]  # of the model's config; a generation config may know better


STAGES: dict[type[ModelSpec], Callable[..., PipelineStage]] = {DecoderSpec: PipelineStage}
"""Whose layers a spec's stage is made of."""


def open_checkpoint(model: Model) -> Checkpoint:
    """Reads a model's config and its tensors' names and shapes.

    model: a directory of safetensors with a config.json, a GGUF file, a transformers module, or a transformers config,
    which gets random weights. Raises ValueError (CheckpointError for faulty weights) naming what is wrong; no weight is
    read.
    """
    source: WeightSource
    if not isinstance(model, str | Path | nn.Module):
        config, name = _transformers_config(model), f"{type(model).__name__} with random weights"
        spec = find_policy(config.architectures or [_architecture_of(config)]).spec(config, read_rotary)
        source = RandomSource(spec)
    elif isinstance(model, nn.Module):
        config = getattr(model, "config", None)
        if config is None:
            raise ValueError(f"model: a {type(model).__name__} has no transformers config")
        spec = find_policy([type(model).__name__]).spec(config, read_rotary)
        dtype = next((p.dtype for p in model.parameters()), torch.float32)  # its config may remember another
        spec = replace(spec, dtype=str(dtype).removeprefix("torch."))
        source, name = ModuleSource(model), type(model).__name__
        unused = re.compile("|".join(f"(?:{pattern})" for pattern in spec.ignored) or "$.")
        source.shapes = {name: shape for name, shape in source.shapes.items() if not unused.fullmatch(name)}
    else:
        path, name = Path(model).expanduser(), str(model)
        if not path.exists():
            raise ValueError(
                f"model: {name} does not exist; expected a directory with config.json and *.safetensors, or a GGUF file"
            )
        config = _read_config(path)
        spec = find_policy(config.architectures or []).spec(config, read_rotary)
        source = SafetensorsSource(path) if path.is_dir() else GGUFSource(path, config, spec)
    check_spec(spec, name)
    if not isinstance(model, nn.Module) and getattr(config, "dtype", None) is None:
        spec = replace(spec, dtype=source.dtype)
    check_checkpoint(spec, source, name)
    eos = getattr(config, "eos_token_id", None)
    return Checkpoint(spec, source, name, () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos))


def _read_config(path: Path) -> Any:
    from transformers import AutoConfig

    if path.is_dir():
        file = path / "config.json"
        if not file.exists():
            raise CheckpointError(f"{path}: holds no config.json")
        try:
            known = json.loads(file.read_text())
        except ValueError as error:
            raise CheckpointError(f"{file}: not JSON: {error}") from error
        if not isinstance(known, dict):
            raise CheckpointError(f"{file}: not a table of fields")
        find_policy(known.get("architectures") or [])  # names the supported ones before transformers names its own
        try:
            return AutoConfig.from_pretrained(path, local_files_only=True)
        except Exception as error:
            raise CheckpointError(f"{file}: {' '.join(str(error).split())}") from error
    if path.suffix != ".gguf":
        raise ValueError(f"model: {path} is neither a directory nor a .gguf file")
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"{path}: not a readable GGUF file: {' '.join(str(error).split())}") from error
    config.architectures = config.architectures or [_architecture_of(config)]
    return config


def _transformers_config(model: object) -> "PreTrainedConfig":
    from transformers import PreTrainedConfig

    if not isinstance(model, PreTrainedConfig):
        raise ValueError(
            f"model: a {type(model).__name__} is not a model; expected a path, a transformers module or its config"
        )
    return model


def _architecture_of(config: Any) -> str:
    """The causal language model that transformers makes of a config that names none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type)


def check_spec(spec: ModelSpec, name: str) -> None:
    """Raises ValueError where a config asks for what our layers do not have."""
    if not isinstance(spec, DecoderSpec):
        return
    for layer in set(spec.layers):
        activation = getattr(layer.mlp, "activation", None)
        if activation is not None and activation not in ACTIVATIONS:
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


def _own_device(name: str) -> torch.device:
    """The device that a config names, for the process that asks."""
    if name != "auto":
        return torch.device(name)
    place = torchrun_place() or RankPlace(0, 1, 0, 1)
    enough = torch.cuda.device_count() >= place.local_world_size
    return torch.device("cuda", place.local_rank) if enough else torch.device("cpu")


class InferenceShardformer:
    """Gives each rank of a mesh its stage of a model.

    config: dtype, max_model_len, attention_backend; mesh: axes named "pp" and "tp"; device: by default the config's,
    "auto" being cuda:LOCAL_RANK where there is a device for every rank on the host, else cpu.
    """

    def __init__(self, config: InferenceConfig, mesh: ProcessGroupMesh, device: torch.device | None = None) -> None:
        self.config, self.mesh = config, mesh
        self.device = device or _own_device(config.device)
        self.tp = Communicator.along(mesh, "tp")

    def shards(self, spec: ModelSpec) -> Shards:
        """How the model is split over this mesh's tp axis."""
        return Shards(spec, self.mesh.size("tp"))

    def optimize(self, model: Model | Checkpoint) -> PipelineStage:
        """This rank's stage: its layers, its slices of them, ops and attention backend bound.

        Raises ValueError where the model cannot be divided so, CheckpointError where weights are faulty.
        """
        checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(model)
        spec = checkpoint.spec
        dtype = choose_dtype(self.config, spec)
        pp_size, pp_rank = self.mesh.size("pp"), self.mesh.coordinate("pp")
        slices = Slices(self.shards(spec), self.tp, dtype)
        is_tuned = self.config.attention_backend == "tuned"
        stage = STAGES[type(spec)](
            spec,
            split_layers(spec, pp_size)[pp_rank],
            slices,
            select_ops(self.device, dtype),
            backend="auto" if is_tuned else self.config.attention_backend,
            max_model_len=max_model_len(self.config, spec),
            device=self.device,
            block_size=self.config.block_size,
        )
        if is_tuned:
            specs = [attention.backend.spec for attention in stage.attentions]
            bind(stage, tune(specs, workload_of(self.config, spec)))
        stage.weight_bytes = load_weights(stage, checkpoint.source, self.device)
        return stage.eval()


def choose_dtype(config: InferenceConfig, spec: ModelSpec) -> torch.dtype:
    """The config's dtype, "auto" being the checkpoint's. Raises ValueError if that is not one to compute in."""
    name = spec.dtype if config.dtype == "auto" else config.dtype
    if name not in DTYPES:
        raise ValueError(f"dtype='auto': the checkpoint's dtype is {name}; choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def workload_of(config: InferenceConfig, spec: ModelSpec) -> Workload:
    """What "tuned" attention is to be fast at."""
    return Workload(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=max_model_len(config, spec),
        block_size=config.block_size,
    )


def max_model_len(config: InferenceConfig, spec: ModelSpec) -> int:
    """Tokens a sequence may have. Raises ValueError if the config asks for more than the model's positions."""
    limit = spec.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ValueError(f"max_model_len={config.max_model_len} is more than the model's {limit} positions")
    return config.max_model_len or limit
