"""What the layers of a transformers model ask of attention: seen by running them, on tensors without data."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .interfaces import TRACED, Ended, Mask, NotHandedOn, register

_NUM_TOKENS = 7
_KNOWN = ("scaling", "softcap", "s_aux", "sliding_window")  # a window is read from the mask, as transformers does it
_IGNORED = {"dropout", "position_ids", "cache_position", "use_cache", "output_attentions", "position_embeddings"}
_LONGEST = 1 << 20  # keys that are looked at to find a window


class Refused(ValueError):
    """A model that needs what is not supported, and what that is."""


@dataclass(frozen=True)
class Call:
    """One call of attention."""

    module: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int | None  # None: head_dim
    scale: float
    window: int | None
    softcap: float | None
    has_sinks: bool


@dataclass(frozen=True)
class Trace:
    calls: list[Call]
    after: tuple[str, ...]  # modules beside the layers that ran once all of them had, and not before: a norm, say
    layer_outputs: int | None  # of a layer, in a tuple; None: hidden states alone
    is_chain: bool  # each layer takes what the one before gave, as it is


class Recorder:
    """A step that notes how it is asked."""

    def __init__(self, model: Any, longest: int, received: Tensor | None) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.longest, self.received = min(longest, _LONGEST), received
        self.is_chunked = is_chunked(model.config)
        self.calls: list[Call] = []
        self._windows: dict[Mask, int | None] = {}

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, asked: Mapping[str, Any]
    ) -> Tensor:
        name = self.names[module]
        scale, softcap, sinks, _ = (asked.get(field) for field in _KNOWN)
        other = {field for field, value in asked.items() if value is not None} - {*_KNOWN, *_IGNORED}
        if asked.get("is_causal"):
            other.discard("is_causal")
        if other:
            raise Refused(f"{name} asks attention for {', '.join(sorted(other))}")
        if not isinstance(mask, Mask):
            raise Refused(f"{name} attends under a mask of its own ({type(mask).__name__})")
        (_, heads, _, head_dim), (_, kv_heads, num_keys, _), value_dim = query.shape, key.shape, value.shape[-1]
        if num_keys != _NUM_TOKENS or value.shape[1:3] != key.shape[1:3]:
            raise Refused(f"{name} attends to {num_keys} keys of {_NUM_TOKENS} tokens")
        if sinks is not None and sinks.shape != (heads,):
            raise Refused(f"{name} has {'×'.join(map(str, sinks.shape))} sinks for {heads} heads")
        if mask not in self._windows:
            self._windows[mask] = self._window(name, mask)
        self.calls.append(
            Call(
                module=name,
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=head_dim,
                value_dim=None if value_dim == head_dim else value_dim,
                scale=float(head_dim**-0.5 if scale is None else scale),
                window=self._windows[mask],
                softcap=softcap,
                has_sinks=sinks is not None,
            )
        )
        return query.new_empty(1, _NUM_TOKENS, heads, value_dim)

    def _window(self, name: str, mask: Mask) -> int | None:
        """How many keys a query sees, its own the last; None: all before it. Of the last position, where it is most."""
        windows, keys, zero = set(), torch.arange(self.longest), torch.tensor(0)
        for position in (self.longest // 3, self.longest // 2, self.longest - 1):
            try:
                seen = mask.visible(zero, zero, torch.tensor(position), keys).broadcast_to(keys.shape)
            except RuntimeError:  # chunks are counted from the first token that is not padding, which has no data here
                if not self.is_chunked:
                    raise
                return None
            first = int(seen.int().argmax())
            if not torch.equal(seen, (keys >= first) & (keys <= position)):
                raise Refused(f"{name} attends neither causally nor in a sliding window")
            windows.add(position + 1 - first if first else None)
        if len(windows - {None}) > 1:
            raise Refused(f"{name} attends in chunks")
        return max(windows, key=lambda window: window or 0)


def is_chunked(config: Any) -> bool:
    return "chunked_attention" in (getattr(config, "layer_types", None) or ())


def build(config: Any, model_class: Any, dtype: torch.dtype) -> Any:
    """The model of a config, on the meta device, ready to be traced; it keeps a copy of the config."""
    register()
    config = deepcopy(config)
    config._attn_implementation = config._experts_implementation = TRACED
    config.output_router_logits = config.use_cache = False
    with torch.device("meta"), naming("building it"):
        model = model_class._from_config(config, dtype=dtype)
    return model.eval()


def is_kept_wide(model: Any, name: str, dtype: torch.dtype) -> bool:
    """Whether the family keeps a tensor in float32 where others are of `dtype`."""
    always = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    in_half = getattr(model, "_keep_in_fp32_modules", None) or ()
    patterns = [] if dtype is torch.float32 else [*always, *(in_half if dtype is torch.float16 else ())]
    return any(re.search(rf"(^|\.){pattern}($|\.)", name) for pattern in patterns)


def base_name(model: Any) -> str:
    """What the model calls the part of it that gives hidden states."""
    name = model.base_model_prefix
    if isinstance(getattr(model, name, None), nn.Module):
        return str(name)
    for name, child in model.named_children():
        if hasattr(child, "base_model_prefix"):
            return name
    raise Refused("it has no LM head over a model that gives hidden states")


def run(model: Any, longest: int, received: tuple[int, int] | None = None, is_told: bool = False) -> Trace:
    """Runs a model that `build` made, all of it but the LM head.

    longest: sequence; received: sizes of hidden states and of embeddings, for a part of a model without an embedding;
    is_told: attention is told of the step beforehand, since layers do not hand it on.
    """
    ids = torch.zeros(1, _NUM_TOKENS, dtype=torch.long, device="meta")
    inputs, hidden = {"input_ids": ids}, None
    if received is not None:
        hidden, embeddings = (torch.empty(1, _NUM_TOKENS, size, dtype=model.dtype, device="meta") for size in received)
        inputs = {"inputs_embeds": embeddings}
    base, recorder = model.get_submodule(base_name(model)), Recorder(model, longest, hidden)
    began: dict[str, Any] = {}  # modules, and what they take
    ended: list[tuple[str, Any]] = []  # modules in the order in which they end, and what they give
    names = recorder.names

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        began[names[module]] = args[0] if args else kwargs.get("hidden_states")

    with _hooked(base, begin, lambda module, args, out: ended.append((names[module], out))), suppress(Ended):
        for module in model.modules() if is_told else ():
            vars(module)["step"] = recorder
        with torch.no_grad(), _fixed_frequencies(model), naming("a trial run on tensors without data"):
            base(
                **inputs,
                position_ids=ids,
                attention_mask=torch.ones(ids.shape, dtype=torch.long),  # with data: some look whether any is padding
                use_cache=False,
                step=recorder,
            )
        for module in model.modules() if is_told else ():
            del vars(module)["step"]
    match = re.match(r"(.+?)\.\d+(?=\.)", recorder.calls[-1].module) if recorder.calls else None
    if match is None:
        return Trace(recorder.calls, (), None, False)
    layers = [i for i, (name, _) in enumerate(ended) if re.fullmatch(re.escape(match[1]) + r"\.\d+", name)]
    outputs = [ended[i] for i in layers]
    is_chain = all(began[after] is _first(out) for (_, out), (after, _) in pairwise(outputs))
    beside = [name if parent(name) == parent(match[1]) else "" for name, _ in ended]
    after = dict.fromkeys(name for name in beside[layers[-1] + 1 :] if name and name not in beside[: layers[0]])
    out = outputs[-1][1]
    return Trace(recorder.calls, tuple(after), len(out) if isinstance(out, tuple) else None, is_chain)


def _first(outputs: Any) -> Any:
    return outputs[0] if isinstance(outputs, tuple) else outputs


def parent(name: str) -> str:
    return name.rpartition(".")[0]


def fix_frequencies(model: nn.Module) -> dict[nn.Module, Any]:
    """Rotary frequencies that depend on a sequence's length no longer look at it. Returns what kinds they were."""
    kinds = {module: module.rope_type for module in model.modules() if hasattr(module, "rope_type")}
    for module, kind in kinds.items():
        vars(module)["rope_type"] = dict.fromkeys(kind, "default") if isinstance(kind, dict) else "default"
    return kinds


