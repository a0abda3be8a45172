"""A tiny random model of every causal language model in transformers, and what it generates."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES: dict[str, str] = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)  # model type: class
VOCABULARY = 101
NUM_LAYERS = 4


def _all(value: Any, *names: str) -> dict[str, Any]:
    return dict.fromkeys(names, value)


# Values for a config's fields, by name, where its default is a single value. Heads, and what they are split into, are
# odd in number; a window is shorter than most prompts.
SIZES: dict[str, Any] = {
    **_all(NUM_LAYERS, "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"),
    **_all(72, "hidden_size", "d_model", "n_embd", "embedding_size", "attention_hidden_size", "emb_dim"),
    **_all(9, "num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"),
    **_all(9, "encoder_attention_heads", "swa_num_attention_heads", "attention_heads"),
    **_all(3, "num_key_value_heads", "swa_num_key_value_heads"),
    **_all(8, "head_dim", "swa_head_dim", "attention_head_dim", "kv_channels", "dim_head"),
    **_all(50, "intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "ffn_dim", "ffn_hidden_size"),
    **_all(50, "dense_intermediate_size", "intermediate_size_mlp", "dim_ff", "d_inner", "dff"),
    **_all(26, "moe_intermediate_size", "shared_intermediate_size", "shared_expert_intermediate_size"),
    **_all(5, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    **_all(2, "num_experts_per_tok", "moe_topk", "num_experts_per_token", "moe_k"),
    **_all(1, "n_shared_experts", "num_shared_experts", "moe_num_shared_experts"),
    **_all(3, "n_group", "num_expert_group"),
    **_all(2, "topk_group"),
    **_all(1, "first_k_dense_replace", "num_dense_layers"),
    **_all(VOCABULARY, "vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"),
    **_all(64, "max_position_embeddings", "n_positions", "model_max_length", "max_seq_len"),
    **_all(64, "original_max_position_embeddings"),
    **_all(5, "sliding_window", "sliding_window_size"),
    **_all(14, "q_lora_rank"),
    **_all(12, "kv_lora_rank"),
    **_all(4, "qk_rope_head_dim"),
    **_all(6, "qk_nope_head_dim"),
    **_all(10, "qk_head_dim", "v_head_dim"),
    **_all(True, "attention_bias", "mlp_bias", "use_bias"),
    **_all(0.0, "attention_dropout", "dropout", "hidden_dropout", "embd_pdrop", "attn_pdrop", "resid_pdrop"),
    **_all(0.0, "activation_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "router_jitter_noise"),
    **_all(True, "is_decoder"),
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_HEAD_DIM = {"head_dim": 8}  # None by default
_SLIDING_AND_FULL = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_PADDED = {"pad_token_id": 1}  # positions are counted from the tokens that are not padding
_MAMBA = {"mamba_n_heads": 18, "mamba_d_head": 8, "mamba_d_state": 16}
_LINEAR = {
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 9,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_INDEXER = {"index_head_dim": 8, "index_n_heads": 3, "index_topk": 7}

# What a family needs besides, or instead.
OVERRIDES: dict[str, dict[str, Any]] = {
    "axk2": _INDEXER,
    "bamba": _MAMBA | {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "camembert": _PADDED,
    "codegen": {"n_head": 8, "n_embd": 64, "rotary_dim": 4},  # its heads come in four parts
    "cohere_compass_text": _SLIDING_AND_FULL
    | {"rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE}},
    "data2vec-text": _PADDED,
    "dbrx": {
        "attn_config": {"kv_n_heads": 3, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 72, "ffn_hidden_size": 26, "moe_num_experts": 5, "moe_top_k": 2},
    },
    "deepseek_v2": {
        "topk_method": "group_limited_greedy",
        "n_routed_experts": 6,
        "n_group": 3,
        "topk_group": 2,
        "num_experts_per_tok": 2,
    },
    "deepseek_v32": _INDEXER,
    "deepseek_v4": _INDEXER
    | {
        "num_key_value_heads": 1,
        "o_groups": 3,
        "o_lora_rank": 12,
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
        "head_dim": 16,
        "qk_rope_head_dim": 4,
    },
    "diffllama": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12},
    "dots1": {"n_routed_experts": 6, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 3, "topk_group": 2},
    "dots3_note_audio_encoder": {"adapter_input_size": 72, "adapter_out_dim": 72},
    "dots3_note_text": _INDEXER
    | {
        "per_layer_config": {},
        "head_dim": 10,
        "shared_experts_intermediate_size": 26,
        "rope_parameters": {
            kind: _ROPE | {"partial_rotary_factor": 0.4} for kind in ("sliding_attention", "indexed_attention")
        },
    },
    "dots3_note_vision_encoder": {
        "adapter_in_dim": 72,
        "adapter_out_dim": 72,
        "mlp_bias": False,
        "mlp_layer_types": ["dense"] * 4,
        "per_layer_config": {},
    },
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 144},
    "gemma2": _SLIDING_AND_FULL,
    "gemma3n_text": _SLIDING_AND_FULL
    | {
        "num_kv_shared_layers": 2,
        "intermediate_size": [50] * 4,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
        "hidden_size_per_layer_input": 10,
        "laurel_rank": 6,
    },
    "gemma4_text": {"hidden_size_per_layer_input": 10, "per_layer_config": {1: {"head_dim": 16}, 3: {"head_dim": 16}}},
    "gemma4_unified_text": {"per_layer_config": {1: {"head_dim": 16}, 3: {"head_dim": 16}}},
    "glm_moe_dsa": _INDEXER,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 5},
    "gptj": {"rotary_dim": 4},
    "got_ocr2_vision": {"mlp_dim": 50, "output_channels": 8, "image_size": 32},
    "granitemoehybrid": _MAMBA | {"layer_types": ["full_attention"] * 4},
    "hunyuan_v1_dense": _HEAD_DIM,
    "hunyuan_v1_moe": _HEAD_DIM,
    "hy_v4": _INDEXER,
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 9, "q_lora_rank": None},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"expert_ffn_hidden_size": 26, "zero_expert_num": 2},
    "mamba2": {"num_heads": 18, "n_groups": 2},
    "mimo_v2_flash": {"num_attention_heads": 12},  # layers with a window have twice the KV heads
    "minimax_m3_vl_text": _INDEXER,
    "ministral": _HEAD_DIM | _SLIDING_AND_FULL,
    "mpt": {"attn_config": {"attn_pdrop": 0, "alibi": True}},
    "nemotron": {"num_key_value_heads": 3},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "mamba_num_heads": 18,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "ssm_state_size": 16,
        "moe_shared_expert_intermediate_size": 26,
    },
    "phi4_multimodal_audio": {
        "num_blocks": 2,
        "ext_pw_out_channel": 72,
        "depthwise_separable_out_channel": 72,
        "nemo_conv_channels": 8,
    },
    "phi4_multimodal_vision": {"image_size": 28, "crop_size": 28},
    "prophetnet": {
        "num_encoder_attention_heads": 9,
        "num_decoder_attention_heads": 9,
        "num_encoder_layers": 4,
        "num_decoder_layers": 4,
    },
    "qwen3_5_moe_text": _LINEAR,
    "qwen3_5_text": _LINEAR,
    "qwen3_next": _LINEAR,
    "qwen4_exp_text": _LINEAR
    | {
        "indexer_n_heads": 3,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 12,
        "ple_embed_dim": 16,
        "ngram_vocab_size_base": 64,
    },
    "reformer": {"axial_pos_embds_dim": [36, 36], "axial_pos_shape": [8, 8]},
    "roberta": _PADDED,
    "roberta-prelayernorm": _PADDED,
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": VOCABULARY,
        "shape_embed_dim": 8,
        "shape_vocab_size": VOCABULARY,
    },
    "xlm-roberta": _PADDED,
    "xlm-roberta-xl": _PADDED,
    "xmod": _PADDED | {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "hybrid_layer_ids": [1, 3]},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 12},
}

# Families of which there is no small model without a network, and why.
NOT_BUILT: dict[str, str] = {
    "gemma3n": "its vision tower needs the packages timm and pillow; see gemma3n_text",
    "gemma4_assistant": "drafts for another model, whose keys and values it reads",
    "gemma4_unified_assistant": "drafts for another model, whose keys and values it reads",
    "musicgen": "its config is of three models; the one that generates draws several codebooks of audio at once",
    "musicgen_melody": "its config is of three models; the one that generates draws several codebooks of audio at once",
}


def tiny_config(model_type: str, **values: Any) -> PreTrainedConfig:
    """Of a family; values: fields of its config that are to be other than the tables say."""
    return _shrunk(CONFIG_MAPPING[model_type], values)


def has_experts(model_type: str) -> bool:
    config = tiny_config(model_type).get_text_config()
    return any(getattr(config, name, None) for name in ("num_local_experts", "num_experts", "moe_num_experts"))


def _shrunk(kind: type[PreTrainedConfig], more: Mapping[str, Any] = MappingProxyType({})) -> PreTrainedConfig:
    """A config of this kind with the sizes above; configs within it likewise."""
    overrides = OVERRIDES.get(kind.model_type, {}) | dict(more)
    defaults = kind()
    fields = defaults.to_dict()
    values = {
        name: value for name, value in SIZES.items() if not isinstance(fields.get(name), (list, dict, type(None)))
    }
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if name in fields:
            declared = kind.__dataclass_fields__.get(name)
            values[name] = None if declared is None or "None" in str(declared.type) else 0
    if "qk_rope_head_dim" in fields:  # latent attention: `head_dim` is what is rotated, no two query heads share a key
        values |= {"head_dim": SIZES["qk_rope_head_dim"], "num_key_value_heads": SIZES["num_attention_heads"]}
    if any(fields.get(name) is not None for name in ("n_group", "num_expert_group")):  # groups of two experts
        values |= {name: 6 for name in ("num_experts", "n_routed_experts") if name in values}
    if kinds := fields.get("layer_types"):
        different = list(dict.fromkeys(kinds))
        values["layer_types"] = [different[i % len(different)] for i in range(NUM_LAYERS)]
    if kinds := fields.get("mlp_layer_types"):
        different = sorted(set(kinds))
        values["mlp_layer_types"] = [different[0], *different[-1:] * (NUM_LAYERS - 1)]
    for name in kind.sub_configs:
        if (inner := getattr(defaults, name, None)) is not None and name not in overrides:
            values[name] = _shrunk(type(inner))
    return kind(**{**values, **overrides})


@dataclass(frozen=True)
class Draw:
    """How a model's weights are drawn: standard deviations."""

    seed: int = 0
    std: float = 0.4
    embedding: float = 0.4
    positions: float = 0.4  # and other embeddings that are no tokens'
    bias: float = 0.2


