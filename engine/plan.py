"""What is decided before anything runs: devices, whether the model can be divided and fits, the size of the cache."""

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch

from ..config import ConfigError, InferenceConfig
from ..policies import ModelSpec
from ..shardformer import Checkpoint, CheckpointError
from ..shardformer.attention import attention_spec
from ..shardformer.backends import BACKENDS, CHOICES, AttentionSpec, why_not
from ..shardformer.shard import Shards, split_layers, stage_bytes
from ..shardformer.shardformer import choose_dtype, max_model_len
from .draft_model import draft_config
from .executor import rank_name
from .kv_cache import available_bytes
from .rank_info import DraftInfo, RankInfo

CPU_KV_FRACTION = 0.25  # of available memory: the machine is somebody's laptop
CUDA_KV_FRACTION = 0.9
_MAX_FAULTS = 3  # told of those that differ between ranks: another model differs in everything


def check_world(config: InferenceConfig, world_size: int) -> None:
    """Under torchrun the mesh must be the world. Raises ConfigError."""
    if config.world_size != world_size:
        sizes = f"dp_size={config.dp_size} × pp_size={config.pp_size} × tp_size={config.tp_size}"
        raise ConfigError(
            f"InferenceConfig: {sizes} make a mesh of {config.world_size} ranks, but torchrun started {world_size}; "
            f"use --nproc-per-node {config.world_size}, or sizes whose product is {world_size}"
        )


def settings(config: InferenceConfig, device: torch.device, checkpoint: Checkpoint) -> dict[str, Any]:
    """What all ranks under torchrun must be given alike, by its name; plain values, for `check_alike`.

    Each rank's timeouts are its own, and so is the number of its device. The weights are told apart by a checksum of
    one row, which is left out where it cannot be read: loading will say why.
    """
    spec, own = checkpoint.spec, ("device", "start_timeout_s", "collective_timeout_s")
    found = {f"InferenceConfig.{name}": value for name, value in config if name not in own}
    found["InferenceConfig.device"] = device.type
    found |= _flat("model", spec.plain())
    found["model.eos_token_id"] = list(checkpoint.eos_token_ids)
    tensor = max(spec.layer_tensors(0), key=lambda tensor: len(tensor.shape))  # a matrix: norms are too much alike
    name, first = tensor.name, tuple((0, 1) for _ in tensor.shape[:-1])
    row = torch.empty(*(1 for _ in first), tensor.shape[-1])
    with suppress(CheckpointError, OSError):
        checkpoint.source.read(name, (*first, (0, tensor.shape[-1])), row)
        found[f"model: checksum of {name}[0]"] = zlib.crc32(row.numpy().tobytes())
    return found


def _flat(name: str, value: Any) -> dict[str, Any]:
    """The plain values in nested dicts and tuples, each by its path."""
    if isinstance(value, dict):
        items = [(f"{name}.{key}", item) for key, item in value.items()]
    elif isinstance(value, tuple):
        items = [(f"{name}[{index}]", item) for index, item in enumerate(value)]
    else:
        return {name: value}
    return {path: plain for key, item in items for path, plain in _flat(key, item).items()}


def check_alike(tables: Sequence[Mapping[str, Any]]) -> None:
    """Raises ConfigError where the ranks' `settings` differ, naming the field, the values and who has which."""
    faults = []
    for name in tables[0]:
        having: dict[str, list[str]] = {}
        for rank, table in enumerate(tables):
            if name in table:
                having.setdefault(repr(table[name]), []).append(str(rank))
        if len(having) > 1:
            told = [
                f"rank {ranks[0]} has {value}" if len(ranks) == 1 else f"ranks {', '.join(ranks)} have {value}"
                for value, ranks in having.items()
            ]
            faults.append(f"{name}: {', '.join(told)}")
    if faults:
        more = f"; more that differ: {len(faults) - _MAX_FAULTS}" if len(faults) > _MAX_FAULTS else ""
        raise ConfigError(f"{'; '.join(faults[:_MAX_FAULTS])}{more}; under torchrun every rank is to be given the same")


