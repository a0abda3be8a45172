"""From a transformers config to a `GenericSpec`: the model is built without data, and looked at while it runs."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...policies import AttentionKind, Dim, GenericSpec, TensorSpec, has_policy, nearest_supported
from ...policies.generic import STYLES, Style, find_plan, style_of
from .divided import why_undivided
from .head import check_logits
from .interfaces import NotHandedOn
from .stage import cut
from .trace import Call, Refused, Trace, base_name, build, is_chunked, parent, run

_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
_OTHER_MIXERS = re.compile(
    r"Mamba|SSM|Recurrent|Lightning|LinearAttention|DeltaNet|Conv(?!1D)|LSTM|GRU|Rwkv|Retention|Indexer|Compress|Cross"
)
_KEY_VALUE = re.compile(r"(k|v|kv|key|value)(_|$)|W[kv]$")
_LENGTHS = ("max_position_embeddings", "n_positions")


def transformers_class(architectures: Sequence[str]) -> Any:
    """The first that is a class of transformers; None if none is."""
    import transformers

    return next((getattr(transformers, name) for name in architectures if hasattr(transformers, name)), None)


def read_generic(config: Any, model_class: Any) -> GenericSpec:
    """The spec of a causal language model of transformers. Raises ValueError naming what it needs that is not there."""
    architecture = model_class.__name__
    try:
        reader = _Reader(config, model_class)
        spec = reader.spec()
        return replace(spec, why_one_stage=_why_one_stage(spec, reader.trace.is_chain))
    except Refused as error:
        if has_policy([architecture]):
            raise ValueError(f"policy='generic': {architecture}: {error}; it has a policy of its own") from error
        raise ValueError(
            f"architecture {architecture} is not supported: {error}; {nearest_supported(architecture)}"
        ) from error


def _why_one_stage(spec: GenericSpec, is_chain: bool) -> str | None:
    """Why the model cannot be divided into stages, which a trial of its last layer alone shows; None if it can."""
    if not is_chain:
        return "something becomes of hidden states between its layers"
    model = build(spec.config, spec.model_class, torch.float32)
    cut(model, spec, (spec.num_layers - 1, spec.num_layers))
    try:
        run(model, 1, (spec.hidden_size, spec.embedding_size), is_told=not spec.hands_on)
    except Refused as error:
        return f"its layers pass on more than hidden states: {error}"
    return None


class _Reader:
    """A model without data, and how its layers attend."""

    def __init__(self, config: Any, model_class: Any) -> None:
        if not model_class.can_generate():
            raise Refused("it cannot generate")
        _check_config(config)
        self.config, self.model_class = config, model_class
        self.longest = _longest(config)
        self.model = build(config, model_class, torch.float32)
        self.trace, self.hands_on = self._run()
        self.calls = self.trace.calls
        self.prefix, self.attention = self._layers()
        self.embedding = self._name_of(self.model.get_input_embeddings())
        self.lm_head = self._name_of(self.model.get_output_embeddings())
        self.num_heads = Counter((call.num_heads, call.num_kv_heads) for call in self.calls).most_common(1)[0][0]
        self.styles = dict(self._styles())
        # Attention modules whose heads are divided over tp; all ranks have the others whole.
        self.split = {call.module for call in self.calls if self._splits_heads(call)}

    def _run(self) -> tuple[Trace, bool]:
        try:
            return run(self.model, self.longest), True
        except NotHandedOn:
            return run(self.model, self.longest, is_told=True), False

    def spec(self) -> GenericSpec:
        self._check()
        model, config = self.model, self.config
        tied = self._tied()
        layers: list[list[TensorSpec]] = [[] for _ in self.calls]
        first: list[TensorSpec] = []
        last: list[TensorSpec] = []
        for tensor in self._tensors(set(tied)):
            index = re.match(re.escape(self.prefix) + r"\.(\d+)\.", tensor.name)
            is_after = any(tensor.name.startswith(f"{name}.") for name in self.trace.after)
            if index is not None:
                layers[int(index[1])].append(tensor)
            elif is_after or not tensor.name.startswith(f"{base_name(model)}."):
                last.append(tensor)
            else:
                first.append(tensor)
        table = next(tensor for tensor in first if tensor.name == f"{self.embedding}.weight")
        return GenericSpec(
            architecture=self.model_class.__name__,
            num_layers=len(layers),
            num_heads=self.num_heads[0],
            num_kv_heads=self.num_heads[1],
            hidden_size=int(config.hidden_size),
            vocab_size=int(config.vocab_size),
            max_position_embeddings=self.longest,
            tied_embeddings=f"{self.lm_head}.weight" in tied,
            dtype=str(getattr(config, "dtype", None) or "float32").removeprefix("torch."),
            ignored=(r".*rotary_emb\.inv_freq", *map(re.escape, tied)),
            config=config,
            model_class=self.model_class,
            prefix=self.prefix,
            attention=self.attention,
            embedding=self.embedding,
            embedding_size=table.shape[1],
            lm_head=self.lm_head,
            tied=tied,
            after_layers=self.trace.after,
            hands_on=self.hands_on,
            layer_outputs=self.trace.layer_outputs,
            styles=self.styles,
            kinds=tuple(self._kind(call) for call in self.calls),
            why_undivided=why_undivided(model, self.prefix, self.styles, {self._region(call) for call in self.calls}),
            first=tuple(first),
            layers=tuple(tuple(layer) for layer in layers),
            last=(*last, table) if f"{self.lm_head}.weight" in tied else tuple(last),
        )

    def _kind(self, call: Call) -> AttentionKind:
        return AttentionKind(
            head_dim=call.head_dim,
            scale=call.scale,
            value_dim=call.value_dim,
            window=call.window,
            softcap=call.softcap,
            has_sinks=call.has_sinks,
            is_replicated=call.module not in self.split,
        )

    # ---- what is there

    def _layers(self) -> tuple[str, str]:
        """(prefix of the decoder layers, what each calls its attention): every layer must attend, once, in order."""
        if not self.calls:
            raise Refused("its attention does not go through transformers' attention interface")
        match = re.fullmatch(r"(.+?)\.0\.(.+)", self.calls[0].module)
        if match is None:
            raise Refused(f"{self.calls[0].module}, which attends first, is in no list of layers")
        prefix, attention = match[1], match[2]
        expected = [f"{prefix}.{index}.{attention}" for index in range(len(self.model.get_submodule(prefix)))]
        found = [call.module for call in self.calls]
        if found != expected:
            module, times = Counter(found).most_common(1)[0]
            silent = [name for name in expected if name not in found]
            what = f"{module} attends {times} times" if times > 1 else f"{(silent or found)[0]} does otherwise"
            raise Refused(f"each of its layers must attend once, one after the other, but {what}")
        return prefix, attention

    def _name_of(self, module: nn.Module | None) -> str:
        return next(name for name, other in self.model.named_modules() if other is module)

    def _check(self) -> None:
        """Refuses what `calls` show, and modules that are known to look at other tokens."""
        for name, module in self.model.get_submodule(self.prefix).named_modules():
            if _OTHER_MIXERS.search(type(module).__name__):
                raise Refused(f"{self.prefix}.{name} is a {type(module).__name__}, which is not supported")
        check_logits(self.model, self.prefix, self.lm_head)
        self._check_windows()

    def _check_windows(self) -> None:
        """Proves that masks hide what transformers' own cache lets go of."""
        from transformers.cache_utils import DynamicCache, DynamicLayer

        for call, layer in zip(self.calls, DynamicCache(config=self.model.config).layers, strict=False):
            kept = getattr(layer, "sliding_window", None)
            if isinstance(layer, DynamicLayer) and min(kept or self.longest, self.longest) != (
                call.window or self.longest
            ):
                raise Refused(f"{call.module} attends to {call.window or 'all'} keys, but {kept or 'all'} are cached")

    # ---- how it is divided

    def _styles(self) -> Iterator[tuple[str, str]]:
        """What the table says of each module and parameter.

        Nothing of the embedding and the LM head, which are divided by vocabulary, nor of attention whose heads are not
        those of most layers, which every rank then holds whole.
        """
        plan, base = find_plan(self.config) or {}, parent(self.prefix) + "."
        odd = tuple(
            f"{self._region(call)}." for call in self.calls if (call.num_heads, call.num_kv_heads) != self.num_heads
        )
        names = [name for name, _ in self.model.named_modules()] + [name for name, _ in self.model.named_parameters()]
        for name in names:
            style = style_of(name, plan, base)
            if style is None or name in (self.embedding, self.lm_head) or name.startswith(odd):
                continue
            if style not in STYLES:
                raise Refused(f"its table gives {name} the style {style!r}")
            if STYLES[style] != Style():
                yield name, style

    def _region(self, call: Call) -> str:
        """The part of its layer that a call of attention stands in, output projection included."""
        index = self.calls.index(call)
        return f"{self.prefix}.{index}.{self.attention.partition('.')[0]}"

    def _splits_heads(self, call: Call) -> bool:
        start = f"{self._region(call)}."
        styles = (STYLES[style] for name, style in self.styles.items() if name.startswith(start))
        return any(style.splits_output and not style.is_gathered for style in styles)

    def _tied(self) -> dict[str, str]:
        """See `GenericSpec.tied`; other modules must not share tensors."""
        names: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        tied = {}
        for first, *others in (
            sorted(shared, key=lambda name: parent(name) == self.lm_head) for shared in names.values()
        ):
            for other in others:
                if parent(other) != self.lm_head or (
                    other == f"{self.lm_head}.weight" and first != f"{self.embedding}.weight"
                ):
                    raise Refused(f"{first} and {other} are one tensor")
                tied[other] = first
        return tied

    def _tensors(self, tied: set[str]) -> Iterator[TensorSpec]:
        """Every tensor of the model's state, with what is divided of it."""
        regions = {self._region(call): call.module in self.split for call in self.calls}
        inside = re.compile(f"({'|'.join(re.escape(region) for region in regions)})\\.(.+)")
        for name, tensor in self.model.state_dict().items():
            module, shape = parent(name), tuple(tensor.shape)
            if name in tied:
                continue
            if module in (self.embedding, self.lm_head):
                yield TensorSpec(name, shape, (Dim.VOCABULARY, *[Dim.HIDDEN] * (len(shape) - 1)))
                continue
            match = inside.match(name)
            own, of_module = self.styles.get(name), self.styles.get(module)
            style = STYLES[own or of_module or "replicate"]
            along = _divided(style, len(shape), is_bias=own is None and name.endswith("bias"))
            dim = Dim.INTERMEDIATE
            if match and not (style.is_gathered or style.takes_whole):
                dim = Dim.KEY_VALUE if any(map(_KEY_VALUE.match, match[2].split("."))) else Dim.QUERY
            is_norm_of_heads = len(shape) == 2 and not isinstance(self.model.get_submodule(module), nn.Linear)
            if match and along is None and regions[match[1]] and is_norm_of_heads and shape[0] in self.num_heads:
                along = 0
            yield from _divide(name, shape, dim, along, style.parts)


