"""Checkpoints whose tensors are named, or cut up, otherwise than in transformers' modules in memory.

transformers converts such checkpoints as it loads them, by a table of renamings and operations. The same is done here
with names and shapes alone: each tensor in memory becomes a virtual one over the stored ones.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from .sources.virtual import Virtual, VirtualSource, concatenate, stack
from .weights import CheckpointError, WeightSource, check_tied

if TYPE_CHECKING:
    from transformers.core_model_loading import ConversionOps, WeightConverter

Tensors: TypeAlias = dict[str, list[Virtual]]  # by the pattern that their names match, in natural order


def converted(source: WeightSource, config: Any, trust_remote_code: bool = False) -> WeightSource:
    """A checkpoint's tensors as transformers' model of this config has them in memory.

    Also adds or removes the base model's prefix, leaves out what transformers knowingly ignores, and of tied weights
    keeps the one that the model calls its own. Raises CheckpointError, naming tensors and operation, for what cannot be
    converted. Tensors that the model does not have keep their names.
    """
    from transformers import AutoModelForCausalLM
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}

    tensors: dict[str, Virtual] = {}
    collected: dict[str, tuple[WeightConverter, Tensors]] = {}  # by the first name that the converter makes
    for name in sorted(source.shapes, key=dot_natural_key):  # the order in which experts are stacked
        stored = Virtual.stored(name, source.shapes[name])
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, shapes)
        if target not in shapes and name in shapes:  # it has its name in memory, which a renaming matched by accident
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, shapes)
        if target not in shapes:
            if not _is_ignored(model, name) and not _is_ignored(model, target):
                tensors[name] = stored
        elif pattern is not None:
            _, found = collected.setdefault(target, (by_pattern[pattern], {}))
            found.setdefault(pattern, []).append(stored)
        elif target in tensors:
            raise CheckpointError(f"tensors {tensors[target].names[0]} and {name} are both {target}")
        else:
            tensors[target] = stored
    for target, (converter, found) in collected.items():
        tensors |= _Conversion(converter, target, shapes, config).apply(found)

    check_tied(VirtualSource(source, tensors), model.all_tied_weights_keys)
    for copy, own in model.all_tied_weights_keys.items():
        if copy in tensors:
            tensors.setdefault(own, tensors[copy])
            del tensors[copy]
    return VirtualSource(source, tensors)


def _is_ignored(model: Any, name: str) -> bool:
    """What transformers leaves out without a word: buffers of older versions, and what a model says."""
    patterns = {*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"}
    return any(re.search(pattern, name) for pattern in patterns)


@dataclass(frozen=True)
class _Conversion:
    """One use of a converter: the operations, one after the other, that make a module's tensors of stored ones."""

    converter: "WeightConverter"
    target: str  # the name of what it makes, of the first where there are several
    shapes: Mapping[str, tuple[int, ...]]  # of all tensors in memory
    config: Any

    def apply(self, found: Tensors) -> dict[str, Virtual]:
        for operation in self.converter.operations:
            kind = type(operation).__name__
            if kind not in _OPERATIONS:
                raise CheckpointError(f"{self._names(found)}: the conversion {kind} to {self.target} is not supported")
            try:
                found = _OPERATIONS[kind](self, operation, found)
            except (ValueError, KeyError) as error:
                message = f"{self._names(found)}: {kind} to {self.target} is not possible: {error}"
                raise CheckpointError(message) from error
        first, _, rest = self.target.partition(next(key for key in found if key in self.target))
        return {first + key + rest: tensor for key, (tensor,) in found.items()}

    def _names(self, found: Tensors) -> str:
        names = [name for tensors in found.values() for tensor in tensors for name in tensor.names]
        return f"tensors {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")

    def pattern_of(self, own: str, found: Tensors) -> str:
        """What a tensor that an operation makes of one goes by: the target, but in the middle of a chain as before."""
        targets = self.converter.target_patterns
        return targets[0] if len(found) == 1 and len(targets) == 1 else own


