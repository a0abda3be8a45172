"""GGUF files, through the package `gguf` and transformers' names for their tensors."""

from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..shard import Range
from ..weights import CheckpointError, WeightSource

# Models of whose config a GGUF file, as transformers reads it, leaves nothing to guess but sizes, which the tensors'
# shapes confirm. Of others it loses factors, windows, which layers are what, or what of a head is rotated.
_WHOLE_CONFIGS = ("llama", "qwen2", "qwen3")
_LLAMA3_FACTORS = "rope_freqs.weight"
_ROPE_SCALING = ("scaling.type", "scaling.factor", "scale_linear", "scaling.attn_factor")


class GGUFSource(WeightSource):
    """A GGUF file, dequantised tensor by tensor; names and layout as transformers maps them."""

    def __init__(self, path: Path, config: Any) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

        self._path = str(path)
        if config.model_type not in _WHOLE_CONFIGS:
            raise CheckpointError(
                f"{path}: GGUF files of {config.model_type} are not supported, only of {', '.join(_WHOLE_CONFIGS)}: "
                f"transformers reads no more than a part of other models' configs; use the safetensors directory"
            )
        if any(tensor.name == _LLAMA3_FACTORS for tensor in self._reader.tensors):
            raise CheckpointError(
                f"{path}: {_LLAMA3_FACTORS} (the RoPE factors of Llama 3.1 and later) is not supported: transformers "
                f"reads rope_theta alone from a GGUF file, and the tokens would be wrong; use the safetensors directory"
            )
        if scaling := self._rope_scaling():
            raise CheckpointError(
                f"{path}: {scaling} (scaled RoPE) is not supported: transformers reads rope_theta alone from a GGUF "
                f"file, and the tokens would be wrong; use the safetensors directory"
            )
        processor = TENSOR_PROCESSORS.get(config.model_type, TensorProcessor)
        heads = ("num_attention_heads", "num_key_value_heads")
        self._processor = processor(config={name: getattr(config, name) for name in heads})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        # GGUF's name -> transformers'. Without its children, of which transformers makes maps too, taking seconds: of
        # these models every tensor is found under its whole name.
        whole = SimpleNamespace(config=config, state_dict=model.state_dict, named_children=tuple)
        names = get_gguf_hf_weights_map(whole, self._processor)
        self._names = {}
        self.shapes = {}
        for tensor in self._reader.tensors:
            name = names.get(tensor.name, tensor.name)
            self._names[name] = tensor.name
            self.shapes[name] = tuple(int(n) for n in reversed(tensor.shape))

    def _rope_scaling(self) -> str:
        """The metadata that scale RoPE, as llama.cpp takes them: a factor without a type is linear. Empty if none."""
        from gguf import GGUFValueType

        found: dict[str, Any] = {}
        for key, field in self._reader.fields.items():
            name, part = key.partition(".rope.")[2], field.parts[field.data[0]] if field.data else None
            if name in _ROPE_SCALING and part is not None:
                value = bytes(part).decode() if field.types == [GGUFValueType.STRING] else part[0].item()
                found[name] = (key, value)
        kind, factor, old_factor, attention = (found.get(name, ("", 0))[1] for name in _ROPE_SCALING)
        factor = factor or old_factor or 1
        scales = kind not in (0, "none", "linear") or (kind != "none" and factor != 1) or attention not in (0, 1)
        return ", ".join(f"{key}={value!r}" for key, value in found.values()) if scales else ""

    @cached_property
    def _reader(self) -> Any:
        from gguf import GGUFReader

        return GGUFReader(self._path)

    @cached_property
    def _tensors(self) -> dict[str, Any]:
        return {tensor.name: tensor for tensor in self._reader.tensors}

    def read(self, name: str, ranges: tuple[Range, ...], out: Tensor) -> None:
        from gguf import dequantize

        tensor = self._tensors[self._names[name]]
        values = dequantize(tensor.data, tensor.tensor_type)
        values = self._processor.process(weights=values, name=tensor.name).weights
        self.bytes_read += tensor.n_bytes
        out.copy_(torch.from_numpy(values[tuple(slice(*r) for r in ranges)].copy()))

    def close(self) -> None:
        self.__dict__.pop("_tensors", None)
        self.__dict__.pop("_reader", None)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_reader", "_tensors")}
