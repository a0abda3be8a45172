"""`InferenceShardformer`: from a model and a mesh to this rank's stage, loaded and bound."""

from collections.abc import Callable, Mapping

import torch

from ..config import InferenceConfig
from ..kernels import select_ops
from ..mesh.collectives import Communicator
from ..mesh.launch import RankPlace
from ..mesh.process_group_mesh import ProcessGroupMesh
from ..mesh.torchrun import torchrun_place
from ..policies import DecoderSpec, GenericSpec, ModelSpec
from .backends import Workload, tune
from .base import Stage
from .checkpoint import Checkpoint, Model, open_checkpoint
from .generic import GenericStage
from .linear import Slices
from .rebinding import bind
from .shard import Shards, split_layers
from .stage import PipelineStage
from .weights import load_weights

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


STAGES: dict[type[ModelSpec], Callable[..., Stage]] = {DecoderSpec: PipelineStage, GenericSpec: GenericStage}
"""Whose layers a spec's stage is made of."""


def _own_device(name: str) -> torch.device:
    """The device that a config names, for the process that asks."""
    if name != "auto":
        return torch.device(name)
    place = torchrun_place() or RankPlace(0, 1, 0, 1)
    enough = torch.cuda.device_count() >= place.local_world_size
    return torch.device("cuda", place.local_rank) if enough else torch.device("cpu")


class InferenceShardformer:
    """Gives each rank of a mesh its stage of a model.

    config: dtype, max_model_len, attention_backend; mesh: axes named "pp" and "tp"; device: by default the config's,
    "auto" being cuda:LOCAL_RANK where there is a device for every rank on the host, else cpu.
    """

    def __init__(self, config: InferenceConfig, mesh: ProcessGroupMesh, device: torch.device | None = None) -> None:
        self.config, self.mesh = config, mesh
        self.device = device or _own_device(config.device)
        self.tp = Communicator.along(mesh, "tp")

    def shards(self, spec: ModelSpec) -> Shards:
        """How the model is split over this mesh's tp axis."""
        return Shards(spec, self.mesh.size("tp"), self.config.expert_parallel)

    def optimize(self, model: Model | Checkpoint) -> Stage:
        """This rank's stage: its layers, its slices of them, ops and attention backend bound.

        Raises ValueError where the model cannot be divided so, CheckpointError where weights are faulty.
        """
        checkpoint = (
            model
            if isinstance(model, Checkpoint)
            else open_checkpoint(
                model,
                policy=self.config.policy,
                allow_pickle=self.config.allow_pickle,
                trust_remote_code=self.config.trust_remote_code,
            )
        )
        spec = checkpoint.spec
        dtype = choose_dtype(self.config, spec)
        pp_size, pp_rank = self.mesh.size("pp"), self.mesh.coordinate("pp")
        slices = Slices(self.shards(spec), self.tp, dtype)
        is_tuned = self.config.attention_backend == "tuned"
        stage = STAGES[type(spec)](
            spec,
            split_layers(spec, pp_size)[pp_rank],
            slices,
            select_ops(self.device, dtype),
            backend="auto" if is_tuned else self.config.attention_backend,
            max_model_len=max_model_len(self.config, spec),
            device=self.device,
            block_size=self.config.block_size,
        )
        if is_tuned:
            specs = [attention.backend.spec for attention in stage.attentions]
            bind(stage, tune(specs, workload_of(self.config, spec)))
        stage.weight_bytes = load_weights(stage, checkpoint.source, self.device)
        stage.prove()
        return stage.eval()


def choose_dtype(config: InferenceConfig, spec: ModelSpec) -> torch.dtype:
    """The config's dtype, "auto" being the checkpoint's. Raises ValueError if that is not one to compute in."""
    name = spec.dtype if config.dtype == "auto" else config.dtype
    if name not in DTYPES:
        raise ValueError(f"dtype='auto': the checkpoint's dtype is {name}; choose one of {', '.join(DTYPES)}")
    return DTYPES[name]


def workload_of(config: InferenceConfig, spec: ModelSpec) -> Workload:
    """What "tuned" attention is to be fast at."""
    return Workload(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=max_model_len(config, spec),
        block_size=config.block_size,
    )


def max_model_len(config: InferenceConfig, spec: ModelSpec) -> int:
    """Tokens a sequence may have. Raises ValueError if the config asks for more than the model's positions."""
    limit = spec.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ValueError(f"max_model_len={config.max_model_len} is more than the model's {limit} positions")
    return config.max_model_len or limit
