"""Reading slices of checkpoints, and saying what is wrong with them."""

import json
import os
import pickle
import random
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from meshlm import InferenceConfig, InferenceEngine, InferenceShardformer, ProcessGroupMesh
from meshlm.kernels import select_ops
from meshlm.mesh import Communicator
from meshlm.policies import Dim, TensorSpec
from meshlm.shardformer import CheckpointError, open_checkpoint, weights
from meshlm.shardformer.embedding import VocabParallelHead
from meshlm.shardformer.linear import ParallelLinear, Slices
from meshlm.shardformer.shard import Range, Shards, split_layers
from meshlm.shardformer.sources import ModuleSource, MXFP4Source, SafetensorsSource, mxfp4
from meshlm.shardformer.sources import safetensors as safetensors_source
from meshlm.shardformer.stage import PipelineStage
from meshlm.shardformer.weights import Piece, WeightSource
from tiny import SIZES, llama_config, make_llama


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_llama().save_pretrained(path)
    return path


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


# ---- slices ---------------------------------------------------------------------------------------------------------

RANGES: list[tuple[Range, Range]] = [
    ((0, 7), (0, 5)),
    ((2, 6), (0, 5)),
    ((0, 7), (1, 4)),
    ((3, 4), (4, 5)),
    ((6, 7), (0, 1)),
    ((2, 2), (0, 5)),
]


