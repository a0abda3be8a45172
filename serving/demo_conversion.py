"""Turns the demo model's GGUF file into a safetensors directory: `python -P demo_conversion.py GGUF DIRECTORY`.

Run by its path, as a child of ``demo_model.py``: it imports nothing of MeshLM. Exit code 0, or 1 after one line on
stdout that says why not.
"""

import sys
from pathlib import Path
from typing import Any


def convert(gguf: Path, directory: Path) -> None:
    """Writes the GGUF's model and tokenizer to `directory` and proves that what is read back is the same model.

    The dtype is float32. The GGUF's matrices are Q4_1 and its embedding Q8_0 (norms: float32): a dequantised weight
    is scale * integer + minimum with half-precision scale and minimum, which neither bfloat16 nor float16 can hold
    (checked: rounding changes the tensors). Float32 holds it exactly, so this directory, the GGUF file and
    transformers agree to the last bit; who wants a half-precision run casts on loading.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source: dict[str, Any] = {"gguf_file": gguf.name}
    with torch.inference_mode():
        original = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source).eval()
        # Read from GGUF a model is marked as quantised, which save_pretrained refuses: hence a clean one.
        settings = original.config.to_dict()
        for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
            settings.pop(key, None)
        config = type(original.config).from_dict(settings)
        clean = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        clean.load_state_dict(original.state_dict())
        clean.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
        )
        clean.save_pretrained(directory)
        del clean

        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
        # The GGUF asks for the pre-tokenizer "smollm": every digit by itself, then byte level. transformers reads
        # only the second half, and without the first "a  12" becomes other tokens than those of the training.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.model_max_length = config.max_position_embeddings
        for key in ("is_local", "local_files_only"):  # facts of this load, not of the tokenizer
            tokenizer.init_kwargs.pop(key, None)
        tokenizer.save_pretrained(directory)

        saved = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
        saved_tokenizer = AutoTokenizer.from_pretrained(directory)
        chat = [{"role": "user", "content": "What do 12  and 30 make?"}]
        prompt = saved_tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = saved_tokenizer(prompt, return_tensors="pt").input_ids
        _check(ids.tolist() == tokenizer(prompt, return_tensors="pt").input_ids.tolist(), "the tokenizer")
        _check(saved_tokenizer.decode(ids[0]) == prompt and prompt.endswith("<|im_start|>assistant\n"), "the chat text")
        end = saved_tokenizer.convert_tokens_to_ids("<|im_end|>")
        _check(saved.generation_config.eos_token_id == end, "the EOS id of generation_config.json")
        weights, saved_weights = original.state_dict(), saved.state_dict()
        _check(weights.keys() == saved_weights.keys(), "the list of tensors")
        for name, weight in weights.items():
            _check(weight.dtype == saved_weights[name].dtype and torch.equal(weight, saved_weights[name]), name)
        # Not torch.equal: with equal weights a matmul may still take another path where memory is aligned otherwise.
        difference = (original(ids).logits - saved(ids).logits).abs().max().item()
        _check(difference <= 1e-4, f"the logits (difference {difference})")


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise RuntimeError(f"{what} changed between the GGUF file and the saved directory")


def main(gguf: str, directory: str) -> int:
    try:
        convert(Path(gguf), Path(directory))
    except KeyboardInterrupt:  # the terminal's Ctrl-C reaches this child too; the parent speaks
        return 130
    except Exception as error:  # the parent turns this line into its own error
        print(f"{type(error).__name__}: {error}".replace("\n", " "))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
