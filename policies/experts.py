"""The words for a mixture of experts: a router, experts of which each token uses a few, an MLP that all tokens use.

Names are relative to the decoder layer. The experts' weights are stacked, as in transformers' module in memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from .base import Dim

Tensors = Iterator[tuple[str, tuple[int, ...], tuple[Dim, ...]]]
"""Of a checkpoint: (name, shape, dims)."""


@dataclass(frozen=True)
class RouterSpec:
    """A linear layer to one logit for each expert, and how logits become experts and weights.

    The defaults are Mixtral's but for `normalise`. The fields after `correction` are those of the op's own `Routing`,
    which explains them.
    """

    top_k: int
    name: str = "mlp.gate"
    bias: bool = False
    float32: bool = False  # the product is computed in float32, whatever the model's dtype (DeepSeek)
    correction: str | None = None  # tensor [num_experts]: added to the scores for the choice alone
    scoring: Literal["softmax", "sigmoid", "softmax of chosen"] = "softmax"
    normalise: bool = False
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "sum of two"] = "max"


@dataclass(frozen=True)
class SharedExpertSpec:
    """A gated MLP beside the routed experts: ``down(activation(gate(x)) * up(x))``."""

    intermediate_size: int
    name: str = "mlp.shared_experts"  # prefix of gate_proj, up_proj and down_proj
    bias: bool = False  # of all three
    gate: str | None = None  # linear layer to one logit, whose sigmoid multiplies the output (Qwen2-MoE)


@dataclass(frozen=True)
class MoESpec:
    """A mixture of experts. Each expert is ``down(activation(gate_up(x)))``."""

    num_experts: int
    hidden_size: int
    intermediate_size: int  # of one expert
    router: RouterSpec
    activation: str = "silu"  # a kind of gated activation
    name: str = "mlp.experts"  # prefix of gate_up_proj and down_proj
    bias: bool = False  # of both: gate_up_proj_bias, down_proj_bias
    transposed: bool = False  # [experts, in, out], not [experts, out, in]
    shared: SharedExpertSpec | None = None
    expert_parallel: bool = False  # tp ranks hold whole experts, not a part of each

    @property
    def interleaved(self) -> bool:
        """Whether gate and up come in turns, not one after the other: the activation takes them as they come."""
        return self.activation == "swiglu_oai"

    def tensors(self, prefix: str) -> Tensors:
        """Every tensor of one layer's mixture. Gate and up are each split: INTERMEDIATE stands for both."""
        e, i, h = self.num_experts, self.intermediate_size, self.hidden_size
        across = Dim.EXPERTS if self.expert_parallel else Dim.HIDDEN
        inside = Dim.HIDDEN if self.expert_parallel else Dim.INTERMEDIATE
        whole = Dim.HIDDEN

        def stacked(size_out: int, size_in: int, out: Dim, into: Dim) -> tuple[tuple[int, ...], tuple[Dim, ...]]:
            shape, dims = (size_out, size_in), (out, into)
            return (e, *(shape[::-1] if self.transposed else shape)), (
                across,
                *(dims[::-1] if self.transposed else dims),
            )

        yield f"{prefix}{self.name}.gate_up_proj", *stacked(2 * i, h, inside, whole)
        yield f"{prefix}{self.name}.down_proj", *stacked(h, i, whole, inside)
        if self.bias:
            yield f"{prefix}{self.name}.gate_up_proj_bias", (e, 2 * i), (across, inside)
            yield f"{prefix}{self.name}.down_proj_bias", (e, h), (across, whole)
        yield f"{prefix}{self.router.name}.weight", (e, h), (whole, whole)
        if self.router.bias:
            yield f"{prefix}{self.router.name}.bias", (e,), (whole,)
        if self.router.correction is not None:
            yield f"{prefix}{self.router.correction}", (e,), (whole,)
        if self.shared is not None:
            yield from self._shared_tensors(self.shared, f"{prefix}{self.shared.name}.", prefix)

    def _shared_tensors(self, shared: SharedExpertSpec, inner: str, prefix: str) -> Tensors:
        i, h = shared.intermediate_size, self.hidden_size
        for part in ("gate_proj", "up_proj"):
            yield f"{inner}{part}.weight", (i, h), (Dim.INTERMEDIATE, Dim.HIDDEN)
            if shared.bias:
                yield f"{inner}{part}.bias", (i,), (Dim.INTERMEDIATE,)
        yield f"{inner}down_proj.weight", (h, i), (Dim.HIDDEN, Dim.INTERMEDIATE)
        if shared.bias:
            yield f"{inner}down_proj.bias", (h,), (Dim.HIDDEN,)
        if shared.gate is not None:
            yield f"{prefix}{shared.gate}.weight", (1, h), (Dim.HIDDEN, Dim.HIDDEN)


def check_experts(spec: MoESpec | None, architecture: str, tp_size: int, expert_parallel: bool) -> None:
    """Raises ValueError where experts cannot be divided as asked, naming the field and what would work."""
    if expert_parallel and spec is None:
        raise ValueError(f"expert_parallel=True has no effect: {architecture} has no experts; leave it False")
    if spec is None:
        return
    router = spec.router
    if router.num_groups < 1 or spec.num_experts % router.num_groups:
        raise ValueError(f"num_experts={spec.num_experts} is not a multiple of the router's {router.num_groups} groups")
    candidates = spec.num_experts // router.num_groups * router.top_groups
    if not 1 <= router.top_k <= candidates:
        raise ValueError(
            f"top_k={router.top_k} experts cannot be chosen among {candidates} ({router.top_groups} of "
            f"{router.num_groups} groups of {spec.num_experts // router.num_groups})"
        )
    if not expert_parallel and tp_size > spec.intermediate_size:
        raise ValueError(
            f"tp_size={tp_size} is more than the experts' intermediate size {spec.intermediate_size}; use tp_size <= "
            f"{spec.intermediate_size} or expert_parallel=True"
        )
    if spec.shared is not None and tp_size > spec.shared.intermediate_size:
        size = spec.shared.intermediate_size
        raise ValueError(f"tp_size={tp_size} is more than the shared experts' size {size}; use tp_size <= {size}")
