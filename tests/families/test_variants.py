"""What the configs of a family can ask for beside its usual shape: hand-written policies, one rank, token for token."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from families import Draw, greedy_reference, tiny_config, tiny_model
from parity import CONFIG

from meshlm import InferenceConfig, InferenceEngine
from meshlm.shardformer import open_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Variant:
    family: str
    values: dict[str, Any]
    draw: Draw = field(default_factory=Draw)

    def __str__(self) -> str:
        return f"{self.family} {', '.join(f'{name}={value}' for name, value in self.values.items())}"


SLIDING = ["sliding_attention", "full_attention"] * 2
NARROW = {"word_embed_proj_dim": 40}
FALCON_40B = {"new_decoder_architecture": True, "num_kv_heads": 3}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1],
    "long_factor": [2.0, 3.0],
    "partial_rotary_factor": 0.5,
    "original_max_position_embeddings": 64,
}
VARIANTS = [
    Variant("llama", {"sliding_window": 64}),  # not shorter than what the model can see
    Variant("mistral", {"sliding_window": None}),
    Variant("mistral", {"head_dim": 12}),
    Variant("qwen2", {"use_sliding_window": True, "layer_types": SLIDING}, Draw(seed=1)),
    Variant("qwen3", {"use_sliding_window": True, "layer_types": SLIDING, "attention_bias": False}),
    Variant("gemma", {"tie_word_embeddings": False}),
    Variant("gemma2", {"final_logit_softcapping": None, "attn_logit_softcapping": None}, Draw(embedding=0.1)),
    Variant("gemma2", {"query_pre_attn_scalar": 20}, Draw(embedding=0.1)),
    Variant("phi3", {"sliding_window": 5, "tie_word_embeddings": True}),
    Variant("phi3", {"rope_parameters": LONGROPE}),
    Variant("olmo2", {"attention_bias": False}, Draw(seed=1, embedding=1.5)),
    Variant("smollm3", {"no_rope_layers": [0, 1, 1, 0]}),
    Variant("smollm3", {"use_sliding_window": True, "sliding_window": 5}),
    Variant("granite", {"embedding_multiplier": 3.0, "logits_scaling": 4.0, "residual_multiplier": 0.3}),
    Variant("granite", {"attention_multiplier": 0.2, "embedding_multiplier": 2.0}),
    Variant("cohere", {"use_qk_norm": True}),
    Variant("cohere", {"tie_word_embeddings": False, "logit_scale": 0.5}),
    Variant("cohere2", {"layer_types": ["full_attention"] * 4}),
    Variant("glm", {"attention_bias": False}),
    Variant("glm4", {"tie_word_embeddings": True}, Draw(seed=1)),
    Variant("starcoder2", {"use_bias": False, "tie_word_embeddings": False, "sliding_window": 5}),
    Variant("gpt2", {"scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False}, Draw(seed=1)),
    Variant("gpt2", {"scale_attn_weights": False, "activation_function": "relu"}),
    Variant("gptj", {"rotary_dim": 4}),
    Variant("gpt_neox", {"use_parallel_residual": False}),
    Variant("gpt_neox", {"attention_bias": False, "hidden_act": "gelu_fast"}),
    Variant("opt", {"do_layer_norm_before": False} | NARROW, Draw(std=0.08, embedding=1, positions=1)),
    Variant("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    Variant("opt", NARROW),
    Variant("falcon", FALCON_40B),
    Variant("falcon", FALCON_40B | {"num_ln_in_parallel_attn": 1}),
    Variant("falcon", {"multi_query": False}),
    Variant("falcon", {"parallel_attn": False, "bias": True}),
    Variant("mixtral", {"sliding_window": 5, "num_local_experts": 3}),
    Variant("qwen2_moe", {"norm_topk_prob": True, "decoder_sparse_step": 2}),
    Variant("qwen2_moe", {"use_sliding_window": True, "max_window_layers": 3}),
    Variant("qwen3_moe", {"use_sliding_window": True}),
    Variant("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [0, 2]}),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_variant(variant: Variant) -> None:
    model = tiny_model(variant.family, variant.draw, **variant.values)
    reference = greedy_reference(model)
    assert reference.faults() == []
    params = {"temperature": 0, "max_tokens": len(reference.outputs[0]), "ignore_eos": True, "detokenize": False}
    with InferenceEngine(model, InferenceConfig(**CONFIG)) as engine:
        outputs = engine.generate(reference.prompts, params, progress=False)
    assert [list(output.token_ids) for output in outputs] == reference.outputs


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        ("falcon", {"alibi": True}, "FalconForCausalLM with alibi=True"),
        *(
            (family, {"use_bidirectional_attention": True}, "ForCausalLM with use_bidirectional_attention=True")
            for family in ("gemma", "gemma2", "gemma3_text")
        ),
        ("gpt2", {"add_cross_attention": True}, "GPT2LMHeadModel with add_cross_attention=True"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "BloomForCausalLM with apply_residual"),
        *(
            (family, {"sliding_window": 5}, "ForCausalLM with sliding_window=5 is not supported")
            for family in ("llama", "granite", "cohere", "gpt_neox", "deepseek_v3")
        ),
        ("llama", {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope_type 'spiral' is not known"),
        ("gpt_oss", {"swiglu_limit": 10.0}, "GptOssForCausalLM with swiglu_alpha=1.702, swiglu_limit=10.0"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "DeepseekV2ForCausalLM with topk_method=noaux_tc"),
        ("deepseek_v2", {"norm_topk_prob": True}, "DeepseekV2ForCausalLM with norm_topk_prob=True"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "DeepseekV2ForCausalLM with scoring_func=sigmoid"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "DeepseekV3ForCausalLM with scoring_func=softmax"),
        ("llama", {"hidden_act": "xielu"}, "activation 'xielu' is not supported; supported: gelu"),
    ],
)
def test_what_a_policy_does_not_serve_is_refused(family: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        open_checkpoint(tiny_config(family, **values))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (
            "GraniteForCausalLM",
            "architectures names GraniteForCausalLM, but .* of model_type 'llama' is LlamaForCausalLM",
        ),
        ("LlamaModel", "^architecture LlamaModel is not supported; nearest supported: LlamaForCausalLM"),
        ("LlamaForSequenceClassification", "^architecture LlamaForSequenceClassification is not supported; nearest"),
    ],
)
def test_an_architecture_that_the_config_is_not_of_is_refused(architecture: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tiny_config("llama", architectures=[architecture]))
