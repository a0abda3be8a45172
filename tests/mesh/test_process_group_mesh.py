"""ProcessGroupMesh: its geometry and messages in process, its groups on four gloo ranks started once."""

import itertools

import numpy as np
import pytest
import torch
import torch.distributed as dist

from meshlm.mesh.collectives import CollectiveError
from meshlm.mesh.process_group_mesh import ProcessGroupMesh, check_sizes, check_topology

on_four_ranks = pytest.mark.on_four_ranks  # see conftest.py


def total(group: dist.ProcessGroup | None) -> float:
    """The sum over the group of 2 to the power of each rank: names its members exactly."""
    tensor = torch.tensor([2.0 ** dist.get_rank()])
    dist.all_reduce(tensor, group=group)
    return tensor.item()


# On each of four ranks, every test in a process group of its own


@on_four_ranks
def test_geometry() -> None:
    mesh = ProcessGroupMesh(dp=1, pp=2, tp=2)
    rank = dist.get_rank()
    assert mesh.rank == rank and mesh.shape == (1, 2, 2) and mesh.axis_names == ("dp", "pp", "tp")
    assert mesh.coordinate() == (0, rank // 2, rank % 2)
    assert mesh.coordinate("pp") == mesh.coordinate(1) == mesh.coordinate(-2) == rank // 2
    assert mesh.size() == 4 and mesh.size("tp") == mesh.size(-1) == 2 and mesh.size(("dp", "tp")) == 2
    assert mesh.describe() == f"dp=1 × pp=2 × tp=2 (rank {rank} at dp 0, pp {rank // 2}, tp {rank % 2})"


@on_four_ranks
def test_round_trip_on_every_shape_of_four() -> None:
    for shape in [(4,), (2, 2), (1, 4), (4, 1), (2, 1, 2), (1, 2, 2, 1)]:
        mesh = ProcessGroupMesh(*shape)
        for rank in range(4):
            assert mesh.unravel(rank) == tuple(np.unravel_index(rank, shape))
            assert mesh.ravel(mesh.unravel(rank)) == rank


@on_four_ranks
def test_groups_along_one_axis() -> None:
    mesh = ProcessGroupMesh(pp=2, tp=2)
    rank = mesh.rank
    assert mesh.get_ranks_in_group(mesh.get_group("tp")) == (rank // 2 * 2, rank // 2 * 2 + 1)
    assert mesh.get_ranks_in_group(mesh.get_group("pp")) == (rank % 2, rank % 2 + 2)
    assert total(mesh.get_group("tp")) == (3 if rank < 2 else 12)
    assert total(mesh.get_group("pp")) == (5 if rank % 2 == 0 else 10)


@on_four_ranks
def test_groups_along_several_axes() -> None:
    mesh = ProcessGroupMesh(dp=2, pp=1, tp=2)
    rank = mesh.rank
    for axes in itertools.permutations(("dp", "tp")):
        assert mesh.get_ranks_in_group(mesh.get_group(axes)) == (0, 1, 2, 3)
    assert mesh.get_ranks_in_group(mesh.get_group(("pp", "tp"))) == (rank // 2 * 2, rank // 2 * 2 + 1)
    assert mesh.get_ranks_in_group(mesh.get_group((0, -2))) == (rank % 2, rank % 2 + 2)
    assert mesh.get_ranks_in_group(mesh.get_group("pp")) == (rank,)


@on_four_ranks
def test_a_group_is_created_once() -> None:
    mesh = ProcessGroupMesh(pp=2, tp=2)
    group = mesh.get_group("tp")
    assert mesh.get_group(1) is group
    assert mesh.get_group_along_axis("tp", [1, 0]) is group
    assert mesh.create_group_along_axis("tp", backend="gloo") is group
    assert mesh["tp"].get_group("tp") is group


@on_four_ranks
def test_groups_at_some_indices() -> None:
    mesh = ProcessGroupMesh(dp=1, tp=4)
    group = mesh.create_group_along_axis("tp", [3, 1])
    assert (group is not None) == (mesh.rank in (1, 3))
    if group is not None:
        assert mesh.get_ranks_in_group(group) == (1, 3) and total(group) == 10
    mesh = ProcessGroupMesh(pp=2, tp=2)
    group = mesh.get_group_along_axis(("tp", "pp"), [[1], [0, 1]])
    assert (group is not None) == (mesh.rank in (1, 3))
    if group is not None:
        assert mesh.get_ranks_in_group(group) == (1, 3)


@on_four_ranks
def test_bad_axes_and_indices() -> None:
    mesh = ProcessGroupMesh(pp=2, tp=2)
    with pytest.raises(ValueError, match="no axis 'dp'; its axes are pp, tp"):
        mesh.get_group("dp")
    with pytest.raises(ValueError, match="no axis 2"):
        mesh.size(2)
    with pytest.raises(ValueError, match="different axes, got \\('tp', 1\\)"):
        mesh.get_group(("tp", 1))
    with pytest.raises(ValueError, match="indices \\[0, 2\\] on axis 'tp': expected different ones from 0 to 1"):
        mesh.get_group_along_axis("tp", [2, 0])
    with pytest.raises(ValueError, match="1 lists for 2 axes"):
        mesh.get_group_along_axis(("pp", "tp"), [[0]])
    with pytest.raises(ValueError, match="rank 4 lies outside of the mesh pp=2 × tp=2"):
        mesh.unravel(4)
    for coordinate in [(0,), (2, 0), (-1, 0)]:
        with pytest.raises(ValueError, match="lies outside of the mesh"):
            mesh.ravel(coordinate)


@on_four_ranks
def test_neighbours() -> None:
    mesh = ProcessGroupMesh(pp=4, tp=1)
    rank = mesh.rank
    assert mesh.neighbour("pp", 1) == (rank + 1 if rank < 3 else None)
    assert mesh.neighbour("pp", -1) == (rank - 1 if rank > 0 else None)
    assert mesh.neighbour("tp", 1) is None
    mesh = ProcessGroupMesh(pp=2, tp=2)
    assert mesh.neighbour("pp", 1) == (rank + 2 if rank < 2 else None)


@on_four_ranks
def test_sub_meshes() -> None:
    mesh = ProcessGroupMesh(dp=2, pp=1, tp=2)
    rank = mesh.rank
    tp = mesh["tp"]
    assert tp.shape == (2,) and tp.rank == rank and tp.coordinate() == (rank % 2,)
    assert [tp.ravel([i]) for i in range(2)] == [rank // 2 * 2, rank // 2 * 2 + 1]
    replica = mesh["pp", "tp"]
    assert replica.axis_names == ("pp", "tp") and replica.size() == 2
    assert replica.get_ranks_in_group(replica.get_group(("pp", "tp"))) == (rank // 2 * 2, rank // 2 * 2 + 1)
    assert replica["tp"].describe() == f"tp=2 (rank {rank} at tp {rank % 2})"
    with pytest.raises(ValueError, match="outside of the mesh tp=2"):
        tp.unravel((rank + 2) % 4)
    with pytest.raises(ValueError, match="no axis 'dp'"):
        tp.get_group("dp")


@on_four_ranks
def test_destroy_twice_and_rebuild() -> None:
    mesh = ProcessGroupMesh(pp=2, tp=2)
    assert total(mesh.get_group("tp")) in (3, 12)
    sub_mesh = mesh["tp"]
    mesh.destroy()
    mesh.destroy()
    for destroyed in (mesh, sub_mesh):
        with pytest.raises(RuntimeError, match="no group along tp: the mesh was destroyed"):
            destroyed.get_group("tp")
    for dp, tp in ((4, 1), (1, 4), (2, 2)):
        rebuilt = ProcessGroupMesh(dp=dp, tp=tp)
        totals = {1: 2.0**rebuilt.rank, 2: 3 if rebuilt.rank < 2 else 12, 4: 15}
        assert total(rebuilt.get_group("tp")) == totals[tp]
        rebuilt.destroy()
    assert total(None) == 15  # the process group under the meshes still stands


@on_four_ranks
def test_destroy_after_the_process_group() -> None:
    mesh = ProcessGroupMesh(pp=2, tp=2)
    mesh.get_group("tp")
    dist.destroy_process_group()
    with pytest.raises(RuntimeError, match="the process group under the mesh was destroyed"):
        mesh.get_group("tp")
    mesh.destroy()


@on_four_ranks
def test_a_gloo_group_beside_the_default() -> None:
    from torch.testing._internal.distributed import fake_pg  # noqa: F401 - registers "fake", which stands for NCCL

    store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
    dist.destroy_process_group()
    dist.init_process_group("fake", store=dist.PrefixStore("fake", store), rank=rank, world_size=4)
    mesh = ProcessGroupMesh(pp=2, tp=2)
    group, control_group = mesh.get_group("tp"), mesh.get_group("tp", backend="gloo")
    assert dist.get_backend(group) == "fake" and dist.get_backend(control_group) == "gloo"
    assert mesh.get_ranks_in_group(group) == mesh.get_ranks_in_group(control_group)
    assert total(control_group) == (3 if rank < 2 else 12)
    assert mesh.get_group("tp", backend="fake") is group
    assert ProcessGroupMesh(pp=2, tp=2, backend="gloo").get_group("tp", backend="fake") is not group


@on_four_ranks
def test_the_product_must_be_the_world() -> None:
    with pytest.raises(ValueError, match=r"dp=2 × tp=3 needs 6 ranks, but the process group has 4: .* or use tp=2$"):
        ProcessGroupMesh(dp=2, tp=3)


@on_four_ranks
def test_a_missing_rank_names_the_group() -> None:
    mesh = ProcessGroupMesh(tp=4, timeout_s=1)
    if mesh.rank < 3:
        with pytest.raises(CollectiveError, match=r"^creating the gloo group tp of ranks \[0, 1, 2, 3\]: .+"):
            mesh.get_group("tp")


# No process group


def test_no_process_group() -> None:
    mesh = ProcessGroupMesh(dp=1, pp=1, tp=1)
    assert mesh.rank == 0 and mesh.size() == 1 and mesh.coordinate() == (0, 0, 0)
    assert mesh.get_group("tp") is None and mesh["pp", "tp"].get_group("pp") is None
    assert mesh.get_ranks_in_group(None) == (0,)
    assert mesh.neighbour("pp", 1) is None
    assert mesh.describe() == "dp=1 × pp=1 × tp=1 (rank 0 at dp 0, pp 0, tp 0)"
    assert repr(ProcessGroupMesh(1, 1)) == "ProcessGroupMesh(axis0=1, axis1=1)"
    mesh.destroy()
    mesh.destroy()
    with pytest.raises(RuntimeError, match="destroyed"):
        mesh.get_group("tp")


@pytest.mark.parametrize("size", [0, -2, True, 1.0, "1", None])
def test_a_bad_size_names_axis_and_number(size: object) -> None:
    with pytest.raises(ValueError, match=f"axis 'tp' has size {size!r}: a size is an integer of at least 1"):
        ProcessGroupMesh(dp=1, tp=size)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="axis 'axis1'"):
        ProcessGroupMesh(1, size)  # type: ignore[arg-type]


def test_sizes_by_position_or_by_name() -> None:
    for sizes, named_sizes in [((), {}), ((1,), {"tp": 1})]:
        with pytest.raises(ValueError, match="by position or by name"):
            ProcessGroupMesh(*sizes, **named_sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sizes", "world_size", "message"),
    [
        (
            {"dp": 2, "tp": 4},
            4,
            "mesh dp=2 × tp=4 needs 8 ranks, but the process group has 4: start 8 ranks, or use dp=1 or tp=2",
        ),
        (
            {"dp": 3, "tp": 3},
            4,
            "mesh dp=3 × tp=3 needs 9 ranks, but the process group has 4: start 9 ranks, or use sizes whose product "
            "is 4",
        ),
        ({"tp": 2}, None, "mesh tp=2 needs 2 ranks, but there is no process group: start 2 ranks, or use tp=1"),
    ],
)
def test_a_product_that_is_not_the_world(sizes: dict[str, int], world_size: int | None, message: str) -> None:
    with pytest.raises(ValueError) as error:
        check_sizes(sizes, world_size)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("sizes", "hosts", "warning"),
    [
        ({"pp": 2, "tp": 2}, "aabb", None),
        ({"pp": 4, "tp": 1}, "abcd", None),
        ({"tp": 4}, "aaaa", None),
        (
            {"tp": 4},
            "aabb",
            "tp_size=4 spans 2 hosts: ranks 0-3 are on a (2) and b (2); tp wants one host: use tp_size=2",
        ),
        (
            {"pp": 2, "tp": 4},
            "aaaaaabb",
            "tp_size=4 spans 2 hosts: ranks 4-7 are on a (2) and b (2), and so for 1 of 2 tp groups; "
            "tp wants one host: use tp_size=2",
        ),
        (
            {"pp": 2, "tp": 2},
            "abab",
            "tp_size=2 spans 2 hosts: ranks 0-1 are on a (1) and b (1), and so for 2 of 2 tp groups; "
            "tp wants one host: number the ranks host by host with tp as the last axis",
        ),
        (
            {"tp": 2, "pp": 2},
            "aabb",
            "tp_size=2 spans 2 hosts: ranks 0, 2 are on a (1) and b (1), and so for 2 of 2 tp groups; "
            "tp wants one host: number the ranks host by host with tp as the last axis",
        ),
        (
            {"dp": 3, "tp": 2},
            "aaabbb",
            "tp_size=2 spans 2 hosts: ranks 2-3 are on a (1) and b (1), and so for 1 of 3 tp groups; "
            "tp wants one host: use tp_size=3",
        ),
    ],
)
def test_topology(sizes: dict[str, int], hosts: str, warning: str | None) -> None:
    assert check_topology(sizes, "tp", list(hosts)) == warning


def test_topology_wants_a_host_for_each_rank() -> None:
    with pytest.raises(ValueError, match="needs 4 ranks"):
        check_topology({"tp": 4}, "tp", ["a", "b"])
