"""OpenVINO GenAI's continuous batching, with its prefix cache; the model is exported once, into the environment.

The exported weights are float32, which the CPU plugin rounds where the dtype is bfloat16. Its KV cache is as it comes:
8 bits.
"""

from pathlib import Path

import numpy as np
import openvino
import openvino_genai
from cached import cached
from protocol import Runner, answer

PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}


def export(model: str, folder: Path) -> None:
    from optimum.exporters.openvino import main_export  # seconds; and once only

    main_export(model, folder, task="text-generation-with-past", library_name="transformers")


class OpenVINO(Runner):
    def __init__(self, model: str, dtype: str, threads: int) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = 1  # GB
        scheduler.enable_prefix_caching = True
        scheduler.max_num_batched_tokens = 2048  # the longest prompt in one step
        folder = cached(model, "openvino", lambda folder: export(model, folder))
        properties = {"INFERENCE_PRECISION_HINT": PRECISIONS[dtype], "INFERENCE_NUM_THREADS": threads}
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties)

    def run(self, prompts: list[list[int]], num_new: list[int]) -> list[list[int]]:
        configs = []
        for n in num_new:
            config = openvino_genai.GenerationConfig()
            config.do_sample, config.ignore_eos, config.max_new_tokens = False, True, n
            configs.append(config)
        inputs = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        return [result.m_generation_ids[0] for result in self.pipeline.generate(inputs, configs)]


if __name__ == "__main__":
    answer(OpenVINO, "openvino-genai", "openvino")
