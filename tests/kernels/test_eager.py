"""The eager ops against formulas written out once more, element by element, over odd shapes."""

import math
import random
import types
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.models.bloom.modeling_bloom import BloomGelu
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from meshlm.kernels import eager, eager_sample, select_ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def assert_close(ours: Tensor, exact: Tensor) -> None:
    """Within a few roundings of `ours`' dtype of an exact (float64) result."""
    tolerance = TOLERANCE[ours.dtype]
    torch.testing.assert_close(ours.double(), exact.double(), rtol=tolerance, atol=tolerance)


def test_every_op_is_bound() -> None:
    ops = select_ops(torch.device("meta"), torch.float32)
    assert ops.name == "eager"
    assert ops.rotary_store_kv is eager.rotary_store_kv and ops.embedding is eager.embedding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 576), (5, 33)], ids=str)
def test_rms_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight, eps = (torch.randn(shape) * 3).to(dtype), torch.randn(shape[1]).to(dtype), 1e-3
    rows = []
    for row in x.double().tolist():
        root = math.sqrt(sum(v * v for v in row) / len(row) + eps)
        rows.append([w * v / root for w, v in zip(weight.double().tolist(), row, strict=True)])
    ours = eager.rms_norm(x, weight, eps)
    assert ours.dtype == dtype and ours.shape == x.shape
    assert_close(ours, torch.tensor(rows))
    with_offset = eager.rms_norm(x, weight, eps, 1.0)
    assert with_offset.dtype == dtype
    unit = eager.rms_norm(x.double().float(), torch.ones(shape[1]), eps)
    assert_close(with_offset, unit.double() * (1 + weight.double()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 7), (3, 576), (2, 3, 33)], ids=str)
