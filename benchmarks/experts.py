"""A mixture of experts against transformers' own, on the same weights and tokens.

One block of Qwen3-MoE's shape: a router, then experts ``down(silu(gate(x)) * up(x))``. transformers' ways:

    eager        a loop over the experts that were chosen
    grouped_mm   torch's grouped product
    batched_mm   one product a pair of token and expert, with a copy of the expert's weights (only of few tokens)

Milliseconds of a forward: the median of rounds in which each takes its turn, so that what else the machine does hits
all alike. `x best` is how many times as fast MeshLM is as the fastest of the others.

    python benchmarks/experts.py
    python benchmarks/experts.py --experts 128 --top-k 8 --hidden 2048 --intermediate 768 --tokens 1 64 --dtype bfloat16
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from meshlm.kernels import select_ops
from meshlm.mesh.collectives import Communicator
from meshlm.policies import MoESpec, find_policy
from meshlm.shardformer.checkpoint import read_rotary
from meshlm.shardformer.linear import Context, Slices
from meshlm.shardformer.moe import MixtureOfExperts
from meshlm.shardformer.shard import Shards
from meshlm.shardformer.sources import ModuleSource
from meshlm.shardformer.weights import load_weights

THEIRS = ("eager", "grouped_mm", "batched_mm")
BATCHED_MOST = 32  # tokens


def theirs(config: Qwen3MoeConfig, dtype: torch.dtype, device: torch.device) -> Qwen3MoeSparseMoeBlock:
    torch.manual_seed(0)
    block = Qwen3MoeSparseMoeBlock(config).to(device, dtype).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.05)
    return block


def ours(config: Qwen3MoeConfig, block: nn.Module, dtype: torch.dtype, device: torch.device) -> MixtureOfExperts:
    model = find_policy(["Qwen3MoeForCausalLM"]).spec(config, read_rotary)
    mixture = model.layers[0].mlp
    assert isinstance(mixture, MoESpec)
    slices = Slices(Shards(model, 1), Communicator(None, "tp"), dtype)
    with torch.device("meta"):
        context = Context(slices, select_ops(device, dtype), model.norm, "auto", device, None)
        module = MixtureOfExperts(mixture, "", context)
    load_weights(module, ModuleSource(nn.ModuleDict({"mlp": block})), device)
    return module


def run(block: Qwen3MoeSparseMoeBlock, way: str, x: Tensor) -> Tensor:
    """transformers' block, its experts computed in one of its ways."""
    block.experts.config._experts_implementation = way
    out: Tensor = block(x.unsqueeze(0))
    return out.squeeze(0)


def time_in_turns(calls: dict[str, Callable[[], Tensor]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of each."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(times[2:]) for name, times in taken.items()}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=384, help="of one expert")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 512])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    device = torch.device(args.device)

    config = Qwen3MoeConfig(
        hidden_size=args.hidden,
        moe_intermediate_size=args.intermediate,
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        norm_topk_prob=True,
    )
    print(f"{args.experts} experts, top {args.top_k}, {args.hidden} -> {args.intermediate}, on {device}, ms a forward")
    print(f"{'dtype':10}{'tokens':>8}{'MeshLM':>12}" + "".join(f"{way:>12}" for way in THEIRS) + f"{'x best':>9}")
    for name in args.dtype:
        dtype = getattr(torch, name)
        block = theirs(config, dtype, device)
        module = ours(config, block, dtype, device)
        for num_tokens in args.tokens:
            x = torch.randn(num_tokens, args.hidden, device=device).to(dtype)
            ways = {
                way: partial(run, block, way, x) for way in THEIRS if way != "batched_mm" or num_tokens <= BATCHED_MOST
            }
            tolerance = 1e-4 if dtype is torch.float32 else 5e-2
            torch.testing.assert_close(module(x), ways["eager"](), rtol=tolerance, atol=tolerance)
            found = time_in_turns({"MeshLM": partial(module, x), **ways}, args.rounds, device)
            best = min(found[way] for way in ways)
            cells = (f"{found[way]:12.3f}" if way in found else f"{'-':>12}" for way in ("MeshLM", *THEIRS))
            print(f"{name:10}{num_tokens:8}{''.join(cells)}{best / found['MeshLM']:9.2f}", flush=True)


if __name__ == "__main__":
    main()