def choose_devices(config: InferenceConfig, num_ranks: int) -> list[torch.device]:
    """A device for each of the ranks on one host. Raises ConfigError if the config's is not to be had."""
    count = torch.cuda.device_count()
    if config.device == "cpu" or (config.device == "auto" and count < num_ranks):
        return [torch.device("cpu")] * num_ranks
    index = torch.device(config.device).index if config.device != "auto" else None
    if count == 0 or (index is not None and index >= count):
        raise ConfigError(
            f"InferenceConfig.device: {config.device!r} is not available: torch sees {count} CUDA devices; use 'cpu'"
            + (f" or cuda:0 to cuda:{count - 1}" if count else "")
        )
    if index is not None:
        return [torch.device("cuda", index)] * num_ranks
    if num_ranks > count:
        raise ConfigError(
            f"InferenceConfig.device: 'cuda' has {count} devices for {num_ranks} ranks on this host; use smaller "
            f"sizes of the mesh, or device='cuda:0' to share one (over gloo and slowly: for tests)"
        )
    return [torch.device("cuda", i) for i in range(num_ranks)]


def why_cpu(config: InferenceConfig, num_ranks: int) -> str | None:
    """What `choose_devices` made of CUDA devices that are too few for "auto", in one line; else None."""
    count = torch.cuda.device_count()
    if config.device != "auto" or not 0 < count < num_ranks:
        return None
    devices = "1 CUDA device" if count == 1 else f"{count} CUDA devices"
    return (
        f"device='auto' chose the CPU, since it takes CUDA only with a device for every rank: torch sees {devices} for "
        f"{num_ranks} ranks on this host"
    )


def check_fit(
    config: InferenceConfig,
    spec: ModelSpec,
    devices: Sequence[torch.device],
    first_rank: int = 0,
    draft: ModelSpec | None = None,
) -> None:
    """Proves that the model can be divided so and that its weights fit. Raises ValueError before anything starts.

    devices: those of the ranks on this host, from `first_rank` on, which share its memory; draft: a draft model's spec.
    """
    if config.async_scheduling and config.pp_size > 1 and any(device.type == "cuda" for device in devices):
        raise ConfigError(
            f"InferenceConfig.async_scheduling: True needs pp_size=1 on GPUs, and pp_size={config.pp_size}: "
            f"that many steps run at once"
        )
    needed, which = _weight_bytes(config, spec, devices, first_rank), "the model"
    if draft is not None:
        needed, which = needed + _draft_bytes(config, draft, devices, first_rank), "the model with its draft model"
    _check_weights(config, spec, needed, which)


def check_draft(config: InferenceConfig, draft: ModelSpec, devices: Sequence[torch.device]) -> None:
    """The same for a draft model beside a target that is there already. devices: of the ranks on this host."""
    _check_weights(config, draft, _draft_bytes(config, draft, devices, 0), "the draft model")


def _check_weights(config: InferenceConfig, spec: ModelSpec, needed: Counter[torch.device], which: str) -> None:
    for device, size in needed.items():
        free = available_bytes(device)
        if size > free:
            raise ConfigError(
                f"{which} does not fit: its weights take {_gib(size)} on {device} and {_gib(free)} is free, "
                f"{_gib(size - free)} is missing; use more ranks on other devices "
                f"(tp_size={config.tp_size}, pp_size={config.pp_size} now) or a smaller dtype "
                f"({choose_dtype(config, spec)} now)"
            )


def _draft_bytes(
    config: InferenceConfig, draft: ModelSpec, devices: Sequence[torch.device], first_rank: int
) -> Counter[torch.device]:
    """As `_weight_bytes`, of a draft model on the target's mesh."""
    try:
        return _weight_bytes(draft_config(config, draft, config.block_size), draft, devices, first_rank)
    except ValueError as error:
        raise ConfigError(f"SpeculativeConfig.model: the draft model does not go with this mesh: {error}") from error