@pytest.mark.parametrize("staging", [8 << 20, 1, 24])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_slice_in_any_dtype(
    stored: torch.dtype, wanted: torch.dtype, staging: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_source, "_STAGING_BYTES", staging)
    matrix, vector = torch.randn(7, 5).to(stored), torch.randn(11).to(stored)
    save_file({"other": torch.ones(3), "matrix": matrix, "vector": vector}, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    assert source.shapes == {"other": (3,), "matrix": (7, 5), "vector": (11,)}
    for rows, columns in RANGES:
        out = torch.full((rows[1] - rows[0], columns[1] - columns[0]), float("nan"), dtype=wanted)
        before = source.bytes_read
        source.read("matrix", (rows, columns), out)
        assert torch.equal(out, matrix[slice(*rows), slice(*columns)].to(wanted))
        assert source.bytes_read - before == out.numel() * stored.itemsize, "nothing but the slice is read"
    for start, stop in ((0, 11), (4, 9), (10, 11)):
        out = torch.full((stop - start,), float("nan"), dtype=wanted)
        source.read("vector", ((start, stop),), out)
        assert torch.equal(out, vector[start:stop].to(wanted))
    source.close()


@pytest.mark.parametrize("staging", [8 << 20, 8, 60])
@pytest.mark.parametrize("shape", [(), (7,), (6, 5), (4, 3, 5)])
def test_a_slice_goes_into_any_box_of_a_parameter(
    shape: tuple[int, ...], staging: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of up to three dims, whatever the strides and the dtype, and no other element is touched."""
    monkeypatch.setattr(safetensors_source, "_STAGING_BYTES", staging)
    tensor, generator = torch.randn(shape), random.Random(0)
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    for _ in range(40):
        ranges = tuple((n := generator.randrange(size), generator.randint(n, size)) for size in shape)
        around = [stop - start + generator.randrange(3) for start, stop in ranges]
        order = generator.sample(range(len(shape)), len(shape))  # of the parameter's dims in memory
        dtype = generator.choice([torch.float32, torch.bfloat16])
        whole = torch.zeros([around[dim] for dim in order], dtype=dtype).permute(
            [order.index(dim) for dim in range(len(shape))]
        )
        box = tuple(slice(length - (stop - start), None) for length, (start, stop) in zip(around, ranges, strict=True))
        expected = torch.zeros_like(whole)
        expected[box] = tensor[tuple(slice(*r) for r in ranges)].to(dtype)
        before = source.bytes_read
        source.read("w", ranges, whole[box])
        assert torch.equal(whole, expected)
        assert source.bytes_read - before == 4 * whole[box].numel()


def test_what_lies_together_is_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(4, 3, 5)
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    calls: list[int] = []
    monkeypatch.setattr(
        safetensors_source.os, "preadv", lambda *args, old=os.preadv: (calls.append(len(args[1][0])), old(*args))[1]
    )
    for ranges, parameter, expected in (
        (((1, 3), (0, 3), (0, 5)), torch.empty(2, 3, 5), [2 * 3 * 5 * 4]),
        (((1, 3), (1, 3), (0, 5)), torch.empty(2, 2, 5), [2 * 5 * 4] * 2),
        (((1, 3), (0, 3), (0, 5)), torch.empty(2, 7, 5)[:, 2:5], [3 * 5 * 4] * 2),
        (((1, 2), (1, 3), (2, 4)), torch.empty(1, 2, 2), [2 * 4] * 2),
    ):
        calls.clear()
        source.read("w", ranges, parameter)
        assert calls == expected
        assert torch.equal(parameter, tensor[tuple(slice(*r) for r in ranges)])


def test_sources_can_be_pickled_and_closed(tmp_path: Path) -> None:
    save_file({"m": torch.arange(6.0)}, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    out = torch.empty(6)
    source.read("m", ((0, 6),), out)
    copied = pickle.loads(pickle.dumps(source))
    source.close()
    for each in (copied, source):
        out.zero_()
        each.read("m", ((0, 6),), out)
        assert torch.equal(out, torch.arange(6.0))
        each.close()


def test_a_sharded_directory_is_one_checkpoint(tmp_path: Path) -> None:
    model = make_llama()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    source = open_checkpoint(tmp_path).source
    assert set(source.shapes) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        out = torch.empty(tensor.shape)
        source.read(name, tuple((0, n) for n in tensor.shape), out)
        assert torch.equal(out, tensor)


def test_a_module_source_saves_what_it_holds(tmp_path: Path) -> None:
    model = make_llama()
    source = ModuleSource(model)
    source.save(str(tmp_path / "model.safetensors"), ["model.norm.weight", "lm_head.weight"])
    stored = load_file(tmp_path / "model.safetensors")
    assert set(stored) == {"model.norm.weight", "lm_head.weight"}
    out = torch.empty(2, 36, dtype=torch.bfloat16)
    source.read("lm_head.weight", ((3, 5), (0, 36)), out)
    assert torch.equal(out, model.lm_head.weight[3:5].bfloat16())


# ---- completeness ---------------------------------------------------------------------------------------------------


class Recorder(WeightSource):
    """Fills with ones, and counts how often each element of each tensor was asked for."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.counts = {name: torch.zeros(shape, dtype=torch.int) for name, shape in shapes.items()}

    def read(self, name: str, ranges: tuple[Range, ...], out: Tensor) -> None:
        assert out.shape == tuple(stop - start for start, stop in ranges)
        self.counts[name][tuple(slice(*r) for r in ranges)] += 1
        out.add_(1)


class FakeRank:
    """Enough of a communicator to build a stage with: its place among tp ranks."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 1), (2, 1), (3, 2), (1, 3), (4, 1), (9, 1)])
def test_every_element_is_read_by_whoever_holds_it_and_filled_once(
    tp_size: int, pp_size: int, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (ParallelLinear, VocabParallelHead):  # their `bind` lets plain weights go
        monkeypatch.setattr(module, "bind", lambda self: None)
    # The recorder adds 1 to what it fills.
    monkeypatch.setattr(weights, "_unfilled", lambda blank, device: torch.zeros_like(blank, device=device))
    model = make_llama(tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    spec = open_checkpoint(model).spec
    shards = Shards(spec, tp_size)
    recorder = Recorder(spec.shapes())
    device = torch.device("cpu")
    for layers in split_layers(spec, pp_size):
        for rank in range(tp_size):
            tp: Any = FakeRank(rank, tp_size)
            stage = PipelineStage(
                spec,
                layers,
                Slices(shards, tp, torch.float32),
                select_ops(device, torch.float32),
                backend="auto",
                max_model_len=8,
                device=device,
            )
            held = weights.load_weights(stage, recorder, device)
            assert held == sum(parameter.numel() * parameter.element_size() for parameter in stage.parameters())
            assert all(torch.all(parameter == 1) for parameter in stage.parameters()), "each element filled once"
    tensors = {tensor.name: tensor for tensor in spec.tensors()}
    for name, counts in recorder.counts.items():
        copies = _copies(tensors[name], shards)
        if tied and name == "model.embed_tokens.weight" and pp_size > 1:
            copies = copies * 2
        assert torch.equal(counts, copies.expand_as(counts).int()), name


def _copies(tensor: TensorSpec, shards: Shards) -> Tensor:
    """How many ranks hold each element along the split dim."""
    for axis, (dim, size) in enumerate(zip(tensor.dims, tensor.shape, strict=True)):
        if dim is not Dim.HIDDEN:
            held = Counter(i for rank in range(shards.tp_size) for i in range(*shards.range(dim, size, rank)))
            column = torch.tensor([held[i] for i in range(len(held))])
            return column if len(tensor.dims) == 1 else column.unsqueeze(1 - axis)
    return torch.tensor(shards.tp_size)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_stage_holds_the_checkpoint(
    tied: bool, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (ParallelLinear, VocabParallelHead):  # their `bind` lets plain weights go
        monkeypatch.setattr(module, "bind", lambda self: None)
    model = make_llama(tie_word_embeddings=tied, attention_bias=True)
    model.save_pretrained(tmp_path)
    mesh = ProcessGroupMesh(dp=1, pp=1, tp=1)
    for given in (tmp_path, str(tmp_path), model):
        stage = InferenceShardformer(InferenceConfig(dtype=dtype, device="cpu"), mesh).optimize(given)
        state = model.to(getattr(torch, dtype)).state_dict()
        attention = stage.layers[1].attention
        parts = [f"model.layers.1.self_attn.{p}_proj" for p in "qkv"]
        assert torch.equal(attention.qkv.weight, torch.cat([state[f"{p}.weight"] for p in parts]))
        assert torch.equal(attention.qkv.bias, torch.cat([state[f"{p}.bias"] for p in parts]))
        assert torch.equal(attention.out.weight, state["model.layers.1.self_attn.o_proj.weight"])
        assert stage.embedding is not None
        assert torch.equal(stage.embedding.tokens.weight, state["model.embed_tokens.weight"])
        assert torch.equal(stage.head.linear.weight, state["lm_head.weight"])
        assert (stage.head.linear.weight is stage.embedding.tokens.weight) == tied
        assert all(not p.is_meta and not p.requires_grad for p in stage.parameters())
        model.float()


class Whole(WeightSource):
    """Tensors in memory."""

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors

    def read(self, name: str, ranges: tuple[Range, ...], out: Tensor) -> None:
        out.copy_(self.tensors[name][tuple(slice(*r) for r in ranges)])


def load_one(shape: tuple[int, ...], pieces: list[Piece], source: WeightSource) -> Tensor:
    module = weights.LoadedModule()
    module.weight = torch.nn.Parameter(torch.zeros(shape), requires_grad=False)
    module.pieces = {"weight": pieces}
    weights.load_weights(module, source, torch.device("cpu"))
    return module.weight.data


def test_pieces_fill_boxes_and_transposed_ones() -> None:
    gate, down, experts = torch.randn(6, 4), torch.randn(4, 6), torch.randn(3, 2, 5)
    source = Whole(gate=gate, down=down, experts=experts)
    pieces = [
        Piece("gate", ((1, 3), (0, 4)), (0, 0)),
        Piece("down", ((1, 4), (2, 4)), (0, 4), transposed=True),
        Piece("gate", ((0, 1), (0, 4)), (2,)),
        Piece("down", ((0, 1), (0, 3)), (2, 4)),
    ]
    expected = torch.cat([torch.cat([gate[1:3], gate[:1]]), torch.cat([down[1:4, 2:4].T, down[:1, :3]])], dim=1)
    assert torch.equal(load_one((3, 7), pieces, source), expected)
    pieces = [Piece("experts", ((e, e + 1), (r, r + 1), (1, 5)), (e, 1 - r)) for e in range(3) for r in range(2)]
    assert torch.equal(load_one((3, 2, 4), pieces, source), experts.flip(1)[:, :, 1:])


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [Piece("a", ((0, 3), (0, 2)))],
        [Piece("a", ((0, 2), (0, 2))), Piece("a", ((1, 4), (0, 2)), (1,))],
        [Piece("a", ((0, 4), (0, 1)))],
        [Piece("a", ((0, 4), (0, 1))), Piece("a", ((0, 4), (0, 1)), (0, 2))],
        [Piece("a", ((0, 4), (0, 2)), (1,))],
        [Piece("a", ((0, 4), (0, 1))), Piece("a", ((0, 4), (0, 1)))],
        [Piece("a", ((0, 4), (0, 2))), Piece("a", ((0, 1), (0, 1)))],
        [Piece("a", ((0, 4), (0, 2)), transposed=True)],
        [Piece("a", ((0, 4),)), Piece("a", ((0, 4),))],
    ],
    ids=str,
)
def test_pieces_that_do_not_tile_a_parameter_are_caught(pieces: list[Piece]) -> None:
    with pytest.raises(AssertionError):
        load_one((4, 2), pieces, Recorder({"a": (4, 2)}))


def test_a_parameter_without_pieces_is_caught() -> None:
    module = weights.LoadedModule()
    module.weight = torch.nn.Parameter(torch.zeros(4, 2), requires_grad=False)
    module.pieces = {}
    with pytest.raises(AssertionError, match="nothing fills"):
        weights.load_weights(module, Recorder({}), torch.device("cpu"))


def test_communicator_of_one_reduces_nothing() -> None:
    """What the tests of this folder rely on: a world of one needs no process group."""
    assert Communicator.along(ProcessGroupMesh(dp=1, pp=1, tp=1), "tp").size == 1


# ---- faults ---------------------------------------------------------------------------------------------------------


def fault(path: Path) -> str:
    with pytest.raises(ValueError) as error:
        open_checkpoint(path)
    message = str(error.value)
    assert "\n" not in message
    return message


def edit_config(path: Path, **values: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "nowhere"
    assert fault(path) == (
        f"model: {path} does not exist; expected a directory with config.json and *.safetensors, or a GGUF file"
    )


def test_no_config(copy: Path) -> None:
    (copy / "config.json").unlink()
    assert fault(copy) == f"{copy}: holds no config.json"


def test_a_config_that_is_not_json(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    assert fault(copy).startswith(f"{copy / 'config.json'}: not JSON: Expecting property name")


def test_a_config_that_is_no_table(copy: Path) -> None:
    (copy / "config.json").write_text("[]")
    assert str(copy / "config.json") in fault(copy)


def test_a_config_that_transformers_refuses(copy: Path) -> None:
    edit_config(copy, model_type="no-such-thing")
    assert fault(copy).startswith(f"{copy / 'config.json'}: ")


@pytest.mark.parametrize(
    ("architectures", "named"),
    [
        (["LamaForCausalLM"], "architecture LamaForCausalLM is not supported; nearest supported: LlamaForCausalLM"),
        ([], "config.json names no architecture"),
        (None, "config.json names no architecture"),
    ],
)
def test_an_architecture_that_is_not_supported(copy: Path, architectures: Any, named: str) -> None:
    edit_config(copy, architectures=architectures)
    assert fault(copy).startswith(named)


def test_an_activation_that_is_not_supported(copy: Path) -> None:
    edit_config(copy, hidden_act="xielu")
    message = fault(copy)
    assert message.startswith(f"{copy}: activation 'xielu' is not supported; supported: ") and "silu" in message


def test_no_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    assert fault(copy) == f"{copy}: holds no *.safetensors file (and no model.safetensors.index.json)"


def test_missing_tensors_are_named(copy: Path) -> None:
    rewrite(copy, lambda tensors: [tensors.pop(f"model.layers.1.mlp.{n}_proj.weight") for n in ("up", "down")])
    assert fault(copy) == (
        f"{copy}: missing tensors: model.layers.1.mlp.up_proj.weight, model.layers.1.mlp.down_proj.weight"
    )


def test_extra_tensors_are_named(copy: Path) -> None:
    rewrite(copy, lambda tensors: tensors.update({"model.layers.9.extra": torch.ones(2)}))
    assert fault(copy) == f"{copy}: tensors that the model does not have: model.layers.9.extra"


def test_misshapen_tensors_are_named_with_both_shapes(copy: Path) -> None:
    rewrite(copy, lambda tensors: tensors.update({"model.norm.weight": torch.ones(35)}))
    assert fault(copy) == f"{copy}: tensors of another shape: model.norm.weight has shape [35] instead of [36]"


def test_all_faults_at_once_and_not_too_many_names(copy: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".layers.2." in name]:
            tensors["x." + name] = tensors.pop(name)
        tensors["model.norm.weight"] = torch.ones(1)

    rewrite(copy, spoil)
    message = fault(copy)
    assert message.startswith(f"{copy}: missing tensors: model.layers.2.")
    assert " and 1 more; tensors of another shape: model.norm.weight" in message
    assert message.endswith("and 1 more")


def test_left_over_rotary_frequencies_are_knowingly_ignored(copy: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(copy, lambda tensors: tensors.update({name: torch.ones(2)}))
    open_checkpoint(copy)


def test_a_tied_model_may_hold_its_head_and_an_untied_one_must(saved: Path, tmp_path: Path) -> None:
    make_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    open_checkpoint(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert set(open_checkpoint(tmp_path).source.shapes) == set(open_checkpoint(saved).source.shapes) - {
        "lm_head.weight"
    }
    rewrite(tmp_path, lambda tensors: tensors["lm_head.weight"][100, 35].add_(1))
    assert fault(tmp_path) == (
        f"{tmp_path}: tensors lm_head.weight and model.embed_tokens.weight differ, though the config ties them "
        f"(tie_word_embeddings); if both are meant, set it to false in config.json"
    )
    rewrite(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    edit_config(tmp_path, tie_word_embeddings=False)
    assert fault(tmp_path) == f"{tmp_path}: missing tensors: lm_head.weight"


@pytest.mark.parametrize("keep", [0, 4, 9, 100, -1])
def test_a_truncated_file_is_named(copy: Path, keep: int) -> None:
    file = copy / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    message = fault(copy)
    assert message.startswith(f"{file}: truncated")
    if keep == -1:
        assert message.endswith(f"ends at byte {len(data)} of a file of {len(data) - 1}")


def header_file(file: Path, header: Any, data: bytes = b"") -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"{not json at all", "not a safetensors file"),
        (b"\xff\xfe\xfd\xfc", "not a safetensors file"),
        ([1, 2, 3], "not a safetensors file"),
        ({"w": 3}, "not a safetensors file"),
        ({"w": {"dtype": "F32", "shape": [2]}}, "not a safetensors file"),
        ({"w": {**GOOD, "data_offsets": [0, 4]}}, "tensor w"),
        ({"w": {**GOOD, "data_offsets": [4, 0]}}, "tensor w"),
        ({"w": {**GOOD, "data_offsets": [-8, 0]}}, "tensor w"),
        ({"w": {**GOOD, "shape": "2"}}, "not a safetensors file"),
        ({"w": {**GOOD, "dtype": "F8_E4M3", "data_offsets": [0, 2]}}, "tensor w has dtype F8_E4M3; supported: F64"),
    ],
)
def test_a_wrong_header_is_named(tmp_path: Path, header: Any, words: str) -> None:
    file = tmp_path / "model.safetensors"
    header_file(file, header, b"\0" * 8)
    with pytest.raises(CheckpointError) as error:
        SafetensorsSource(tmp_path)
    assert str(error.value).startswith(f"{file}: ") and words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(8)}, file)
    source = SafetensorsSource(tmp_path)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="while its header promised more"):
        source.read("w", ((0, 8),), torch.empty(8))


def test_a_shard_that_the_index_names_is_missing(tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path, max_shard_size="20KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    assert fault(tmp_path) == f"{tmp_path}: missing {gone.name}, named in model.safetensors.index.json"


@pytest.mark.parametrize("index", ["{", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1, "b": "c"}}'])
def test_an_index_that_is_none(copy: Path, index: str) -> None:
    file = copy / "model.safetensors.index.json"
    file.write_text(index)
    assert fault(copy).startswith(f"{file}: not an index of weights: ")


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path, max_shard_size="20KB")
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    save_file({**load_file(second), name: torch.zeros(3)}, second, {"format": "pt"})
    assert fault(tmp_path) == f"{tmp_path}: tensor {name} is in two files: {first} and {second}"
    (tmp_path / "model.safetensors.index.json").unlink()  # all files in the folder are read then
    assert fault(tmp_path) == f"{tmp_path}: tensor {name} is in two files: {first} and {second}"


def test_an_index_that_does_not_say_where_tensors_are_is_refused(tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path, max_shard_size="20KB")
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    name = next(iter(load_file(first)))
    for changes, expected in (
        ({name: second.name}, f"tensor {name} is said to be in {second}, but is in {first}"),
        ({"ghost": second.name}, f"tensor ghost is said to be in {second}, but is in no file that it names"),
    ):
        file.write_text(json.dumps({"weight_map": {**index["weight_map"], **changes}}))
        assert fault(tmp_path) == f"{file}: {expected}"
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path)


def test_heads_that_are_rotated_in_part_are_refused(copy: Path) -> None:
    file = copy / "config.json"
    rope = json.loads(file.read_text())["rope_parameters"]
    edit_config(copy, rope_parameters={**rope, "partial_rotary_factor": 0.5})
    assert fault(copy) == (
        "LlamaForCausalLM with a rotary embedding of 2 of each head's 4 elements is not supported; head_dim must be "
        "even and partial_rotary_factor 1"
    )


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "bitsandbytes"])
def test_quantised_checkpoints_are_refused_before_their_tensors_are_compared(copy: Path, method: str) -> None:
    edit_config(copy, quantization_config={"quant_method": method, "bits": 4})
    (copy / "model.safetensors").unlink()
    assert fault(copy) == (
        f"{copy / 'config.json'}: weights quantised by {method} (quantization_config) are not supported; use the model "
        f"in bfloat16, float16 or float32"
    )


def test_mxfp4_experts_are_what_transformers_makes_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    monkeypatch.setattr(mxfp4, "_ROWS", 5)
    torch.manual_seed(0)
    blocks = torch.randint(256, (3, 14, 4, 16), dtype=torch.uint8)
    scales = torch.randint(110, 140, (3, 14, 4), dtype=torch.uint8)
    bias = torch.randn(3, 14)
    save_file({"w_blocks": blocks, "w_scales": scales, "bias": bias}, tmp_path / "model.safetensors")
    whole = convert_moe_packed_tensors(blocks.clone(), scales.clone())
    source = pickle.loads(pickle.dumps(MXFP4Source(SafetensorsSource(tmp_path))))
    assert source.shapes == {"bias": (3, 14), "w": tuple(whole.shape)} and source.dtype == "float32"
    for ranges in (((0, 3), (0, 128), (0, 14)), ((1, 2), (32, 64), (3, 4)), ((0, 2), (40, 99), (2, 13))):
        before, out = source.bytes_read, torch.full([stop - start for start, stop in ranges], float("nan"))
        source.read("w", ranges, out)
        assert torch.equal(out, whole[tuple(slice(*r) for r in ranges)].float())
        groups = -(-ranges[1][1] // 32) - ranges[1][0] // 32
        assert source.bytes_read - before == out.shape[0] * out.shape[2] * groups * 17
    out = torch.empty(1, 14)
    source.read("bias", ((2, 3), (0, 14)), out)
    assert torch.equal(out, bias[2:])


# ---- pickles --------------------------------------------------------------------------------------------------------


def save_config(model: LlamaForCausalLM, folder: Path) -> None:
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)


def pickled(model: LlamaForCausalLM, folder: Path, shards: int = 1, legacy: bool = False) -> Path:
    """The model as .bin files, tied weights in them twice."""
    save_config(model, folder)
    items = list(model.state_dict().items())
    if shards == 1:
        torch.save(dict(items), folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        return folder
    index = {name: f"pytorch_model-{i % shards + 1:05}-of-{shards:05}.bin" for i, (name, _) in enumerate(items)}
    for file in set(index.values()):
        torch.save({name: tensor for name, tensor in items if index[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


@pytest.mark.parametrize(("shards", "legacy"), [(1, False), (3, False), (1, True)])
@pytest.mark.parametrize("tied", [False, True])
def test_pickles_are_read_where_they_are_allowed(tied: bool, shards: int, legacy: bool, tmp_path: Path) -> None:
    model = make_llama(tie_word_embeddings=tied)
    pickled(model, tmp_path, shards, legacy)
    torch.save({"lr": 0.1}, tmp_path / "training_args.bin")
    first = min(tmp_path.glob("pytorch_model*.bin")).name
    assert fault(tmp_path) == (
        f"{tmp_path}: its weights are only in {first}, a pickle, and reading one can execute code from it; if you "
        f"trust it, set InferenceConfig.allow_pickle=True"
    )
    source = pickle.loads(pickle.dumps(open_checkpoint(tmp_path, allow_pickle=True).source))
    assert set(source.shapes) == set(model.state_dict()) - ({"lm_head.weight"} if tied else set())
    for name, shape in source.shapes.items():
        ranges = tuple((n // 3, n - n // 4) for n in shape)
        out = torch.full([stop - start for start, stop in ranges], float("nan"), dtype=torch.bfloat16)
        source.read(name, ranges, out)
        assert torch.equal(out, model.state_dict()[name][tuple(slice(*r) for r in ranges)].bfloat16())
    source.close()


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_executes_nothing_even_where_it_is_allowed(
    legacy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_llama()
    save_config(model, tmp_path)
    file = tmp_path / "pytorch_model.bin"
    torch.save({**model.state_dict(), "x": Evil()}, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path, allow_pickle=True)
    assert str(error.value).startswith(f"{file}: not a pickle of tensors alone: ") and "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


def test_safetensors_are_preferred_to_pickles(copy: Path) -> None:
    (copy / "pytorch_model.bin").write_bytes(b"not one")
    open_checkpoint(copy, allow_pickle=True)


@pytest.mark.parametrize("content", [b"", b"not one", b"PK\3\4"])
def test_a_pickle_that_is_none(copy: Path, content: bytes) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: "):
        open_checkpoint(copy, allow_pickle=True)


# ---- code of the checkpoint's own -----------------------------------------------------------------------------------


def test_code_that_a_checkpoint_brings_runs_only_where_it_is_trusted(copy: Path) -> None:
    (copy / "configuration_own.py").write_text("raise SystemExit('executed')")
    edit_config(
        copy,
        architectures=["OwnForCausalLM"],
        model_type="own",
        auto_map={"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
    )
    assert fault(copy) == (
        f"architecture OwnForCausalLM is code that {copy} brings (auto_map in config.json); it runs only with "
        f"InferenceConfig.trust_remote_code=True"
    )
    with pytest.raises(SystemExit, match="executed"):
        open_checkpoint(copy, trust_remote_code=True)
    edit_config(copy, architectures=["LlamaForCausalLM"], model_type="llama")
    open_checkpoint(copy, trust_remote_code=True)  # ours: theirs is not needed


# ---- GGUF -----------------------------------------------------------------------------------------------------------


def write_gguf(file: Path, *tensors: str, architecture: str = "llama", **metadata: str | float) -> Path:
    """A model that lacks most of its tensors; `metadata` by the name after "llama.", dots written as "__"."""
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(file, architecture)
    writer.add_context_length(64)
    writer.add_block_count(1)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(4)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(11)
    for name, value in metadata.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add("llama." + name.replace("__", "."), value)
    for tensor in ("output_norm.weight", *tensors):
        writer.add_tensor(tensor, np.ones(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_gguf_file_with_the_rope_factors_of_llama_3_1_is_refused(tmp_path: Path) -> None:
    plain, scaled = write_gguf(tmp_path / "plain.gguf"), write_gguf(tmp_path / "scaled.gguf", "rope_freqs.weight")
    assert fault(plain).startswith(f"{plain}: missing tensors: ")  # read, but for what it lacks
    assert fault(scaled) == (
        f"{scaled}: rope_freqs.weight (the RoPE factors of Llama 3.1 and later) is not supported: transformers reads "
        f"rope_theta alone from a GGUF file, and the tokens would be wrong; use the safetensors directory"
    )


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, None),
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 1.0}, None),
        ({"rope__scaling__type": "linear"}, None),
        ({"rope__scaling__factor": 0.0, "rope__scaling__attn_factor": 1.0}, None),
        (
            {"rope__scaling__type": "linear", "rope__scaling__factor": 2.0},
            "llama.rope.scaling.type='linear', llama.rope.scaling.factor=2.0",
        ),
        (
            {
                "rope__scaling__type": "yarn",
                "rope__scaling__factor": 4.0,
                "rope__scaling__original_context_length": 32.0,
            },
            "llama.rope.scaling.type='yarn', llama.rope.scaling.factor=4.0",
        ),
        ({"rope__scaling__type": "longrope"}, "llama.rope.scaling.type='longrope'"),
        ({"rope__scaling__factor": 2.0}, "llama.rope.scaling.factor=2.0"),
        ({"rope__scale_linear": 2.0}, "llama.rope.scale_linear=2.0"),
        ({"rope__scaling__attn_factor": 0.5}, "llama.rope.scaling.attn_factor=0.5"),
    ],
    ids=str,
)
def test_a_gguf_file_with_scaled_rope_is_refused(
    metadata: dict[str, str | float], named: str | None, tmp_path: Path
) -> None:
    file = write_gguf(tmp_path / "model.gguf", **metadata)
    if named is None:
        assert fault(file).startswith(f"{file}: missing tensors: ")
    else:
        assert fault(file) == (
            f"{file}: {named} (scaled RoPE) is not supported: transformers reads rope_theta alone from a GGUF file, "
            f"and the tokens would be wrong; use the safetensors directory"
        )


def test_gguf_files_of_models_whose_config_they_hold_in_part_are_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", architecture="gemma2")
    assert fault(file) == (
        f"{file}: GGUF files of gemma2 are not supported, only of llama, qwen2, qwen3: transformers reads no more than "
        f"a part of other models' configs; use the safetensors directory"
    )


@pytest.mark.parametrize("head_dim", [128, 16])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_a_gguf_file_of_another_family(architecture: str, head_dim: int, tmp_path: Path) -> None:
    """Read as it is; or refused, where transformers does not read its head size."""
    import gguf

    sizes = {**SIZES, "hidden_size": 2 * head_dim, "num_attention_heads": 2, "num_key_value_heads": 1}
    extra = {"head_dim": head_dim} if architecture == "qwen3" else {}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[architecture](**sizes, **extra))
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", architecture)
    writer.add_context_length(64)
    writer.add_block_count(3)
    writer.add_embedding_length(2 * head_dim)
    writer.add_feed_forward_length(50)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(101)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), 3)
    for name, tensor in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if architecture == "qwen3" and head_dim != 128:
        assert "self_attn.q_proj.weight has shape [32, 32] instead of [256, 32]" in fault(tmp_path / "model.gguf")
        return
    source = open_checkpoint(tmp_path / "model.gguf").source
    for name, tensor in model.state_dict().items():
        out = torch.empty(tensor.shape)
        source.read(name, tuple((0, n) for n in tensor.shape), out)
        assert torch.equal(out, tensor), name


def test_float64_is_read_and_auto_asks_for_a_dtype_to_compute_in(tmp_path: Path) -> None:
    model = make_llama().double()
    model.save_pretrained(tmp_path)
    mesh = ProcessGroupMesh(dp=1, pp=1, tp=1)
    with pytest.raises(ValueError) as error:
        InferenceShardformer(InferenceConfig(device="cpu"), mesh).optimize(tmp_path)
    assert str(error.value) == (
        "dtype='auto': the checkpoint's dtype is float64; choose one of float32, bfloat16, float16"
    )
    stage = InferenceShardformer(InferenceConfig(device="cpu", dtype="float32"), mesh).optimize(tmp_path)
    assert stage.embedding is not None
    assert torch.equal(stage.embedding.tokens.weight, model.model.embed_tokens.weight.float())


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    other, broken = tmp_path / "model.bin", tmp_path / "model.gguf"
    other.write_bytes(b"x")
    broken.write_bytes(b"GGUF\3\0\0\0")
    assert fault(other) == f"model: {other} is neither a directory nor a .gguf file"
    assert fault(broken).startswith(f"{broken}: not a readable GGUF file: ")


def test_a_config_gets_random_weights(tmp_path: Path) -> None:
    """The same on every rank that holds a slice, whole norms, all of the given dtype; on any mesh."""
    checkpoint = open_checkpoint(llama_config(dtype=torch.bfloat16))
    assert checkpoint.name == "LlamaConfig with random weights" and checkpoint.spec.dtype == "bfloat16"
    name, ranges = "model.layers.1.self_attn.q_proj.weight", ((0, 8), (4, 36))
    draws = torch.zeros(3, 8, 32)
    for draw in draws[:2]:
        checkpoint.source.read(name, ranges, draw)
    checkpoint.source.read(name.replace("1", "2"), ranges, draws[2])
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2]) and 0.01 < draws[0].std() < 0.03
    norm = torch.zeros(36)
    checkpoint.source.read("model.norm.weight", ((0, 36),), norm)
    assert torch.equal(norm, torch.ones(36))
    with InferenceEngine(llama_config(), InferenceConfig(device="cpu", num_kv_blocks=8)) as engine:
        (output,) = engine.generate([[1, 2, 3]], {"max_tokens": 5, "temperature": 0}, progress=False)
        assert len(output.token_ids) == 5


def test_modules_that_are_not_for_us() -> None:
    with pytest.raises(
        ValueError, match=r"^model: a int is not a model; expected a path, a transformers module or its"
    ):
        open_checkpoint(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^model: a Linear has no transformers config$"):
        open_checkpoint(torch.nn.Linear(2, 2))
    from transformers import ArceeForSequenceClassification, ArceeModel, BertForMaskedLM, LlamaModel

    with pytest.raises(ValueError, match=r"^architecture LlamaModel is not supported; nearest supported: "):
        open_checkpoint(LlamaModel(llama_config()))
    for kind in (ArceeModel, ArceeForSequenceClassification, BertForMaskedLM):
        with torch.device("meta"):
            model = kind(kind.config_class(is_decoder=True, **SIZES))
        with pytest.raises(
            ValueError, match=rf"^architecture {kind.__name__} is not supported: it cannot generate; nearest "
        ):
            open_checkpoint(model)


@pytest.mark.parametrize("policy", ["auto", "generic"])
def test_modules_are_what_their_config_says(policy: str) -> None:
    model = make_llama(tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # the same numbers
    open_checkpoint(model, policy=policy)
    model.lm_head.weight.data[3, 3] += 1
    with pytest.raises(CheckpointError, match=r"^tensors lm_head.weight and model.embed_tokens.weight differ, though"):
        open_checkpoint(model, policy=policy)

    model = make_llama()
    model.model.layers[1].mlp.act_fn = torch.nn.GELU()
    with pytest.raises(ValueError, match=r"^model: model.layers.1.mlp.act_fn of this LlamaForCausalLM is a GELU; its "):
        open_checkpoint(model, policy=policy)

    own = type("LlamaForCausalLM", (LlamaForCausalLM,), {})  # which may do anything
    with pytest.raises(ValueError, match=r"^model: LlamaForCausalLM is a class of \S+, not of transformers$"):
        open_checkpoint(own(llama_config()), policy=policy)


@pytest.mark.slow  # reads a GGUF file
def test_gguf_is_the_converted_directory_bit_for_bit(demo_model: Path, demo_gguf: Path) -> None:
    directory, gguf = open_checkpoint(demo_model), open_checkpoint(demo_gguf)
    same = {name: getattr(directory.spec, name) == getattr(gguf.spec, name) for name in vars(directory.spec)}
    assert [name for name, equal in same.items() if not equal] in ([], ["dtype"])
    names = ["model.norm.weight", "model.embed_tokens.weight"] + [
        f"model.layers.{i}.{part}.weight"
        for i in (0, 29)
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj", "input_layernorm")
    ]
    source = pickle.loads(pickle.dumps(gguf.source))
    for name in names:
        shape = directory.source.shapes[name]
        assert gguf.source.shapes[name] == shape
        middle = tuple((n // 3, n - n // 4) for n in shape)
        for ranges in (tuple((0, n) for n in shape), middle):
            ours, theirs = (torch.empty([stop - start for start, stop in ranges]) for _ in range(2))
            source.read(name, ranges, ours)
            directory.source.read(name, ranges, theirs)
            assert torch.equal(ours, theirs), name
    source.close()
    directory.source.close()
