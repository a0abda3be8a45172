"""`kernels/sample.py` and `kernels/cpu/sample.cpp` against their definitions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from meshlm.kernels import eager_sample

NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=["triton", "C++"])
def kernel(request: pytest.FixtureRequest, compiled: Callable[[str, str], Any]) -> Any:
    """`counter_noise` and `sample_shard`."""
    return compiled(request.param, "sample")


def keys_of(count: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(-(2**31), 2**31, (count, 2), generator=generator).int().to(device)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (2, 1023), (3, 1024), (2, 2500)], ids=str)
def test_counter_noise(
    kernel: Any, shape: tuple[int, int], device: torch.device, assert_same: Callable[[Tensor, Tensor], None]
) -> None:
    """Bits that differed anywhere would make another number altogether."""
    rows, n = shape
    keys = keys_of(rows, device)
    ids = torch.arange(1000, 1000 + n, dtype=torch.int32, device=device)
    assert_same(kernel.counter_noise(keys, ids), eager_sample.counter_noise(keys, ids))
    own = torch.randint(-(2**31), 2**31, shape, device=device).int()
    assert_same(kernel.counter_noise(keys, own), eager_sample.counter_noise(keys, own))


def test_noise_at_both_ends(kernel: Any, device: torch.device, assert_same: Callable[[Tensor, Tensor], None]) -> None:
    """Keys whose hash of token 0 is a given number, by running the mixer backwards."""

    def unmixed(bits: int) -> int:
        bits ^= bits >> 16
        bits = bits * pow(0x846CA68B, -1, 2**32) % 2**32
        bits ^= (bits >> 15) ^ (bits >> 30)
        bits = bits * pow(0x7FEB352D, -1, 2**32) % 2**32
        return bits ^ (bits >> 16)

    hashes = [0, 1, 2, 3, 2**8, 2**24, 2**31 - 1, 2**31, 2**32 - 2**9, 2**32 - 2**8, 2**32 - 1]
    words = torch.tensor([[unmixed(unmixed(bits)), 0] for bits in hashes])
    keys = torch.where(words < 2**31, words, words - 2**32).int().to(device)
    noise = kernel.counter_noise(keys, torch.zeros(1, dtype=torch.int32, device=device))
    assert_same(noise, eager_sample.counter_noise(keys, torch.zeros(1, dtype=torch.int32, device=device)))
    assert torch.isfinite(noise).all() and noise[0] > 22 and noise[-1] < -2.8
    assert noise.flatten().tolist() == sorted(noise.flatten().tolist(), reverse=True)


@pytest.mark.parametrize("start", [0, 32000])
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 7), (5, 1023), (4, 1024), (4, 1025), (7, 4500)], ids=str)
def test_sample_shard(
    kernel: Any, shape: tuple[int, int], start: int, device: torch.device, assert_same: Callable[[Tensor, Tensor], None]
) -> None:
    torch.manual_seed(0)
    rows, vocabulary = shape
    logits = torch.randn(rows, vocabulary + 3, device=device)[:, 2:-1]
    before = logits.clone()
    temperatures = torch.tensor([0.0, 1.0, 0.3, 1e-6, 0.0, 5.0, 1.0], device=device)[:rows].contiguous()
    keys = keys_of(rows, device)
    values, token_ids = kernel.sample_shard(logits, temperatures, keys, start)
    expected_values, expected_ids = eager_sample.sample_shard(logits, temperatures, keys, start)
    assert_same(values, expected_values)
    assert_same(token_ids, expected_ids)
    assert torch.equal(logits, before)
    greedy = temperatures == 0
    assert torch.equal(token_ids[greedy] - start, logits[greedy].argmax(dim=-1))


def test_shards_agree_with_the_whole(kernel: Any, device: torch.device) -> None:
    torch.manual_seed(1)
    logits, keys = torch.randn(6, 3001, device=device), keys_of(6, device)
    temperatures = torch.tensor([0.0, 1.0, 2.0, 0.5, 0.0, 1.0], device=device)
    value, token_ids = kernel.sample_shard(logits, temperatures, keys, 0)
    parts = [
        kernel.sample_shard(logits[:, start:stop], temperatures, keys, start)
        for start, stop in ((0, 1), (1, 1400), (1400, 3001))
    ]
    winner = torch.stack([part[0] for part in parts]).max(dim=0)
    assert torch.equal(winner.values, value)
    assert torch.equal(torch.stack([part[1] for part in parts]).gather(0, winner.indices[None])[0], token_ids)


@pytest.mark.parametrize(
    ("places", "value", "place"),
    [
        ({5: 3.0, 1500: 3.0, 2999: 3.0}, 3.0, 5),  # equals: the lowest
        ({1024: 3.0, 2999: 3.0}, 3.0, 1024),
        ({}, -INF, 0),  # nothing may be drawn: an id of the shard all the same
        ({2998: -5.0}, -5.0, 2998),
        ({7: INF, 1030: 1.0}, INF, 7),
        ({3: INF, 1030: NAN, 2000: NAN}, NAN, 1030),  # as torch's max does it
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unusual_rows(
    kernel: Any, temperature: float, places: dict[int, float], value: float, place: int, device: torch.device
) -> None:
    logits = torch.full((2, 3000), -INF, device=device)
    for at, logit in places.items():
        logits[:, at] = logit
    arguments = logits, torch.full((2,), temperature, device=device), keys_of(2, device), 100
    values, token_ids = kernel.sample_shard(*arguments)
    torch.testing.assert_close((values, token_ids), eager_sample.sample_shard(*arguments), equal_nan=True)
    if not temperature:
        torch.testing.assert_close(values, torch.full((2,), value, device=device), equal_nan=True)
        assert token_ids.tolist() == [100 + place] * 2


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 30.0], ids=str)
def test_noise_that_cannot_win_is_not_made(compiled: Callable[[str, str], Any], scale: float) -> None:
    """The score is that of all noise, whatever was passed over: where logits are alike, and where they are not."""
    kernel = compiled("C++", "sample")
    torch.manual_seed(2)
    logits, temperatures = scale * torch.randn(24, 9001), torch.tensor([0.7, 1.0, 3.0]).repeat(8)
    keys = keys_of(24, logits.device)
    scores = logits / temperatures[:, None] + kernel.counter_noise(keys, torch.arange(9001, dtype=torch.int32))
    values, token_ids = kernel.sample_shard(logits, temperatures, keys, 0)
    assert torch.equal(values, scores.amax(dim=1)) and torch.equal(token_ids, scores.argmax(dim=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounded_logits_are_drawn_from_as_they_are(kernel: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Whatever type they come in; the ends of rows, which no vector fills, too."""
    torch.manual_seed(4)
    logits = torch.randn(6, 4500, device=device).mul(4).to(dtype)
    logits[1, 77], logits[2] = NAN, -INF
    temperatures = torch.tensor([0.0, 0.0, 0.0, 0.8, 1.0, 2.0], device=device)
    keys = keys_of(6, device)
    given, wanted = ((x, temperatures, keys, 32000) for x in (logits, logits.float()))
    torch.testing.assert_close(
        kernel.sample_shard(*given), kernel.sample_shard(*wanted), rtol=0, atol=0, equal_nan=True
    )
    if hasattr(kernel, "likeliest"):
        some = logits[3:].contiguous()
        for count in (1, 50, 4500):
            narrow, wide = (kernel.likeliest(x, temperatures[3:], count, True) for x in (some, some.float()))
            assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