def _weight_bytes(
    config: InferenceConfig, spec: ModelSpec, devices: Sequence[torch.device], first_rank: int
) -> Counter[torch.device]:
    """Of the ranks on each device. Raises ValueError if the model cannot be divided so, or run there."""
    shards, stages = Shards(spec, config.tp_size, config.expert_parallel), split_layers(spec, config.pp_size)
    dtype = choose_dtype(config, spec)
    if not runs_on(dtype, devices[0]):
        raise ConfigError(f"InferenceConfig.dtype: {dtype} is not supported on {devices[0]}; use 'float32'")
    max_model_len(config, spec)
    check_backend_name("InferenceConfig.attention_backend", config.attention_backend)
    needed: Counter[torch.device] = Counter()
    for rank, device in enumerate(devices, first_rank):
        _, rest = divmod(rank, config.pp_size * config.tp_size)
        stage, tp_rank = divmod(rest, config.tp_size)
        for kind in set(spec.attention_kinds[slice(*stages[stage])]):
            _check_backend(config, attention_spec(kind, shards, tp_rank, dtype, device, config.block_size))
        needed[device] += stage_bytes(spec, shards, stages[stage], tp_rank, dtype.itemsize)
    return needed


def look_ahead(config: InferenceConfig, ranks: Sequence[RankInfo]) -> bool:
    """Whether steps are scheduled before the tokens of the one before are known.

    The driver's work hides behind a GPU's then, or behind other processes'. One rank on a CPU has nothing to hide it
    behind, and would compute one token too many for each sequence that a stop token ends. The last of several stages on
    GPUs does not tell the first what it draws: NCCL's sends wait for who receives.
    """
    is_gpu = any(rank.device.startswith("cuda") for rank in ranks)
    if config.async_scheduling is not None:
        return config.async_scheduling
    return config.pp_size == 1 if is_gpu else config.world_size > 1


def check_backend_name(where: str, name: str) -> None:
    """Raises ConfigError if no attention backend is called so."""
    known = (*CHOICES, *BACKENDS)
    if name not in known:
        raise ConfigError(f"{where}: {name!r} is not known; known: {', '.join(known)}")


def _check_backend(config: InferenceConfig, asked: AttentionSpec) -> None:
    """Raises ConfigError if the attention backend that the config names cannot serve a rank's layers."""
    name = config.attention_backend
    reason = None if name in CHOICES else why_not(name, asked)
    if reason is not None:
        raise ConfigError(f"InferenceConfig.attention_backend: {name!r} cannot serve here: {reason}")