def _merge(conversion: _Conversion, operation: Any, found: Tensors) -> Tensors:
    for tensors in found.values():
        numbers = _numbers([tensor.names[0] for tensor in tensors])
        if numbers != list(range(len(tensors))):
            raise ValueError(f"they are numbered {', '.join(map(str, numbers))}")
    return {conversion.pattern_of(key, found): [stack(tensors, operation.dim)] for key, tensors in found.items()}


def _numbers(names: list[str]) -> list[int]:
    """By which names of a list of modules differ."""
    columns = list(zip(*(name.split(".") for name in names), strict=True))
    differing = [column for column in columns if len(set(column)) > 1 or (len(names) == 1 and column[0] == "0")]
    return sorted(int(part) for part in differing[-1]) if differing else [0]


def _concatenate(conversion: _Conversion, operation: Any, found: Tensors) -> Tensors:
    parts = [tensor for pattern in conversion.converter.source_patterns for tensor in found.get(pattern, ())]
    return {conversion.converter.target_patterns[0]: [concatenate(parts, operation.dim)]}


def _chunk(conversion: _Conversion, operation: Any, found: Tensors) -> Tensors:
    ((tensor,),) = found.values()
    targets = operation.get_target_patterns(conversion.converter.target_patterns, config=conversion.config)
    size = tensor.shape[operation.dim]
    step = ceil(size / len(targets))  # as torch.chunk does
    sizes = [min(step, size - start) for start in range(0, size, step)]
    return {name: [part] for name, part in zip(targets, tensor.split(operation.dim, sizes), strict=True)}


def _split(conversion: _Conversion, operation: Any, found: Tensors) -> Tensors:
    ((tensor,),) = found.values()
    targets = conversion.converter.target_patterns
    names = [conversion.target.replace(targets[0], target) for target in targets]
    parts = tensor.split(operation.dim, [conversion.shapes[name][operation.dim] for name in names])
    return {target: [part] for target, part in zip(targets, parts, strict=True)}


def _transpose(conversion: _Conversion, operation: Any, found: Tensors) -> Tensors:
    (key, (tensor,)) = next(iter(found.items()))
    if not (getattr(operation, "check_dims", False) and tensor.shape == conversion.shapes[conversion.target]):
        tensor = tensor.transpose(operation.dim0, operation.dim1)
    return {conversion.pattern_of(key, found): [tensor]}


def _interleave(conversion: _Conversion, operation: Any, found: Tensors) -> Tensors:
    ((tensor,),) = found.values()
    order = _transposed_order(tensor.shape[operation.dim], 1, operation.inverse)
    return {conversion.converter.target_patterns[0]: [tensor.take(operation.dim, order)]}


def _permute_for_rope(conversion: _Conversion, operation: Any, found: Tensors) -> Tensors:
    config = conversion.config
    if operation.subconfig_key is not None:
        config = getattr(config, operation.subconfig_key, config)
    permuted = {}
    for key, (tensor,) in found.items():
        names = operation.permute_layer_names
        if names is None or any(name in key for name in names):
            heads = getattr(config, "num_attention_heads", 1)
            tensor = tensor.take(0, _transposed_order(tensor.shape[0], heads, operation.inverse))
        permuted[conversion.pattern_of(key, found)] = [tensor]
    return permuted


def _transposed_order(size: int, groups: int, inverse: bool) -> list[int]:
    """Which row stands where, when each group's rows, as a matrix [half, 2] ([2, half] if inverse), are transposed."""
    order = torch.arange(size).view(groups, *((2, -1) if inverse else (-1, 2)))
    return order.transpose(1, 2).flatten().tolist()


_OPERATIONS: dict[str, Callable[[_Conversion, "ConversionOps", Tensors], Tensors]] = {
    "MergeModulelist": _merge,
    "Concatenate": _concatenate,
    "Chunk": _chunk,
    "Split": _split,
    "Transpose": _transpose,
    "Interleave": _interleave,
    "PermuteForRope": _permute_for_rope,
}
