"""`MixtureOfExperts` against transformers' own blocks, tiny and random, in float32.

On one rank, and as the sum over the ranks of a tp group that there is not.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from meshlm.kernels import select_ops
from meshlm.kernels.ops import EAGER, Ops
from meshlm.policies import MoESpec, RouterSpec, SharedExpertSpec, find_policy
from meshlm.shardformer.checkpoint import read_rotary
from meshlm.shardformer.linear import Context, Slices
from meshlm.shardformer.moe import MixtureOfExperts
from meshlm.shardformer.shard import Shards
from meshlm.shardformer.sources import ModuleSource
from meshlm.shardformer.weights import load_weights
from tiny import llama_config

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
HIDDEN = 20
LAYER = {"hidden_size": HIDDEN, "num_attention_heads": 2, "_experts_implementation": "eager"}


@dataclass
class Case:
    block: Callable[[], nn.Module]
    spec: MoESpec


def case(block: type[nn.Module], config: type, sizes: dict[str, Any], spec: MoESpec) -> Case:
    return Case(lambda: block(config(**LAYER, **sizes)), spec)


def moe(experts: int, intermediate: int, router: RouterSpec, **more: Any) -> MoESpec:
    return MoESpec(experts, HIDDEN, intermediate, router, **more)


def qwen(experts: int, intermediate: int, top_k: int, normalise: bool) -> dict[str, Any]:
    return {
        "num_experts": experts,
        "moe_intermediate_size": intermediate,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": normalise,
    }


DEEPSEEK = {
    "n_routed_experts": 12,
    "moe_intermediate_size": 10,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
}
GROUPED = RouterSpec(top_k=3, float32=True, scale=1.7, num_groups=4, top_groups=2)
CORRECTION = "mlp.gate.e_score_correction_bias"
CASES = {
    "mixtral": case(
        MixtralSparseMoeBlock,
        MixtralConfig,
        {"num_local_experts": 5, "intermediate_size": 22, "num_experts_per_tok": 2},
        moe(5, 22, RouterSpec(top_k=2, normalise=True)),
    ),
    "qwen2_moe": case(
        Qwen2MoeSparseMoeBlock,
        Qwen2MoeConfig,
        {**qwen(7, 9, 3, False), "shared_expert_intermediate_size": 14},
        moe(
            7,
            9,
            RouterSpec(top_k=3),
            shared=SharedExpertSpec(14, name="mlp.shared_expert", gate="mlp.shared_expert_gate"),
        ),
    ),
    "qwen3_moe": case(
        Qwen3MoeSparseMoeBlock, Qwen3MoeConfig, qwen(8, 6, 1, True), moe(8, 6, RouterSpec(top_k=1, normalise=True))
    ),
    "gpt_oss": case(
        GptOssMLP,
        GptOssConfig,
        {"num_local_experts": 6, "intermediate_size": 11, "num_experts_per_tok": 4},
        moe(
            6,
            11,
            RouterSpec(top_k=4, name="mlp.router", bias=True, scoring="softmax of chosen"),
            activation="swiglu_oai",
            bias=True,
            transposed=True,
        ),
    ),
    "deepseek_v2": case(
        DeepseekV2Moe,
        DeepseekV2Config,
        {**DEEPSEEK, "topk_method": "group_limited_greedy", "mlp_bias": True},
        moe(12, 10, GROUPED, shared=SharedExpertSpec(20, bias=True)),
    ),
    "deepseek_v2, greedy": case(
        DeepseekV2Moe,
        DeepseekV2Config,
        {**DEEPSEEK, "topk_method": "greedy"},
        moe(12, 10, RouterSpec(top_k=3, float32=True, scale=1.7), shared=SharedExpertSpec(20)),
    ),
    "deepseek_v3": case(
        DeepseekV3MoE,
        DeepseekV3Config,
        {**DEEPSEEK, "norm_topk_prob": True},
        moe(
            12,
            10,
            replace(GROUPED, scoring="sigmoid", normalise=True, correction=CORRECTION, group_score="sum of two"),
            shared=SharedExpertSpec(20),
        ),
    ),
}


class Mlp(nn.Module):
    """A place for a block under the name that it has in a layer."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.mlp = block