def test_rms_norm_is_that_of_transformers_bit_for_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape) * 3).to(dtype)
    for theirs, offset in ((LlamaRMSNorm(shape[-1], 1e-5), 0.0), (GemmaRMSNorm(shape[-1], 1e-5), 1.0)):
        theirs = theirs.to(dtype).requires_grad_(False)
        theirs.weight.normal_()
        assert torch.equal(eager.rms_norm(x, theirs.weight, 1e-5, offset), theirs(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_rms_norm(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, residual, weight = (torch.randn(n).to(dtype) for n in ((4, 9), (4, 9), (9,)))
    before = x.clone(), residual.clone()
    normalised, total = eager.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(normalised, eager.rms_norm(x + residual, weight, 1e-5))
    assert torch.equal(eager.add_rms_norm(x, residual, weight, 1e-5, 1.0)[0], eager.rms_norm(total, weight, 1e-5, 1.0))
    normalised, total = eager.add_rms_norm(x, None, weight, 1e-5)
    assert torch.equal(total, x) and torch.equal(normalised, eager.rms_norm(x, weight, 1e-5))
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


def test_a_large_bfloat16_row_does_not_overflow() -> None:
    x = torch.full((1, 64), 3e19, dtype=torch.bfloat16)
    assert_close(eager.rms_norm(x * 0 + 1e4, torch.ones(64, dtype=torch.bfloat16), 1e-5), torch.ones(1, 64))
    half = torch.full((1, 64), 6e4, dtype=torch.float16)  # its square is no float16
    assert_close(eager.rms_norm(half, torch.ones(64, dtype=torch.float16), 1e-5), torch.ones(1, 64))


@pytest.mark.parametrize("parameters", ["weight, bias", "weight", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 576)], ids=str)
def test_add_layer_norm(shape: tuple[int, int], dtype: torch.dtype, parameters: str) -> None:
    torch.manual_seed(0)
    x, residual, eps = (torch.randn(shape) * 3 + 1).to(dtype), torch.randn(shape).to(dtype), 1e-3
    weight = torch.randn(shape[1]).to(dtype) if "weight" in parameters else None
    bias = torch.randn(shape[1]).to(dtype) if "bias" in parameters else None
    before = x.clone(), residual.clone()
    for stream in (None, residual):
        normalised, total = eager.add_layer_norm(x, stream, weight, bias, eps)
        assert total is x if stream is None else torch.equal(total, x + stream)
        rows = []
        for row in total.double().tolist():
            mean = sum(row) / len(row)
            root = math.sqrt(sum((v - mean) ** 2 for v in row) / len(row) + eps)
            rows.append([(v - mean) / root for v in row])
        exact = torch.tensor(rows, dtype=torch.float64)
        exact = exact if weight is None else exact * weight.double()
        assert normalised.dtype == dtype and normalised.shape == x.shape
        assert_close(normalised, exact if bias is None else exact + bias.double())
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norms_are_those_of_transformers_bit_for_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(5, 36) * 3 + 1).to(dtype)
    weight, bias = torch.randn(2, 36).to(dtype)
    theirs = torch.nn.functional.layer_norm(x, (36,), weight, bias, 1e-5)  # nn.LayerNorm: GPT-2, OPT, BLOOM, ...
    assert torch.equal(eager.add_layer_norm(x, None, weight, bias, 1e-5)[0], theirs)
    assert torch.equal(eager.add_layer_norm(x, None, None, None, 1e-5)[0], OlmoLayerNorm(36)(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_of_heads_are_those_of_transformers_bit_for_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    heads = (torch.randn(5, 4 + 2 + 2, 6) * 3 + 1).to(dtype)[:, 4:6]
    weight = torch.randn(2, 6).to(dtype)
    theirs: torch.nn.Module = CohereLayerNorm((2, 6), 1e-5)
    theirs.load_state_dict({"weight": weight})
    ours = eager.head_layer_norm(heads, weight, 1e-5)
    assert torch.equal(ours, theirs.to(dtype)(heads)) and ours.is_contiguous()
    for theirs, offset in ((Qwen3RMSNorm(6, 1e-5), 0.0), (Gemma3RMSNorm(6, 1e-5), 1.0)):
        theirs.load_state_dict({"weight": weight[0]})
        ours = eager.rms_norm(heads, weight[0], 1e-5, offset)
        assert torch.equal(ours, theirs.to(dtype)(heads)) and ours.is_contiguous()


FORMULAS: dict[str, Callable[[float], float]] = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x / 2 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "relu": lambda x: max(x, 0),
    "relu2": lambda x: max(x, 0) ** 2,
}


@pytest.mark.parametrize("kind", FORMULAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 768)], ids=str)
def test_activations(shape: tuple[int, int], dtype: torch.dtype, kind: str) -> None:
    torch.manual_seed(0)
    num_tokens, n = shape
    gate_up = (torch.randn(num_tokens, 2 * n) * 3).to(dtype)
    before = gate_up.clone()
    exact = torch.tensor([[FORMULAS[kind](v) for v in row] for row in gate_up.double().tolist()], dtype=torch.float64)
    assert_close(eager.activation(kind)(gate_up), exact)
    ours = eager.gated_activation(kind)(gate_up)
    assert ours.dtype == dtype and ours.shape == (num_tokens, n)
    tolerance = 3 * TOLERANCE[dtype]
    torch.testing.assert_close(ours.double(), exact[:, :n] * gate_up[:, n:].double(), rtol=tolerance, atol=tolerance)
    assert torch.equal(gate_up, before)


def test_every_kind_is_tested() -> None:
    assert {*FORMULAS, "swiglu_oai"} == set(eager.KINDS) and set(eager.ACTIVATIONS.values()) == set(FORMULAS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*eager.ACTIVATIONS, "BLOOM"])