# Where the first draw's output does not depend on all that it should, or repeats itself.
DRAWS: dict[str, Draw] = {
    "apertus": Draw(embedding=1.5),
    "bart": Draw(std=0.1, positions=2, bias=0.02),
    "bert": Draw(seed=5, std=0.1, bias=0.02),
    "bert-generation": Draw(std=0.1, positions=2, bias=0.02),
    "bigbird_pegasus": Draw(seed=1, embedding=4),
    "biogpt": Draw(std=1, embedding=0.1),
    "blenderbot": Draw(seed=2, std=0.7, embedding=0.1),
    "blenderbot-small": Draw(seed=5, std=0.1, positions=2, bias=0.02),
    "bloom": Draw(seed=1),
    "camembert": Draw(std=0.1, bias=0.02),
    "codegen": Draw(seed=1),
    "ctrl": Draw(seed=1, std=1, embedding=0.1),
    "data2vec-text": Draw(seed=2, std=0.1, positions=2, bias=0.02),
    "deepseek_v2": Draw(seed=1),
    "doge": Draw(seed=3, std=0.15),
    "electra": Draw(std=0.1, positions=2, bias=0.02),
    "ernie": Draw(seed=5, std=0.1, bias=0.02),
    "exaone_moe": Draw(seed=2),
    "fuyu": Draw(embedding=0.1),
    "gemma2": Draw(embedding=0.1),
    "gemma3": Draw(seed=5, embedding=0.05),
    "gemma3_text": Draw(seed=1, embedding=0.05),
    "gemma3n_text": Draw(seed=5, embedding=0.05),
    "gemma4_text": Draw(seed=2, embedding=0.1),
    "gemma4_unified_text": Draw(seed=2, std=0.7, embedding=0.1),
    "git": Draw(std=0.1, positions=2, bias=0.02),
    "glm": Draw(seed=2),
    "granitemoehybrid": Draw(seed=1),
    "hyperclovax": Draw(seed=1),
    "marian": Draw(std=0.1, positions=2, bias=0.02),
    "mbart": Draw(seed=2, std=0.7, embedding=0.1),
    "megatron-bert": Draw(std=0.15, positions=2, bias=0.02),
    "minicpm3": Draw(seed=1),
    "minimax_m3_vl_text": Draw(seed=1),
    "mistral": Draw(seed=1),
    "moss_transcribe_diarize": Draw(positions=2, bias=0.02),
    "mpt": Draw(seed=1, std=0.15, embedding=0.1),
    "mvp": Draw(std=0.1, positions=2, bias=0.02),
    "nanochat": Draw(seed=2),
    "olmo2": Draw(embedding=1.5),
    "openai-gpt": Draw(seed=3, std=0.7),
    "opt": Draw(embedding=0.1),
    "pegasus": Draw(seed=3, std=0.1, positions=2, bias=0.02),
    "persimmon": Draw(embedding=0.1),
    "plbart": Draw(seed=7, std=0.1, positions=8, bias=0.02),
    "qwen2": Draw(seed=1),
    "rembert": Draw(seed=3, std=0.1, positions=2, bias=0.02),
    "roberta": Draw(seed=2, std=0.1, positions=2, bias=0.02),
    "roberta-prelayernorm": Draw(std=0.1, positions=2, bias=0.02),
    "roc_bert": Draw(seed=5, std=0.1, bias=0.02),
    "roformer": Draw(seed=2, std=0.1, embedding=1, positions=2, bias=0.02),
    "solar_open": Draw(seed=1),
    "starcoder2": Draw(embedding=0.1),
    "trocr": Draw(std=0.1, positions=2, bias=0.02),
    "whisper": Draw(seed=1, std=0.1, positions=2, bias=0.02),
    "xglm": Draw(std=0.7, embedding=0.1),
    "xlm-roberta": Draw(std=0.1, bias=0.02),
    "xlm-roberta-xl": Draw(seed=2, std=0.1, bias=0.02),
    "xmod": Draw(seed=5, std=0.1, positions=2, bias=0.02),
    "zaya": Draw(std=0.7),
}