def _divided(style: Style, rank: int, is_bias: bool) -> int | None:
    """Which dim of a tensor a style divides."""
    if style.splits_output:
        return max(0, rank - 2)
    return rank - 1 if style.splits_input and rank > 1 and not is_bias else None


def _divide(name: str, shape: tuple[int, ...], dim: Dim, along: int | None, parts: int) -> Iterator[TensorSpec]:
    """A tensor, divided along one of its dims; with three, it is of stacked experts."""
    dims, part = [Dim.HIDDEN] * len(shape), list(shape)
    if along is None:
        yield TensorSpec(name, shape, tuple(dims))
        return
    dims[along] = dim
    if len(shape) == 3:
        dims[0], dims[along] = Dim.EXPERTS, Dim.EXPERT_INTERMEDIATE
    part[along] //= parts
    for _ in range(parts):
        yield TensorSpec(name, tuple(part), tuple(dims), along)


def _check_config(config: Any) -> None:
    """Refuses what a config says already."""
    if config.get_text_config() is not config:
        raise Refused("it is more than a language model (its config has a text_config)")
    for kind in dict.fromkeys(getattr(config, "layer_types", None) or ()):
        if kind not in _LAYER_TYPES:
            raise Refused(f"it has layers of type {kind!r} (config.layer_types); only attention can be cached")
    if getattr(config, "quantization_config", None) is not None:
        raise Refused("its weights are quantised (config.quantization_config)")
    if find_plan(config) is None:
        raise Refused(f"there is no table to divide {config.model_type!r} by")


def _longest(config: Any) -> int:
    """Tokens that a sequence may have."""
    lengths = [int(getattr(config, name)) for name in _LENGTHS if getattr(config, name, None) is not None]
    if not lengths:
        raise Refused(f"its config has no {' or '.join(_LENGTHS)}")
    parameters = getattr(config, "rope_parameters", None) or {}
    for rope in [parameters, *(value for value in parameters.values() if isinstance(value, dict))]:
        if rope.get("rope_type") in ("dynamic", "longrope"):  # beyond, cached keys would have other frequencies
            lengths.append(int(rope.get("original_max_position_embeddings") or lengths[0]))
    if is_chunked(config):
        lengths.append(int(config.attention_chunk_size))  # a first chunk is causal
    if getattr(config, "attn_temperature_tuning", False) and hasattr(config, "floor_scale"):
        lengths.append(int(config.floor_scale) - 1)  # up to which nothing is tuned
    return min(lengths)