def runs_on(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device computes in a dtype: tried, not looked up."""
    try:
        x = torch.ones(2, 2, dtype=dtype, device=device)
        torch.nn.functional.linear(x, x).sum().item()
        emulated = device.type == "cuda" and dtype is torch.bfloat16
        return not emulated or torch.cuda.get_device_capability(device) >= (8, 0)
    except RuntimeError:
        return False


class RankRoom(Protocol):
    """What is to be known of a rank to find room for its cache: of a `RankInfo`, or of one that is only planned."""

    @property
    def rank(self) -> int: ...
    @property
    def host(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def available_bytes(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def block_bytes(self) -> int: ...


def choose_num_blocks(config: InferenceConfig, ranks: Sequence[RankRoom], max_len: int) -> int:
    """Blocks of a replica's cache: what the tightest rank has room for, at most what all sequences could ever fill.

    Raises ConfigError if that is less than one block, or less than a sequence of the length that the config asks for,
    or if the config fixes a size for which there is no memory.
    """
    block_size = ranks[0].block_size
    sharing = Counter((rank.host, rank.device) for rank in ranks)

    def room(rank: RankRoom) -> int:
        """Bytes for this rank's cache."""
        if config.kv_memory_bytes is not None:
            return int(config.kv_memory_bytes)
        default = CPU_KV_FRACTION if rank.device == "cpu" else CUDA_KV_FRACTION
        fraction = config.kv_memory_fraction if config.kv_memory_fraction is not None else default
        return int(rank.available_bytes * fraction / sharing[rank.host, rank.device])

    if config.num_kv_blocks is not None:
        num_blocks = config.num_kv_blocks
    else:
        most = config.max_num_seqs * -(-max_len // block_size)
        num_blocks = min(most, *(room(rank) // rank.block_bytes for rank in ranks))
    wanted = max_len if config.max_model_len is not None else 2  # a token of prompt and one of output
    if num_blocks * block_size < wanted:
        tightest = min(ranks, key=lambda rank: room(rank) / rank.block_bytes)
        need = f"max_model_len is {wanted}" if config.max_model_len is not None else f"a request needs {wanted} or more"
        short = (-(-wanted // block_size) - num_blocks) * tightest.block_bytes
        raise ConfigError(
            f"the KV cache is too small for one request: {num_blocks} blocks of {block_size} hold "
            f"{num_blocks * block_size} tokens, {need}; {_mib(short)} is missing on "
            f"{rank_name(config, tightest.rank)}: raise num_kv_blocks, kv_memory_bytes or kv_memory_fraction, "
            f"lower max_model_len, or use more ranks"
        )
    _check_room(config, ranks, num_blocks)
    return num_blocks


def check_draft_room(ranks: Sequence[RankInfo], num_blocks: int) -> None:
    """Proves that a draft model's cache fits beside all that is there already. Raises ConfigError."""
    on_device: dict[tuple[str, str], list[DraftInfo]] = {}
    for rank in ranks:
        if rank.draft is not None:
            on_device.setdefault((rank.host, rank.device), []).append(rank.draft)
    for (_, device), drafts in on_device.items():
        size = num_blocks * sum(draft.block_bytes for draft in drafts)
        free = min(draft.available_bytes for draft in drafts)
        if size > free:
            raise ConfigError(
                f"SpeculativeConfig.model: the draft model's KV cache does not fit: {num_blocks} blocks take "
                f"{_mib(size)} on {device}, {_mib(free)} is free; give InferenceConfig.speculative when the engine is "
                f"made, so that there is room for both, or a smaller cache (num_kv_blocks, kv_memory_fraction)"
            )


def _check_room(config: InferenceConfig, ranks: Sequence[RankRoom], num_blocks: int) -> None:
    """Proves that a cache whose size the config fixes fits on each device, beside those of the ranks that share it."""
    field = next((name for name in ("num_kv_blocks", "kv_memory_bytes") if getattr(config, name) is not None), None)
    if field is None:
        return
    on_device: dict[tuple[str, str], list[RankRoom]] = {}
    for rank in ranks:
        on_device.setdefault((rank.host, rank.device), []).append(rank)
    for (_, device), sharing in on_device.items():
        block, free = sum(rank.block_bytes for rank in sharing), min(rank.available_bytes for rank in sharing)
        short = num_blocks * block - free
        if short <= 0:
            continue
        fitting = max(0, free // block)
        others = f" and {len(sharing) - 1} more that share it" if len(sharing) > 1 else ""
        most = fitting if field == "num_kv_blocks" else fitting * max(rank.block_bytes for rank in sharing)
        raise ConfigError(
            f"InferenceConfig.{field}: {int(getattr(config, field))} does not fit on {device} of "
            f"{rank_name(config, sharing[0].rank)}{others}: {num_blocks} blocks take {num_blocks * block} bytes, "
            f"{free} are free, {short} bytes are missing; "
            + (f"use at most {most}, or more ranks on other devices" if most else "use more ranks on other devices")
        )


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"