def tiny_model(model_type: str, draw: Draw | None = None, **values: Any) -> PreTrainedModel:
    """Float32, every weight drawn: as transformers begins, it would repeat its last token, whatever it attends to."""
    config = tiny_config(model_type, **values)
    config._attn_implementation = config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    draw = draw or DRAWS.get(model_type, Draw())
    torch.manual_seed(draw.seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point() or any(part in name for part in _KEPT):
                continue
            if "bias" in name.rpartition(".")[2]:
                tensor.normal_(std=draw.bias)
            elif tensor.dim() > 1:
                tensor.normal_(std=draw.std)
            else:  # norms, scales
                tensor.uniform_(0.5, 1.5)
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):
                tokens = module is model.get_input_embeddings()
                module.weight.normal_(std=draw.embedding if tokens else draw.positions)
    model.generation_config = GenerationConfig()
    return model


_KEPT = ("A_log", "dt_bias", "embed_positions")


# ---- what they generate ----------------------------------------------------------------------------------------------

NUM_NEW = 24
MIN_DISTINCT = 6
NUM_CHANGED = 4  # prompts that are near enough to their output for a window to see
MIN_MARGIN = 1e-4
_generator = torch.Generator().manual_seed(1)
PROMPTS: list[list[int]] = [
    torch.randint(5, VOCABULARY, (length,), generator=_generator).tolist() for length in (1, 2, 5, 9, 14, 21)
]


