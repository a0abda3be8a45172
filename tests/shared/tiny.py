"""Tiny random Llamas for all tests; pytest finds this module by its `pythonpath`."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SIZES: dict[str, Any] = {  # which hardly any tp_size divides
    "hidden_size": 36,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 50,
    "vocab_size": 101,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,  # logits far from each other; with less, every output repeats one token
    "bos_token_id": None,
    "eos_token_id": None,
}


def llama_config(**values: Any) -> LlamaConfig:
    return LlamaConfig(**{**SIZES, **values})


def make_llama(seed: int = 0, **values: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(llama_config(**values)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers begins with zeros, which would hide one that is left out
            torch.nn.init.normal_(parameter, std=0.4)
        elif "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model