class Position:
    """Of a tp group: its sum stays the rank's own part. Counts the sums."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.sums = rank, size, 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        self.sums += 1
        return tensor


@pytest.fixture(params=CASES)
def found(request: pytest.FixtureRequest) -> Case:
    made: Case = CASES[request.param]
    return made


@pytest.fixture
def block(found: Case) -> nn.Module:
    torch.manual_seed(0)
    block = found.block().eval()
    for name, tensor in block.state_dict().items():
        tensor.normal_(std=0.7 if "gate" in name or "router" in name else 0.4)
    return block


def reference(block: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = block(x.unsqueeze(0))
    return (out[0] if isinstance(out, tuple) else out).squeeze(0)


def parts(
    spec: MoESpec, block: nn.Module, size: int, ops: Ops, expert_parallel: bool = False
) -> Iterator[MixtureOfExperts]:
    """Each rank's module, loaded."""
    model = find_policy(["LlamaForCausalLM"]).spec(llama_config(), read_rotary)
    shards = Shards(replace(model, layers=(replace(model.layers[0], mlp=spec),) * 3), size, expert_parallel)
    for rank in range(size):
        slices = Slices(shards, Position(rank, size), torch.float32)  # type: ignore[arg-type]
        with torch.device("meta"):
            module = MixtureOfExperts(spec, "", Context(slices, ops, model.norm, "auto", CPU, None))
        load_weights(module, ModuleSource(Mlp(block)), CPU)
        yield module


def test_the_declared_tensors_are_the_blocks(found: Case, block: nn.Module) -> None:
    model = find_policy(["LlamaForCausalLM"]).spec(llama_config(), read_rotary)
    layer = replace(model.layers[0], mlp=found.spec)
    shapes = replace(model, layers=(layer,) * 3).shapes()
    prefix = model.layer_prefix(0)
    declared = {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix + "mlp.")}
    assert declared == ModuleSource(Mlp(block)).shapes
    assert all(len(tensor.shape) == len(tensor.dims) for tensor in found.spec.tensors(""))


@pytest.mark.parametrize("ops", [EAGER, select_ops(CPU, torch.float32)], ids=["eager", "selected"])
@pytest.mark.parametrize("num_tokens", [1, 33])
def test_one_rank(found: Case, block: nn.Module, num_tokens: int, ops: Ops) -> None:
    x = torch.randn(num_tokens, HIDDEN)
    (module,) = parts(found.spec, block, 1, ops)
    torch.testing.assert_close(module(x), reference(block, x), rtol=1e-5, atol=1e-5)
    assert module(x[:0]).shape == (0, HIDDEN)


def test_the_router_is_transformers_to_the_bit(found: Case, block: nn.Module) -> None:
    x = torch.randn(60, HIDDEN)
    (module,) = parts(found.spec, block, 1, EAGER)
    weights, ids = module.router(x)
    router = getattr(block, found.spec.router.name.removeprefix("mlp."))
    with torch.no_grad():
        _, expected_weights, expected_ids = router(x)
    order, expected_order = ids.argsort(dim=1), expected_ids.argsort(dim=1)
    assert torch.equal(ids.long().gather(1, order), expected_ids.gather(1, expected_order))
    assert torch.equal(weights.gather(1, order), expected_weights.gather(1, expected_order))


@pytest.mark.parametrize("expert_parallel", [False, True], ids=["tensor", "expert"])
@pytest.mark.parametrize("size", [2, 3, 9])
def test_the_ranks_parts_add_up(found: Case, block: nn.Module, size: int, expert_parallel: bool) -> None:
    spec = found.spec
    if not expert_parallel and size > spec.intermediate_size:
        pytest.skip("refused")
    x = torch.randn(17, HIDDEN)
    total, num_weights = torch.zeros_like(x), 0
    for module in parts(spec, block, size, select_ops(CPU, torch.float32), expert_parallel):
        total += module(x)
        num_weights += sum(prod(piece.shape) for name in ("gate_up", "down") for piece in module.experts.pieces[name])
        assert module.tp.sums == 1  # type: ignore[attr-defined]
    torch.testing.assert_close(total, reference(block, x), rtol=1e-5, atol=2e-5)
    assert num_weights == 3 * spec.num_experts * spec.intermediate_size * HIDDEN


def test_what_cannot_be_divided_is_refused() -> None:
    model = find_policy(["LlamaForCausalLM"]).spec(llama_config(), read_rotary)
    with pytest.raises(ValueError, match=r"expert_parallel=True has no effect: LlamaForCausalLM has no experts"):
        Shards(model, 2, True)
    model = replace(model, layers=(replace(model.layers[0], mlp=CASES["mixtral"].spec),) * 3)
    Shards(model, 9, True)
    small = replace(CASES["mixtral"].spec, intermediate_size=5)
    model = replace(model, layers=(replace(model.layers[0], mlp=small),) * 3)
    with pytest.raises(ValueError, match=r"tp_size=6 is more than .* 5 .*; use tp_size <= 5 or expert_parallel=True"):
        Shards(model, 6)
    spec = CASES["deepseek_v3"].spec
    with pytest.raises(ValueError, match=r"num_experts=12 is not a multiple of the router's 5 groups"):
        replace(spec, router=replace(spec.router, num_groups=5))
    with pytest.raises(ValueError, match=r"top_k=4 experts cannot be chosen among 3"):
        replace(spec, router=replace(spec.router, top_k=4, top_groups=1))
