"""What the layers of a transformers model ask of attention: seen by running them, on tensors without data."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .interfaces import TRACED, Mask, NotHandedOn, register

_NUM_TOKENS = 7
_IGNORED = {"dropout", "position_ids", "cache_position", "use_cache", "output_attentions", "position_embeddings"}
_LONGEST = 1 << 20  # keys that are looked at to find a window


@dataclass(frozen=True)
class Call:
    """One call of attention."""

    module: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    window: int | None
    softcap: float | None
    has_sinks: bool


class Refused(ValueError):
    """A model that needs what is not supported, and what that is."""


class Recorder:
    """A step that notes how it is asked."""

    def __init__(self, model: Any, longest: int) -> None:
        self.is_chunked = "chunked_attention" in (getattr(model.config, "layer_types", None) or ())
        self.names = {module: name for name, module in model.named_modules()}
        self.longest = min(longest, _LONGEST)
        self.calls: list[Call] = []
        self.received: Tensor | None = None  # see StageStep

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, asked: dict[str, Any]
    ) -> Tensor:
        name = self.names[module]
        known = {k: asked.pop(k, None) for k in ("scaling", "softcap", "s_aux", "sliding_window")}
        known["sliding_window"]  # the mask says it, too, and is what transformers itself goes by
        more = [k for k, v in asked.items() if v is not None and k not in _IGNORED and not (k == "is_causal" and v)]
        if more:
            raise Refused(f"{name} asks attention for {', '.join(more)}")
        if not isinstance(mask, Mask):
            raise Refused(f"{name} attends under a mask of its own ({type(mask).__name__})")
        (_, heads, _, head_dim), (_, kv_heads, num_keys, _) = query.shape, key.shape
        if num_keys != _NUM_TOKENS or value.shape[1:3] != key.shape[1:3]:
            raise Refused(f"{name} attends to {num_keys} keys of {_NUM_TOKENS} tokens")
        self.calls.append(
            Call(
                module=name,
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=head_dim,
                value_dim=value.shape[-1],
                scale=float(head_dim**-0.5 if known["scaling"] is None else known["scaling"]),
                window=self._window(name, mask),
                softcap=known["softcap"],
                has_sinks=known["s_aux"] is not None,
            )
        )
        return query.new_empty(1, _NUM_TOKENS, heads, value.shape[-1])

    def _window(self, name: str, mask: Mask) -> int | None:
        """How many keys a query sees, its own the last; None: all before it."""
        windows = []
        for position in (self.longest - 1, self.longest // 2, self.longest // 3):
            keys = torch.arange(self.longest)
            zero = torch.tensor(0)
            try:
                seen = mask.visible(zero, zero, torch.tensor(position), keys).broadcast_to(keys.shape)
            except RuntimeError:  # chunks are counted from the first token that is not padding, which has no data here
                if not self.is_chunked:
                    raise
                return None
            first = int(seen.int().argmax())
            if not torch.equal(seen, (keys >= first) & (keys <= position)):
                raise Refused(f"{name} attends neither causally nor in a sliding window")
            windows.append(position + 1 - first if first else None)
        if len({window for window in windows if window is not None}) > 1:
            raise Refused(f"{name} attends in chunks")
        return windows[0]


def check_windows(config: Any, calls: list[Call]) -> None:
    """Proves that the masks of layers hide what transformers' own cache lets go of."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        return
    for call, layer in zip(calls, DynamicCache(config=config).layers, strict=False):
        kept = getattr(layer, "sliding_window", None)
        if isinstance(layer, DynamicLayer) and kept != call.window:
            raise Refused(f"{call.module} attends to {call.window or 'all'} keys, and its cache holds {kept or 'all'}")


