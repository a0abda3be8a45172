"""llama.cpp, one request after another; what a request has in common with the one before it stays in the KV cache.

The model is converted once, into the environment, by llama.cpp's own script, from the folder `llama.cpp` there. The KV
cache is as it comes: 16 bits, also with float32 weights.
"""

import subprocess
import sys
from itertools import islice
from pathlib import Path

import llama_cpp
from cached import cached
from protocol import Runner, answer

TYPES = {"float32": "f32", "bfloat16": "bf16"}


def converted(model: str, dtype: str) -> Path:
    script = Path(sys.prefix) / "llama.cpp" / "convert_hf_to_gguf.py"
    words = ["--outtype", TYPES[dtype], "--outfile"]
    return cached(
        model,
        f"{TYPES[dtype]}.gguf",
        lambda path: subprocess.run([sys.executable, script, model, *words, path], check=True),
    )


class LlamaCpp(Runner):
    def __init__(self, model: str, dtype: str, threads: int) -> None:
        self.model = llama_cpp.Llama(
            str(converted(model, dtype)), n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def run(self, prompts: list[list[int]], num_new: list[int]) -> list[list[int]]:
        return [
            list(islice(self.model.generate(prompt, temp=0), n)) for prompt, n in zip(prompts, num_new, strict=True)
        ]


if __name__ == "__main__":
    answer(LlamaCpp, "llama-cpp-python")