@pytest.mark.parametrize(
    ("rows", "n", "count"), [(0, 5, 2), (1, 1, 1), (3, 7, 7), (2, 1000, 1), (5, 1023, 128), (4, 5000, 4999)], ids=str
)
def test_likeliest(
    compiled: Callable[[str, str], Any],
    rows: int,
    n: int,
    count: int,
    device: torch.device,
    assert_same: Callable[[Tensor, Tensor], None],
) -> None:
    kernel = compiled("C++", "sample")
    torch.manual_seed(0)
    logits = torch.randn(rows, n, device=device).mul(3).round(decimals=1)  # with equals
    logits[:, ::3] = -INF
    logits[-1:, n // 2 :] = -INF  # all of a sum's parts but the first
    temperatures = torch.tensor([0.7, 1.0, 3.0, 1e-6, 0.2], device=device)[:rows]
    for case in (logits, logits.flip(1), torch.full_like(logits, 2.0), torch.full_like(logits, -INF)):
        case = case.contiguous()
        values, places, limits = kernel.likeliest(case, temperatures, count, True)
        expected_values, _, expected_limits = eager_sample.likeliest(case, temperatures, count, True)
        assert torch.equal(values, expected_values)
        assert torch.equal(limits[:, 1], expected_limits[:, 1])
        assert_same(limits[:, 0].float(), expected_limits[:, 0].float())
        there = values > -INF
        assert torch.equal((case / temperatures[:, None]).gather(1, places)[there], values[there])
        without = kernel.likeliest(case, temperatures, count, False)
        assert torch.equal(without[0], values) and torch.equal(without[1], places)
        assert torch.equal(without[2][:, 1], limits[:, 1]) and not without[2][:, 0].any()
        assert all(
            len(set(row[is_there].tolist())) == is_there.sum() for row, is_there in zip(places, there, strict=True)
        )


FILTERS = [
    (INF, 1.0, 0.0),
    (1, 1.0, 0.0),
    (7, 1.0, 0.0),
    (500, 1.0, 0.0),
    (INF, 0.9, 0.0),
    (INF, 1e-9, 0.0),
    (INF, 1.0, 0.3),
    (20, 0.5, 0.05),
    (INF, 0.999, 1.0),
]


@pytest.mark.parametrize("n", [1, 5, 16, 128, 300])
@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_draw_filtered(compiled: Callable[[str, str], Any], n: int, scale: float, device: torch.device) -> None:
    """Of rows of all kinds: with equals, with tokens that may be missing, with nothing that may be drawn."""
    kernel = compiled("C++", "sample")
    torch.manual_seed(n)
    rows = 8 * len(FILTERS)
    logits = torch.randn(rows, 1000, device=device).mul(scale).round(decimals=1)
    logits[1::8], logits[2::8, 3:] = -INF, -INF
    values, token_ids, limits = eager_sample.likeliest(logits, torch.ones(rows, device=device), n, True)
    limits[3::8, 1] = -INF
    filters = torch.tensor(FILTERS, dtype=torch.float64, device=device).repeat_interleave(8, 0).T.contiguous()
    arguments = (values, token_ids, limits, filters, keys_of(rows, device))
    drawn, complete = kernel.draw_filtered(*arguments)
    expected, expected_complete = eager_sample.draw_filtered(*arguments)
    assert torch.equal(complete, expected_complete)
    there = values[:, 0] > -INF
    assert (drawn != expected)[there].sum() <= 1, "a draw may turn on the last bit of a logarithm"


@pytest.mark.cuda
def test_sample_shard_of_a_real_size(
    kernel: Any, device: torch.device, assert_same: Callable[[Tensor, Tensor], None]
) -> None:
    torch.manual_seed(0)
    logits, keys = torch.randn(256, 128256, device=device), keys_of(256, device)
    temperatures = torch.rand(256, device=device).round(decimals=1)
    values, token_ids = kernel.sample_shard(logits, temperatures, keys, 0)
    expected_values, expected_ids = eager_sample.sample_shard(logits, temperatures, keys, 0)
    assert_same(values, expected_values)
    assert (token_ids == expected_ids).sum() >= 255, "a draw may turn on the last bit of a logarithm"


@pytest.mark.cuda
def test_a_cuda_graph_replays_the_draw(kernel: Any, device: torch.device) -> None:
    logits, keys, temperatures = torch.randn(4, 5000, device=device), keys_of(4, device), torch.ones(4, device=device)
    kernel.sample_shard(logits, temperatures, keys, 0)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, drawn = kernel.sample_shard(logits, temperatures, keys, 0)
    logits.copy_(torch.randn_like(logits))
    graph.replay()
    assert torch.equal(drawn, kernel.sample_shard(logits, temperatures, keys, 0)[1])