@dataclass(frozen=True)
class Reference:
    """What transformers generates, and whether it would tell a faulty model from a right one."""

    prompts: list[list[int]]
    outputs: list[list[int]]  # of NUM_NEW tokens
    changed: list[list[int]]  # of the first NUM_CHANGED prompts with another first token
    margin: float  # how near the best two logits ever came, in units of the logits' spread: rounding must not matter

    def faults(self) -> list[str]:
        distinct = min(len(set(output)) for output in self.outputs)
        alike = [self.prompts[i] for i, changed in enumerate(self.changed) if changed == self.outputs[i]]
        return [
            *([f"an output of {distinct} distinct tokens"] if distinct < MIN_DISTINCT else []),
            *(f"the first of {len(prompt)} tokens does not matter" for prompt in alike),
            *([f"a tie within {self.margin:.1e}"] if self.margin < MIN_MARGIN else []),
        ]


def greedy_reference(model: PreTrainedModel) -> Reference:
    outputs, changed, margins = [], [], []
    for index, prompt in enumerate(PROMPTS):
        other = [[(prompt[0] + 1) % VOCABULARY, *prompt[1:]]] if index < NUM_CHANGED else []
        (output, *more), margin = _greedy(model, [prompt, *other])
        outputs.append(output)
        changed += more
        margins.append(margin)
    return Reference(PROMPTS, outputs, changed, min(margins))


@torch.inference_mode()
def _greedy(model: PreTrainedModel, prompts: list[list[int]]) -> tuple[list[list[int]], float]:
    """transformers' own continuations of prompts of one length, and the first one's margin."""
    ids = torch.tensor(prompts)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        use_cache=True,
        max_new_tokens=NUM_NEW,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits = torch.stack([logits[0] for logits in output.logits])  # [NUM_NEW, vocabulary]
    best = logits.topk(2).values
    margin = ((best[:, 0] - best[:, 1]) / logits.std(dim=-1)).min().item()
    return output.sequences[:, ids.shape[1] :].tolist(), margin