@contextmanager
def _fixed_frequencies(model: nn.Module) -> Iterator[None]:
    kinds = fix_frequencies(model)
    for module in kinds:
        vars(module)["forward"] = partial(_run_within_length, module.forward)
    try:
        yield
    finally:
        for module, kind in kinds.items():
            vars(module)["rope_type"] = kind
            del vars(module)["forward"]


class _WithinLength(TorchFunctionMode):
    """Whether positions without data are beyond some length: they are not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return False if func is Tensor.__bool__ and args[0].is_meta else func(*args, **(kwargs or {}))


def _run_within_length(forward: Any, *args: Any, **kwargs: Any) -> Any:
    with _WithinLength():
        return forward(*args, **kwargs)


@contextmanager
def _hooked(model: nn.Module, begin: Any, end: Any) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(begin, with_kwargs=True) for module in model.modules()]
    handles += [module.register_forward_hook(end) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Turns whatever transformers raises into a refusal that says in which module."""
    try:
        yield
    except (Refused, NotHandedOn, Ended):
        raise
    except Exception as error:
        where, trace = "", error.__traceback__
        while trace is not None:
            inside = trace.tb_frame.f_locals.get("self")
            where = f" in {type(inside).__name__}" if isinstance(inside, nn.Module) else where
            trace = trace.tb_next
        raise Refused(f"{what} failed{where}: {' '.join(str(error).split())[:200]}") from error
