"""A smaller model beside the target, on the same mesh: what of it must fit, and how it is configured."""

from typing import Any

from ..config import ConfigError, InferenceConfig
from ..policies import Dim, ModelSpec
from ..shardformer import Checkpoint, open_checkpoint
from .prompts import find_tokenizer


def open_draft(config: InferenceConfig, model: str, spec: ModelSpec) -> Checkpoint:
    """The draft model's checkpoint. spec: the target's. Raises ValueError if it is none, or has other tokens."""
    checkpoint = open_checkpoint(
        model, policy=config.policy, allow_pickle=config.allow_pickle, trust_remote_code=config.trust_remote_code
    )
    own = checkpoint.spec.vocab_size
    if own != spec.vocab_size:
        raise ConfigError(
            f"SpeculativeConfig.model: {model} has a vocabulary of {own} tokens, and the model that it is to draft for "
            f"has {spec.vocab_size}; they must be equal"
        )
    return checkpoint


def check_tokenizer(config: InferenceConfig, model: str, tokenizer: Any) -> None:
    """Raises ConfigError if the draft model has a tokenizer, and for it an id is another token than for the target."""
    own = None if tokenizer is None else find_tokenizer(model, config.trust_remote_code)
    if own is None:
        return
    ids, own_ids = tokenizer.get_vocab(), own.get_vocab()
    if ids != own_ids:
        token = next(token for token in sorted(ids.keys() | own_ids.keys()) if ids.get(token) != own_ids.get(token))
        raise ConfigError(
            f"SpeculativeConfig.model: {model} has another tokenizer than the model that it is to draft for: "
            f"{token!r} is token {own_ids.get(token)}, not {ids.get(token)}"
        )


def draft_config(config: InferenceConfig, spec: ModelSpec, block_size: int | None) -> InferenceConfig:
    """How the draft model is run, given how the target is. spec: the draft model's; block_size: the target's cache's.

    It goes along with sequences as long as it can follow them.
    """
    limit = spec.max_position_embeddings
    return config.replace(
        max_model_len=min(config.max_model_len or limit, limit),
        block_size=block_size,
        expert_parallel=config.expert_parallel and any(Dim.EXPERTS in tensor.dims for tensor in spec.tensors()),
        speculative=None,
    )