def test_activations_are_those_of_transformers(name: str, dtype: torch.dtype) -> None:
    """Bit for bit where it computes in float32 inside as well; NewGELU and others like it round at each step."""
    torch.manual_seed(0)
    x = (torch.randn(7, 33) * 3).to(dtype)
    theirs = BloomGelu() if name == "BLOOM" else ACT2FN[name]
    ours = eager.activation("gelu_tanh" if name == "BLOOM" else eager.ACTIVATIONS[name])(x)
    if name in ("silu", "swish", "gelu", "gelu_pytorch_tanh", "relu", "relu2"):
        assert torch.equal(ours, theirs(x))
    else:
        assert_close(ours, theirs(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_oai_is_that_of_transformers(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate_up = (torch.randn(7, 66) * 8).to(dtype)  # past both limits
    settings = types.SimpleNamespace(alpha=1.702, limit=7.0)
    ours = eager.gated_activation("swiglu_oai")(gate_up)
    assert ours.dtype == dtype
    theirs = GptOssExperts._apply_gate(settings, gate_up.float())
    torch.testing.assert_close(ours, theirs.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [(2, 1), (6, 3), (64, 32), (6, 2), (64, 5), (5, 2), (4, 0)])
def test_rotary(dims: tuple[int, int], dtype: torch.dtype, interleaved: bool) -> None:
    torch.manual_seed(0)
    positions, heads, (head_dim, width) = [0, 1, 7, 500], 3, dims
    x = torch.randn(len(positions), heads, head_dim).to(dtype)
    angles = [[p / 100 ** (i / width) for i in range(width)] for p in positions]
    exact = x.double()  # what no pair takes is kept
    for t, of_token in enumerate(angles):
        for h in range(heads):
            for i, angle in enumerate(of_token):
                first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + width)
                a, b = float(x[t, h, first]), float(x[t, h, second])
                exact[t, h, first] = a * math.cos(angle) - b * math.sin(angle)
                exact[t, h, second] = b * math.cos(angle) + a * math.sin(angle)
    table = torch.tensor(angles, dtype=torch.float64)
    cos, sin = table.cos(), table.sin()
    ours = eager.rotary(x, cos.to(dtype), sin.to(dtype), interleaved)
    assert ours.dtype == dtype
    assert_close(ours, exact)


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_store_kv_writes_its_slots_and_no_other(block_size: int) -> None:
    torch.manual_seed(0)
    key_cache, value_cache = torch.randn(2, 5, block_size, 2, 4)
    before_key, before_value = key_cache.clone(), value_cache.clone()
    slots = torch.randperm(5 * block_size)[:4]
    qkv = torch.randn(4, 3 + 2 + 2, 4)
    key, value = qkv[:, 3:5], qkv[:, 5:, :3]  # not contiguous, as in the model; heads of other sizes
    value_cache, before_value = value_cache[..., :3].contiguous(), before_value[..., :3]
    eager.store_kv(key, value, key_cache, value_cache, slots)
    for slot in range(5 * block_size):
        place = divmod(slot, block_size)
        token = slots.tolist().index(slot) if slot in slots.tolist() else None
        assert torch.equal(key_cache[place], before_key[place] if token is None else key[token])
        assert torch.equal(value_cache[place], before_value[place] if token is None else value[token])


@pytest.mark.parametrize("padding", [[1], [0, 3], [0, 1, 2, 3]])
def test_padding_is_not_stored(padding: list[int]) -> None:
    torch.manual_seed(0)
    caches = torch.randn(2, 5, 2, 2, 4)
    slots, (key, value) = torch.tensor([7, 0, 3, 9]), torch.randn(2, 4, 2, 4)
    slots[padding] = -1
    rows = [row for row in range(4) if row not in padding]
    expected = caches.clone()
    for cache, of_tokens in zip(expected, (key, value), strict=True):
        cache.flatten(0, 1)[slots[rows]] = of_tokens[rows]
    masked = caches.clone()
    eager.store_kv(key, value, masked[0], masked[1], slots)
    assert torch.equal(masked, expected)
    # The form for devices that the host should not wait for.
    for cache, of_tokens, stored in zip(caches.clone(), (key, value), expected, strict=True):
        rows_and_slots = eager._repeat_over_padding(of_tokens, cache.flatten(0, 1), slots)
        eager.store(rows_and_slots[0], cache, rows_and_slots[1])
        assert torch.equal(cache, stored)
    nothing = eager._repeat_over_padding(key[:0], caches[0].flatten(0, 1), slots[:0])
    assert [len(of) for of in nothing] == [0, 0]


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_store_kv(interleaved: bool) -> None:
    torch.manual_seed(0)
    key_cache, value_cache = torch.zeros(2, 5, 2, 2, 4)
    slots, positions = torch.tensor([3, 8, 0]), torch.tensor([6, 1, 0])
    cos, sin = torch.randn(2, 7, 2)
    query, key, value = torch.randn(3, 3 + 2 + 2, 4).split((3, 2, 2), dim=1)
    tables = cos, sin, positions
    rotated = eager.rotary_store_kv(query, key, value, *tables, key_cache, value_cache, slots, interleaved)
    assert rotated.is_contiguous()
    assert torch.equal(rotated, eager.rotary(query, cos[positions], sin[positions], interleaved))
    assert torch.equal(key_cache.flatten(0, 1)[slots], eager.rotary(key, cos[positions], sin[positions], interleaved))
    assert torch.equal(value_cache.flatten(0, 1)[slots], value)


@pytest.mark.parametrize("shards", [[(0, 11)], [(0, 6), (6, 11)], [(0, 1), (1, 2), (2, 11)]])
def test_embedding_shards_sum_to_the_whole(shards: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(11, 5)
    weight[3] = float("inf")  # another's row must not turn into NaN on the way
    token_ids = torch.tensor([0, 10, 5, 6, 6, 1, 2])
    parts = [eager.embedding(token_ids, weight[start:stop], start) for start, stop in shards]
    assert torch.equal(sum(parts[1:], parts[0]), weight[token_ids])
    for (start, stop), part in zip(shards, parts, strict=True):
        outside = (token_ids < start) | (token_ids >= stop)
        assert not part[outside].any()


# ---- paged attention ------------------------------------------------------------------------------------------------


def rows_of(plan: eager.AttentionPlan) -> list[int]:
    """The step's rows in the plan's order; its groups tile them."""
    ends = [0, *(group.stop for group in plan.groups)]
    assert ends[:-1] == [group.start for group in plan.groups]
    return list(range(ends[-1])) if plan.order is None else plan.order.tolist()


class Case:
    """A step with random sequences whose blocks lie anywhere, and caches that hold garbage elsewhere."""

    def __init__(
        self, lens: Sequence[tuple[int, int]], heads: int, kv_heads: int, block_size: int, dtype: torch.dtype
    ) -> None:
        """lens: (new tokens, tokens before them) of each sequence."""
        dim = 8
        generator = torch.Generator().manual_seed(7)
        rng = random.Random(7)
        self.heads, self.kv_heads, self.dim, self.block_size, self.dtype = heads, kv_heads, dim, block_size, dtype
        self.query_lens = [new for new, _ in lens]
        self.key_lens = [new + context for new, context in lens]
        needed = [-(-n // block_size) for n in self.key_lens]
        num_blocks = sum(needed) + 3
        order = rng.sample(range(num_blocks), num_blocks)
        self.tables: list[list[int]] = []
        for n in needed:
            spare = rng.randrange(2) if len(order) > sum(needed) else 0  # a table may be longer than its keys need
            self.tables.append([order.pop() for _ in range(n + spare)])
        shape = (num_blocks, block_size, kv_heads, dim)
        self.key_cache = (torch.randn(shape, generator=generator) * 2).to(dtype)
        self.value_cache = torch.randn(shape, generator=generator).to(dtype)
        self.query = (torch.randn(sum(self.query_lens), heads, dim, generator=generator) * 2).to(dtype)
        self.scale = dim**-0.5

    def ours(self) -> Tensor:
        plan = eager.plan_attention(
            self.query_lens, self.key_lens, self.tables, self.block_size, self.dtype, torch.device("cpu")
        )
        assert sorted(rows_of(plan)) == list(range(sum(self.query_lens))), "every token in one group"
        return eager.paged_attention(self.query, self.key_cache, self.value_cache, plan, self.scale)

    def naive(self) -> Tensor:
        """One query and one head at a time."""
        out = torch.empty(self.query.shape, dtype=torch.float64)
        row = 0
        for new, length, table in zip(self.query_lens, self.key_lens, self.tables, strict=True):
            slots = [(table[p // self.block_size], p % self.block_size) for p in range(length)]
            keys = torch.stack([self.key_cache[slot] for slot in slots]).double()  # [length, kv_heads, dim]
            values = torch.stack([self.value_cache[slot] for slot in slots]).double()
            for j in range(new):
                visible = length - new + j + 1
                for h in range(self.heads):
                    kv_head = h // (self.heads // self.kv_heads)
                    scores = keys[:visible, kv_head] @ self.query[row, h].double() * self.scale
                    weights = torch.exp(scores - scores.max())
                    out[row, h] = (weights / weights.sum()) @ values[:visible, kv_head]
                row += 1
        return out


MIXES: dict[str, list[tuple[int, int]]] = {
    "one token": [(1, 0)],
    "a prompt": [(19, 0)],
    "prompts": [(3, 0), (1, 0), (17, 0), (16, 0)],
    "a chunk": [(5, 11)],
    "chunks": [(5, 11), (2, 1), (7, 32)],
    "decodes, alike": [(1, 10), (1, 10), (1, 10)],
    "decodes, ragged": [(1, 0), (1, 3), (1, 47), (1, 16), (1, 15)],
    "decodes, far apart": [(1, 200), (1, 1), (1, 2), (1, 199), (1, 90), (1, 0)],
    "everything": [(1, 20), (6, 0), (1, 3), (4, 13), (1, 100), (2, 30), (1, 99)],
}


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("heads", [(1, 1), (6, 6), (6, 2), (5, 1), (9, 3)], ids=str)
@pytest.mark.parametrize("mix", MIXES)
def test_paged_attention(mix: str, heads: tuple[int, int], block_size: int) -> None:
    case = Case(MIXES[mix], *heads, block_size, torch.float32)
    torch.testing.assert_close(case.ours().double(), case.naive(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mix", ["everything", "prompts", "decodes, far apart"])
def test_paged_attention_in_half_precision(mix: str, dtype: torch.dtype) -> None:
    case = Case(MIXES[mix], 6, 2, 16, dtype)
    torch.testing.assert_close(case.ours().double(), case.naive(), rtol=0, atol=8 * TOLERANCE[dtype])


def test_blocks_of_others_are_not_read() -> None:
    """Only finite garbage may lie beside: block 0 pads short tables, and everything else is poison."""
    case = Case(MIXES["everything"], 6, 2, 4, torch.float32)
    expected = case.ours()
    used = {block for table, n in zip(case.tables, case.key_lens, strict=True) for block in table[: -(-n // 4)]}
    for block in set(range(1, len(case.key_cache))) - used:
        case.key_cache[block] = case.value_cache[block] = float("nan")
    assert torch.equal(case.ours(), expected)


def test_order_of_sequences_does_not_matter() -> None:
    case = Case(MIXES["everything"], 6, 2, 3, torch.float32)
    expected = torch.split(case.ours(), case.query_lens)
    order = random.Random(1).sample(range(len(case.query_lens)), len(case.query_lens))
    pick = lambda items: [items[i] for i in order]  # noqa: E731
    case.query = torch.cat(pick(torch.split(case.query, case.query_lens)))
    case.query_lens, case.key_lens, case.tables = pick(case.query_lens), pick(case.key_lens), pick(case.tables)
    for ours, before in zip(torch.split(case.ours(), case.query_lens), pick(expected), strict=True):
        torch.testing.assert_close(ours, before, rtol=1e-5, atol=1e-5)


def test_decodes_of_like_length_share_a_group_and_others_do_not() -> None:
    plan = eager.plan_attention(
        [1, 1, 1, 4], [10, 12, 2000, 4], [[0], [1], [2] * 125, [3]], 16, torch.float32, torch.device("cpu")
    )
    rows = rows_of(plan)
    assert sorted(rows[group.start : group.stop] for group in plan.groups) == [[0, 1], [2], [3, 4, 5, 6]]


# ---- noise ----------------------------------------------------------------------------------------------------------


def keys_of(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (count, 2), dtype=torch.int64, generator=generator).int()


def test_noise_is_of_key_and_token_alone() -> None:
    keys, ids = keys_of(5), torch.arange(300, dtype=torch.int32)
    whole = eager_sample.counter_noise(keys, ids)
    assert whole.shape == (5, 300) and whole.dtype == torch.float32
    assert torch.equal(whole, eager_sample.counter_noise(keys, ids))
    for start, stop in ((0, 100), (100, 101), (101, 300)):
        assert torch.equal(eager_sample.counter_noise(keys, ids[start:stop]), whole[:, start:stop])
    for row in range(5):
        assert torch.equal(eager_sample.counter_noise(keys[row : row + 1], ids)[0], whole[row])
    picked = torch.randint(0, 300, (5, 17))
    assert torch.equal(eager_sample.counter_noise(keys, picked.int()), whole.gather(1, picked))


def test_noise_is_gumbel() -> None:
    """Kolmogorov-Smirnov, over tokens of one key and over keys of one token; the bound is that of p = 1e-4."""
    one_key = eager_sample.counter_noise(keys_of(1), torch.arange(60_000, dtype=torch.int32)).flatten()
    one_token = eager_sample.counter_noise(keys_of(60_000), torch.tensor([7], dtype=torch.int32)).flatten()
    counting = torch.stack((torch.arange(60_000), torch.zeros(60_000, dtype=torch.long)), dim=1).int()
    for noise in (
        one_key,
        one_token,
        eager_sample.counter_noise(counting, torch.tensor([0], dtype=torch.int32)).flatten(),
    ):
        assert torch.isfinite(noise).all()
        ordered = noise.double().sort().values
        expected = torch.exp(-torch.exp(-ordered))  # the distribution function of Gumbel
        count = len(ordered)
        above = torch.arange(1, count + 1) / count - expected
        distance = torch.maximum(above, 1 / count - above).max().item()
        assert distance < 2.23 / math.sqrt(count)


def test_noise_of_neighbours_is_unrelated() -> None:
    ids = torch.arange(20_000, dtype=torch.int32)
    base = torch.tensor([[12345, -9876]], dtype=torch.int32)
    noise = eager_sample.counter_noise(base, ids)[0].double()
    steps = [torch.tensor([step], dtype=torch.int32) for step in ([1, 0], [0, 1], [1, 1])]
    others = [eager_sample.counter_noise(base + step, ids)[0] for step in steps]
    others.append(noise.roll(1))
    for other in others:
        correlation = torch.corrcoef(torch.stack((noise, other.double())))[0, 1].abs().item()
        assert correlation < 4.5 / math.sqrt(len(ids))


def test_noise_is_finite_at_both_ends() -> None:
    """Over two million draws, whatever their 24 bits."""
    for seed in range(2):
        noise = eager_sample.counter_noise(keys_of(2, seed), torch.arange(500_000, dtype=torch.int32))
        assert torch.isfinite(noise).all()
        assert -3 < noise.min() < -2.3 and 11 < noise.max() < 17.5


def test_argmax_of_noisy_logits_draws_from_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, float("-inf"), 1.5, -3.0])
    draws = 200_000
    noise = eager_sample.counter_noise(keys_of(draws), torch.arange(len(logits), dtype=torch.int32))
    seen = torch.bincount((logits + noise).argmax(-1), minlength=len(logits)).double()
    expected = torch.softmax(logits.double(), -1) * draws
    assert seen[4] == 0
    held = expected > 0
    chi_square = ((seen - expected)[held] ** 2 / expected[held]).sum().item()
    assert chi_square < 25.7  # p = 1e-4 for 5 degrees of freedom


@pytest.mark.parametrize("rows", [0, 1, 6])
def test_sample_shard(rows: int) -> None:
    torch.manual_seed(0)
    logits, keys, start = torch.randn(rows, 50), keys_of(rows), 200
    logits[:, 7] = logits[:, 30] = 4.0  # equals
    before = logits.clone()
    temperatures = torch.tensor([0.0, 1.0, 0.2, 3.0, 0.0, 1e-6])[:rows]
    noise = eager_sample.counter_noise(keys, torch.arange(start, start + 50, dtype=torch.int32))
    value, token_ids = eager_sample.sample_shard(logits, temperatures, keys, start)
    assert value.dtype == torch.float32 and token_ids.dtype == torch.int64 and torch.equal(logits, before)
    for row, temperature in enumerate(temperatures):
        scores = logits[row] / temperature + noise[row] if temperature else logits[row]
        best = max(range(50), key=lambda i: (float(scores[i]), -i))
        assert (value[row], token_ids[row]) == (scores[best], start + best)
    assert not rows or token_ids[0] == 207


def test_shards_draw_what_the_whole_draws() -> None:
    torch.manual_seed(0)
    logits, keys, temperatures = torch.randn(40, 90), keys_of(40), torch.tensor([0.0, 0.7] * 20)
    _, token_ids = eager_sample.sample_shard(logits, temperatures, keys, 0)
    parts = [eager_sample.sample_shard(logits[:, a:b], temperatures, keys, a) for a, b in ((0, 30), (30, 31), (31, 90))]
    winner = torch.stack([value for value, _ in parts]).argmax(dim=0)
    assert torch.equal(torch.stack([ids for _, ids in parts]).gather(0, winner[None])[0], token_ids)
