"""vLLM on a CPU, as installed or, with the word `tuned`, as its documents advise.

Tuned: tcmalloc and Intel's OpenMP preloaded where the environment's lib folder has them, one process, one thread bound
to each core. Either compiles the model at each start.
"""

import os
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

from protocol import Runner, answer

TUNED = "tuned"
LIB = Path(sys.prefix) / "lib"
PRELOADED = ("libtcmalloc_minimal.so.4", "libiomp5.so")


def environment(threads: int, tuned: bool) -> dict[str, str]:
    """What must be set before the process starts."""
    cache = Path(sys.prefix) / "cache"
    variables = {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB: room for each workload here; by default nearly all memory is taken
        "VLLM_CACHE_ROOT": str(cache),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if tuned:
        missing = [name for name in PRELOADED if not (LIB / name).exists()]
        if missing:
            raise FileNotFoundError(f"vLLM tuned needs {' and '.join(missing)} in {LIB}")
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
        variables |= {
            "LD_PRELOAD": ":".join(str(LIB / name) for name in PRELOADED),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": cores,  # for its worker processes; the next three are what it sets there
            "OMP_NUM_THREADS": str(threads),
            "KMP_AFFINITY": f"granularity=fine,explicit,proclist=[{cores}]",
            "KMP_BLOCKTIME": "5",
        }
    return variables


class VLLM(Runner):
    def __init__(self, model: str, dtype: str, threads: int, *words: str) -> None:
        import vllm

        self.vllm = vllm
        self.engine = vllm.LLM(model, dtype=dtype, max_model_len=2048)

    def run(self, prompts: list[list[int]], num_new: list[int]) -> list[list[int]]:
        params = [
            self.vllm.SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in num_new
        ]
        inputs = [self.vllm.TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        outputs = self.engine.generate(inputs, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    wanted = environment(int(sys.argv[3]), TUNED in sys.argv[4:])
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | wanted)
    (distribution,) = packages_distributions()["vllm"]  # builds for the CPU have names of their own
    answer(VLLM, distribution, "torch")
