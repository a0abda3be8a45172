"""Ours. Words: fields of the configuration, as `tp_size=2`."""

from protocol import Runner, answer

from meshlm import InferenceConfig, InferenceEngine, SamplingParams


class MeshLM(Runner):
    def __init__(self, model: str, dtype: str, threads: int, *words: str) -> None:
        sizes = {name: int(value) for name, value in (word.split("=") for word in words)}
        self.engine = InferenceEngine(model, InferenceConfig(dtype=dtype, **sizes))

    def run(self, prompts: list[list[int]], num_new: list[int]) -> list[list[int]]:
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in num_new]
        return [output.token_ids for output in self.engine.generate(prompts, params, progress=False)]

    def close(self) -> None:
        self.engine.close()


if __name__ == "__main__":
    answer(MeshLM, "meshlm", "torch")
