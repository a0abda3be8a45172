"""From a transformers config to a `GenericSpec`: the model is built without data, and looked at while it runs."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..policies import AttentionKind, Dim, GenericSpec, TensorSpec, nearest_supported
from ..policies.generic import STYLES, Style, find_plan, style_of
from .interfaces import NotHandedOn
from .trace import Call, Refused, base_name, build, check_logits, check_windows, run

_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
_OTHER_MIXERS = re.compile(
    r"Mamba|SSM|Recurrent|Lightning|LinearAttention|DeltaNet|Conv|LSTM|GRU|Rwkv|RWKV|Retention|Indexer|Compress|Cross"
)
_KEY_VALUE = re.compile(r"(k|v|kv|key|value)(_|$)")
_CHANGING_ROPE = ("dynamic", "longrope")  # frequencies by the length of a sequence


def transformers_architecture(architectures: Sequence[str]) -> str | None:
    """The first that is a class of transformers; None if none is."""
    import transformers

    return next((name for name in architectures if hasattr(transformers, name)), None)


def read_generic(config: Any, architecture: str) -> GenericSpec:
    """The spec of any causal language model of transformers. Raises ValueError naming what it needs that is not there."""
    try:
        return _read(config, architecture)
    except Refused as error:
        raise ValueError(
            f"architecture {architecture} is not supported: {error}; {nearest_supported(architecture)}"
        ) from error


def _read(config: Any, architecture: str) -> GenericSpec:
    for kind in dict.fromkeys(getattr(config, "layer_types", None) or ()):
        if kind not in _LAYER_TYPES:
            raise Refused(f"it has layers of type {kind!r} (config.layer_types); only attention can be cached")
    if getattr(config, "quantization_config", None) is not None:
        raise Refused("its weights are quantised (config.quantization_config)")
    if find_plan(config) is None:
        raise Refused(f"transformers has no sharding table for {config.model_type!r}")
    model = build(config, architecture, torch.float32)
    if model.config.get_text_config() is not model.config:
        raise Refused("it is more than a language model (config.text_config)")
    longest = _longest(config)
    try:
        trace, hands_on = run(model, longest), True
    except NotHandedOn:
        trace, hands_on = run(model, longest, is_told=True), False
    calls = trace.calls
    prefix, attention = _layers(model, calls)
    for name, module in model.get_submodule(prefix).named_modules():
        if _OTHER_MIXERS.search(type(module).__name__) and not type(module).__name__ == "Conv1D":
            raise Refused(f"{prefix}.{name} is a {type(module).__name__}, which sees other tokens than through attention")
    check_windows(model.config, calls)
    embedding, lm_head = _name_of(model, model.get_input_embeddings()), _name_of(model, model.get_output_embeddings())
    check_logits(model, prefix, lm_head, int(config.vocab_size), int(config.hidden_size))
    heads, _ = Counter((call.num_heads, call.num_kv_heads) for call in calls).most_common(1)[0]
    styles = dict(_styles(model, config, prefix, calls, heads))
    tied = model.get_submodule(lm_head).weight is model.get_submodule(embedding).weight
    tensors = _tensors(model, styles, prefix, attention, (embedding, lm_head), heads, tied)
    num_layers = len(calls)
    layers = [[] for _ in calls]
    first, last = [], []
    for tensor in tensors:
        index = re.match(re.escape(prefix) + r"\.(\d+)\.", tensor.name)
        is_last = not tensor.name.startswith(f"{base_name(model)}.") or any(
            tensor.name.startswith(f"{name}.") for name in trace.after
        )
        (layers[int(index[1])] if index else last if is_last else first).append(tensor)
    if tied:
        last.append(next(tensor for tensor in first if tensor.name == f"{embedding}.weight"))
    split = {call.module for call in calls if _splits_heads(call.module, styles)}
    return GenericSpec(
        architecture=architecture,
        num_layers=num_layers,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        hidden_size=int(config.hidden_size),
        vocab_size=int(config.vocab_size),
        max_position_embeddings=longest,
        tied_embeddings=tied,
        dtype=str(getattr(config, "dtype", None) or "float32").removeprefix("torch."),
        ignored=(r".*rotary_emb\.inv_freq", *((re.escape(lm_head) + r"\.weight",) if tied else ())),
        config=config,
        prefix=prefix,
        attention=attention,
        embedding=embedding,
        lm_head=lm_head,
        after_layers=trace.after,
        hands_on=hands_on,
        layer_outputs=trace.layer_outputs,
        styles=styles,
        kinds=tuple(
            AttentionKind(
                head_dim=call.head_dim,
                scale=call.scale,
                value_dim=None if call.value_dim == call.head_dim else call.value_dim,
                window=call.window,
                softcap=call.softcap,
                has_sinks=call.has_sinks,
                is_replicated=call.module not in split,
            )
            for call in calls
        ),
        first=tuple(first),
        layers=tuple(tuple(layer) for layer in layers),
        last=tuple(last),
    )


def _longest(config: Any) -> int:
    """Tokens a sequence may have."""
    limits = []
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len"):
        if getattr(config, name, None) is not None:
            limits.append(int(getattr(config, name)))
            break
    else:
        raise Refused("its config has no max_position_embeddings")
    parameters = getattr(config, "rope_parameters", None) or {}
    for rope in [parameters, *(value for value in parameters.values() if isinstance(value, dict))]:
        if rope.get("rope_type") in _CHANGING_ROPE:
            limits.append(int(rope.get("original_max_position_embeddings") or limits[0]))
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        limits.append(int(config.attention_chunk_size))  # within the first chunk it is causal
    if getattr(config, "attn_temperature_tuning", False) and hasattr(config, "floor_scale"):
        limits.append(int(config.floor_scale) - 1)  # up to which it does nothing
    return min(limits)


def _layers(model: nn.Module, calls: list[Call]) -> tuple[str, str]:
    """(prefix of the decoder layers, what each calls its attention): every layer must attend, once, in order."""
    if not calls:
        raise Refused("its attention does not go through transformers' attention interface")
    matches = [re.fullmatch(r"(.+?)\.(\d+)\.(.+)", call.module) for call in calls]
    found = [(match[1], int(match[2]), match[3]) if match else (call.module, 0, "") for match, call in zip(matches, calls)]
    prefix, _, attention = found[0]
    count = len(model.get_submodule(prefix)) if isinstance(model.get_submodule(prefix), nn.ModuleList) else 0
    for (_, index, _), call in zip(found, calls, strict=True):
        if (prefix, found.index((prefix, index, attention)) if (prefix, index, attention) in found else -1) != (prefix, index):
            raise Refused(f"{call.module} is not the one attention of a decoder layer")
    if [index for _, index, _ in found] != list(range(count)):
        called = Counter(call.module for call in calls)
        module, times = called.most_common(1)[0]
        what = f"{module} attends {times} times" if times > 1 else f"only {len(calls)} of {count} layers of {prefix} attend"
        raise Refused(f"each decoder layer must attend once, but {what}")
    return prefix, attention


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, other in model.named_modules() if other is module)


def _splits_heads(attention: str, styles: Mapping[str, str]) -> bool:
    return any(
        name.startswith(f"{attention}.") and STYLES[style].splits_output and not STYLES[style].is_gathered
        for name, style in styles.items()
    )


def _styles(
    model: nn.Module, config: Any, prefix: str, calls: list[Call], heads: tuple[int, int]
) -> Iterator[tuple[str, str]]:
    """What the plan says of each module and parameter; nothing of attention whose heads are not those of most layers,
    which every rank then holds whole."""
    plan = find_plan(config) or {}
    base = prefix.rpartition(".")[0] + "."  # the plan's names are relative to the module with the layers
    other = [f"{call.module}." for call in calls if (call.num_heads, call.num_kv_heads) != heads]
    names = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    for name in names:
        style = style_of(name, plan, base)
        if style is None or any(name.startswith(start) for start in other):
            continue
        if style not in STYLES:
            raise Refused(f"its tp plan gives {name} the style {style!r}")
        if STYLES[style] != Style():
            yield name, style


def _tensors(
    model: nn.Module,
    styles: Mapping[str, str],
    prefix: str,
    attention: str,
    ends: tuple[str, str],
    heads: tuple[int, int],
    tied: bool,
) -> Iterator[TensorSpec]:
    """Every tensor of the model's state, with what is split of it."""
    embedding, lm_head = ends
    state: dict[str, Tensor] = model.state_dict()
    for name, tensor in state.items():
        if name == f"{lm_head}.weight" and tied:
            continue
        shape, module = tuple(tensor.shape), name.rpartition(".")[0]
        whole = (Dim.HIDDEN,) * len(shape)
        if module in ends:
            yield TensorSpec(name, shape, (Dim.VOCABULARY, *whole[1:]))
            continue
        inside = re.match(re.escape(prefix) + r"\.\d+\." + re.escape(attention.partition(".")[0]) + r"\.(.+)", name)
        style = STYLES[styles.get(name) or styles.get(module) or "replicate"]
        is_own = name in styles  # the parameter's own style, not that of its module
        along = _split_dim(style, len(shape), is_bias=name.endswith("bias") and not is_own)
        if inside and along is None and len(shape) == 2 and shape[0] in heads and not _is_linear(model, module):
            if _splits_heads(re.sub(r"\.[^.]+$", "", name[: inside.start(1) - 1]) , styles) or _splits_heads(name[: inside.start(1) - 1], styles):
                yield TensorSpec(name, shape, (_head_dim(inside[1]), Dim.HIDDEN))  # a norm with weights for each head
                continue
        if along is None:
            yield TensorSpec(name, shape, whole)
            continue
        dim = Dim.INTERMEDIATE
        if inside and not (style.is_gathered or style.takes_whole):
            dim = Dim.QUERY if style.splits_input else _head_dim(inside[1])
        dims = list(whole)
        dims[along] = dim
        if len(shape) == 3:
            dims[along], dims[0] = Dim.EXPERT_INTERMEDIATE, Dim.EXPERTS
        part = list(shape)
        part[along] //= style.parts
        for _ in range(style.parts):
            yield TensorSpec(name, tuple(part), tuple(dims), along)


def _split_dim(style: Style, rank: int, is_bias: bool) -> int | None:
    """Which dim of a tensor a style splits."""
    if style.splits_output:
        return 0 if rank == 1 else rank - 2
    return rank - 1 if style.splits_input and rank > 1 and not is_bias else None


def _is_linear(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name), nn.Linear)


def _head_dim(name: str) -> Dim:
    """Whose heads the output of a projection in an attention module is, by its name there."""
    parts = name.split(".")
    return Dim.KEY_VALUE if any(_KEY_VALUE.match(part) for part in parts) else Dim.QUERY