def build(config: Any, architecture: str, dtype: torch.dtype) -> nn.Module:
    """The model of a config, on the meta device; it keeps a copy of the config."""
    import transformers

    register()
    config = deepcopy(config)
    config._attn_implementation = config._experts_implementation = TRACED
    config.output_router_logits = False
    config.use_cache = False
    with torch.device("meta"), naming("building it"):
        model: nn.Module = getattr(transformers, architecture)._from_config(config, dtype=dtype)
    return model.eval()


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Turns whatever transformers raises into a refusal."""
    try:
        yield
    except (Refused, NotHandedOn):
        raise
    except Exception as error:
        frames = []
        trace = error.__traceback__
        while trace is not None:
            frames.append(trace.tb_frame)
            trace = trace.tb_next
        inside = [frame.f_locals.get("self") for frame in frames]
        modules = [type(module).__name__ for module in inside if isinstance(module, nn.Module)]
        where = f" in {modules[-1]}" if modules else ""
        raise Refused(f"{what} failed{where}: {' '.join(str(error).split())[:200]}") from error


@dataclass(frozen=True)
class Trace:
    calls: list[Call]
    after: tuple[str, ...]  # modules that ran once all layers had
    layer_outputs: int | None  # of a layer, in a tuple; None: hidden states alone


def base_name(model: nn.Module) -> str:
    """What the model calls the part of it that gives hidden states."""
    name = model.base_model_prefix
    if isinstance(getattr(model, name, None), nn.Module):
        return str(name)
    return next(name for name, child in model.named_children() if hasattr(child, "base_model_prefix"))


def base_of(model: nn.Module) -> nn.Module:
    return model.get_submodule(base_name(model))


def run(
    model: nn.Module, longest: int, received: tuple[int, int] | None = None, is_told: bool = False
) -> Trace:
    """Runs a model that `build` made, all of it but the LM head.

    is_told: attention knows the step beforehand, else it must be handed on to it; received: sizes of hidden states and of embeddings, for a part of a model that has no embedding.
    """
    recorder = Recorder(model, longest)
    base = base_of(model)
    order: list[tuple[str, Any]] = []  # modules as they end, with what they give
    hooks = [
        module.register_forward_hook(lambda module, args, out: order.append((recorder.names[module], out)))
        for module in base.modules()
    ]
    ids = torch.zeros(1, _NUM_TOKENS, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids}
    if received is not None:
        dtype = next(model.parameters()).dtype
        hidden, embeds = (torch.empty(1, _NUM_TOKENS, size, dtype=dtype, device="meta") for size in received)
        inputs, recorder.received = {"inputs_embeds": embeds}, hidden
    for module in model.modules() if is_told else ():
        module.step = recorder  # type: ignore[assignment]
    try:
        with torch.no_grad(), naming("a trial run on tensors without data"):
            base(
                **inputs,
                position_ids=ids,
                attention_mask=torch.ones(ids.shape, dtype=torch.long),  # with data: some look whether any is padding
                use_cache=False,
                step=recorder,
            )
    finally:
        for hook in hooks:
            hook.remove()
        for module in model.modules():
            vars(module).pop("step", None)
    if not recorder.calls:
        return Trace([], (), None)
    layer = re.match(r".+?\.\d+(?=\.|$)", recorder.calls[-1].module)
    last = max((i for i, (name, _) in enumerate(order) if layer and name == layer[0]), default=len(order) - 1)
    body = order[last][0].rpartition(".")[0].rpartition(".")[0]
    after = [name for name, _ in order[last + 1 :] if name.rpartition(".")[0] == body]
    out = order[last][1]
    return Trace(recorder.calls, tuple(dict.fromkeys(after)), len(out) if isinstance(out, tuple) else None)


def check_logits(model: nn.Module, prefix: str, lm_head: str, vocab_size: int, hidden_size: int) -> None:
    """Proves that what the model does to logits, it does to each by itself: a rank has those of its vocabulary only."""
    logits = torch.linspace(-40, 40, vocab_size).view(1, 1, -1)
    cut = vocab_size // 3
    head, part = (with_head(model, prefix, {lm_head: Given(given)}) for given in (logits, logits[..., cut:]))
    hidden = torch.empty(1, 1, hidden_size, device="meta")
    with torch.no_grad(), naming("a trial of its logits"):
        whole, some = (run_head(model, hidden) for model in (head, part))
        if whole.shape != logits.shape or not torch.equal(whole[..., cut:], some):
            raise Refused(f"{type(model).__name__} computes on all logits of a token together")


class Body(nn.Module):
    """In the place of what makes hidden states: gives back what it is given. So does what it has at `path`."""

    def __init__(self, path: str) -> None:
        super().__init__()
        first, _, rest = path.partition(".")
        if first:
            setattr(self, first, Body(rest))

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> Any:
        return _output_class()(last_hidden_state=inputs_embeds)


@cache
def _output_class() -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class Output(BaseModelOutputWithPast):
        """What a model's layers give, all that is not there being None."""

        def __getattr__(self, name: str) -> None:
            if name.startswith("_"):
                raise AttributeError(name)

    return Output


class Given(nn.Module):
    """Gives what it was made with."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        return self.output


def run_head(model: nn.Module, hidden: Tensor) -> Tensor:
    """hidden: [1, num_rows, hidden] -> logits, by the model's own forward around `Body`."""
    return model(inputs_embeds=hidden, use_cache=False).logits


def with_head(model: nn.Module, prefix: str, modules: dict[str, nn.Module]) -> nn.Module:
    """The model without what makes hidden states, for `run_head`. prefix: of the decoder layers."""
    base = base_name(model)
    owner = prefix.rpartition(".")[0]
    return with_modules(model, {base: Body(owner.removeprefix(base).removeprefix("."))} | modules)


def with_modules(model: nn.Module, modules: dict[str, nn.Module]) -> nn.Module:
    """The model with others in the place of some modules; itself unchanged, all else shared."""
    model = copy(model)
    model._modules = dict(model._modules)
    for name, module in modules.items():
        first, _, rest = name.partition(".")
        model._modules[first] = with_modules(model._modules[first], {rest: module}) if rest else module
    return model
