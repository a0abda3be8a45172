"""Routing, sorting, grouped products and their sum, in C++ and in Triton, against `eager_moe`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from meshlm.kernels import eager_moe
from meshlm.kernels.cpu import CpuOps, Unavailable
from meshlm.kernels.eager_moe import GroupedLinear, Routing
from meshlm.kernels.ops import EAGER, Ops

Same = Callable[[Tensor, Tensor], None]


FORMS = [
    ("eager", torch.float32),
    ("C++", torch.float32),
    ("C++", torch.bfloat16),
    ("C++", torch.float16),
    ("triton", torch.float32),
    ("triton", torch.float16),
    pytest.param(("triton", torch.bfloat16), marks=pytest.mark.cuda),  # which the interpreter multiplies wrongly
]
COMPILED = [("C++", torch.float32), ("triton", torch.float32)]


@pytest.fixture(params=FORMS, ids=str)
def form(request: pytest.FixtureRequest, device: torch.device) -> Iterator[tuple[Ops, torch.dtype]]:
    """Ops and the dtype that they are for, the C++ ones on two threads."""
    name, dtype = request.param
    if name == "eager":
        yield EAGER, dtype
    elif name == "triton":
        yield pytest.importorskip("meshlm.kernels.triton_ops").TRITON, dtype
    else:
        if device.type != "cpu":
            pytest.skip("for CPUs")
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            ops = CpuOps(dtype)
        except Unavailable as reason:
            pytest.skip(f"{reason}")
        chosen = {name: getattr(ops, name) for name in ("route", "plan_experts", "bind_grouped_linear", "combine")}
        yield replace(EAGER, **chosen), dtype
        torch.set_num_threads(before)


# --------------------------------------------------------------------------------------------------------------
# route

ROUTINGS = {
    "softmax": Routing(3, "softmax"),
    "softmax, normalised, scaled": Routing(2, "softmax", normalise=True, scale=2.5),
    "softmax of chosen": Routing(4, "softmax of chosen"),
    "one": Routing(1, "softmax", normalise=True),
    "groups by their best": Routing(3, "softmax", scale=16.0, num_groups=6, top_groups=2),
    "groups by their best two": Routing(
        5, "sigmoid", normalise=True, scale=2.5, num_groups=3, top_groups=2, group_score="sum of two"
    ),
    "all groups": Routing(5, "sigmoid", num_groups=3, top_groups=3),
    "a whole group": Routing(6, "sigmoid", normalise=True, num_groups=3, top_groups=1, group_score="sum of two"),
}


@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS.keys())
def test_route(routing: Routing, form: tuple[Ops, torch.dtype], device: torch.device, assert_same: Same) -> None:
    torch.manual_seed(0)
    ops, dtype = form
    # No two alike: of equals torch may choose any.
    logits = (torch.rand(9, 18, device=device).argsort(dim=1) / 4 - 2).to(dtype)
    correction = torch.randn(18, device=device) * 0.3 if routing.scoring == "sigmoid" else None
    for num_tokens in (9, 1, 0):
        weights, ids = ops.route(logits[:num_tokens], routing, correction)
        expected_weights, expected_ids = eager_moe.route(logits[:num_tokens], routing, correction)
        assert torch.equal(ids, expected_ids)
        assert_same(weights, expected_weights)


@pytest.mark.parametrize("form", COMPILED[:1], ids=str, indirect=True)
def test_of_equals_cpp_chooses_as_torch_does(form: tuple[Ops, torch.dtype]) -> None:
    torch.manual_seed(0)
    for routing in (*ROUTINGS.values(), Routing(2, "softmax")):
        logits = torch.randint(4, (50, 252), dtype=torch.float32)[:, : 18 if routing.top_k > 2 else 252].contiguous()
        assert torch.equal(form[0].route(logits, routing, None)[1], eager_moe.route(logits, routing)[1])


@pytest.mark.parametrize("form", COMPILED[1:], ids=str, indirect=True)
def test_of_equals_triton_chooses_the_first(form: tuple[Ops, torch.dtype], device: torch.device) -> None:
    logits = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0, 1.0]], device=device)
    assert form[0].route(logits, Routing(4, "softmax"), None)[1].tolist() == [[1, 3, 5, 0]]
    grouped = Routing(3, "sigmoid", num_groups=3, top_groups=2, group_score="sum of two")
    assert form[0].route(logits, grouped, None)[1].tolist() == [[1, 3, 0]]


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's
@pytest.mark.parametrize("form", COMPILED, ids=str, indirect=True)
@pytest.mark.parametrize("name", ROUTINGS)
def test_any_logits_choose_experts(name: str, form: tuple[Ops, torch.dtype], device: torch.device) -> None:
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[nan] * 18, [inf] * 18, [-inf] * 18, [1.0, inf, nan] * 6], device=device)
    _, ids = form[0].route(logits, ROUTINGS[name], None)
    assert ((ids >= 0) & (ids < 18)).all()
    assert all(len(set(row)) == len(row) for row in ids.tolist())


# --------------------------------------------------------------------------------------------------------------
# plan, products, sum


@dataclass(frozen=True)
class Share:
    """The experts of a rank."""

    num_experts: int
    first: int
    num_local: int


SHARES = {
    "all": Share(7, 0, 7),
    "the middle": Share(7, 2, 3),
    "one": Share(5, 4, 1),
    "none": Share(3, 3, 0),
}
CHOICES: dict[str, Callable[[int, int], Tensor]] = {  # of num_tokens among num_experts
    "random": lambda n, e: torch.rand(n, e).argsort(dim=1)[:, :2],
    "all the same": lambda n, e: torch.tensor([[e - 1, 0]]).expand(n, 2),
    "one expert a token": lambda n, e: torch.randint(e, (n, 1)),
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("num_tokens", [0, 1, 40, 1500])
@pytest.mark.parametrize("form", COMPILED, ids=str, indirect=True)
def test_plan(form: tuple[Ops, torch.dtype], num_tokens: int, choice: str, device: torch.device) -> None:
    torch.manual_seed(0)
    for share in SHARES.values():
        ids = CHOICES[choice](num_tokens, share.num_experts).int().contiguous().to(device)
        plan = form[0].plan_experts(ids, share.first, share.num_local)
        expected = EAGER.plan_experts(ids, share.first, share.num_local)
        num_rows = int(expected.starts[-1])
        assert torch.equal(plan.starts, expected.starts) and torch.equal(plan.places, expected.places)
        assert torch.equal(plan.pairs[:num_rows], expected.pairs[:num_rows]) and plan.num_rows >= num_rows


def test_the_plan_of_the_definition() -> None:
    plan = EAGER.plan_experts(torch.tensor([[5, 1], [4, 5], [0, 4]], dtype=torch.int32), 4, 3)
    assert plan.pairs[: plan.num_rows].tolist() == [2, 5, 0, 3]
    assert plan.starts.tolist() == [0, 2, 4, 4] and plan.places.tolist() == [[2, 6], [0, 3], [6, 1]]


@pytest.mark.parametrize(
    ("num_tokens", "size_out", "size_in", "choice"),
    [
        (0, 5, 3, "random"),
        (1, 1, 1, "all the same"),
        (5, 33, 130, "random"),
        (20, 64, 32, "all the same"),
        (70, 70, 17, "random"),  # enough for wide tiles
        (30, 34, 7, "one expert a token"),
    ],
)
@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES.keys())
def test_products_and_their_sum(
    share: Share,
    num_tokens: int,
    size_out: int,
    size_in: int,
    choice: str,
    form: tuple[Ops, torch.dtype],
    device: torch.device,
    assert_same: Same,
) -> None:
    torch.manual_seed(0)
    ops, dtype = form
    made: dict[str, Any] = {"dtype": torch.float32, "device": device}
    x = torch.randn(num_tokens, size_in, **made).to(dtype)
    up = (torch.randn(share.num_local, size_out, size_in, **made) / size_in**0.5).to(dtype)
    down = (torch.randn(share.num_local, size_in, size_out, **made) / size_out**0.5).to(dtype)
    bias = torch.randn(share.num_local, size_out, **made).to(dtype)

    def run(ops: Ops, x: Tensor, up: Tensor, down: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        plan = ops.plan_experts(ids, share.first, share.num_local)
        rows = ops.bind_grouped_linear(up)(x, bias, plan, True)
        out = ops.bind_grouped_linear(down)(rows, None, plan, False)
        return rows[: int(plan.starts[-1])], ops.combine(out, weights, plan)

    ids = CHOICES[choice](num_tokens, share.num_experts).int().contiguous().to(device)
    weights = torch.rand(ids.shape, **made)
    rows, total = run(ops, x, up, down, bias)
    exact_rows, exact_total = run(EAGER, x.double(), up.double(), down.double(), bias.double())
    assert_same(rows, exact_rows.to(dtype))
    assert_same(total, exact_total.to(dtype))


def test_a_row_of_nan_stays_alone(form: tuple[Ops, torch.dtype], device: torch.device) -> None:
    """Odd sizes, and rows of other ranks' experts, which nothing computes."""
    torch.manual_seed(0)
    ops, dtype = form
    x, weight = torch.randn(9, 13, device=device).to(dtype), torch.randn(4, 13, 13, device=device).to(dtype)
    x[4] = float("nan")
    ids = torch.tensor([[0, 1], [2, 5], [0, 5], [3, 4], [3, 2], [4, 3], [1, 3], [5, 0], [2, 4]], device=device).int()
    plan = ops.plan_experts(ids, 1, 4)
    product = ops.bind_grouped_linear(weight)
    rows = product(product(x, None, plan, True), None, plan, False)
    total = ops.combine(rows, torch.ones(9, 2, device=device), plan)
    assert total[4].isnan().all() and total[torch.arange(9) != 4].isfinite().all()
    assert (total.abs().sum(dim=1) == 0).nonzero().flatten().tolist() == [2, 7]


@pytest.mark.cuda
def test_a_graph_serves_other_choices(device: torch.device) -> None:
    """No launch depends on how many rows an expert has."""
    ops = pytest.importorskip("meshlm.kernels.triton_ops").TRITON
    torch.manual_seed(0)
    x, weight = torch.randn(12, 64, device=device), torch.randn(6, 32, 64, device=device)
    product, logits = ops.bind_grouped_linear(weight), torch.randn(12, 6, device=device)

    def forward(ops: Ops, product: GroupedLinear) -> Tensor:
        weights, ids = ops.route(logits, Routing(2, "softmax"), None)
        plan = ops.plan_experts(ids, 0, 6)
        return ops.combine(product(x, None, plan, True), weights, plan)

    forward(ops, product)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward(ops, product)
    for _ in range(3):
        logits.add_(torch.randn_like(logits))
        graph.replay()
        torch.testing.assert_close(out, forward(EAGER, EAGER.bind_grouped_linear(weight)), rtol=1e-4, atol=1e-4)
