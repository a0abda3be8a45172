"""transformers' continuous batching: what `generate_batch` uses, kept from one workload to the next."""

import torch
import transformers
from protocol import Runner, answer


class ContinuousBatching(Runner):
    def __init__(self, model: str, dtype: str, threads: int) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self.model = self.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        config = transformers.GenerationConfig(do_sample=False, max_new_tokens=1, eos_token_id=-1)  # -1: no token ends
        memory = transformers.ContinuousBatchingConfig(max_memory_percent=0.1)  # most of it by default
        self.manager = self.model.init_continuous_batching(config, memory)
        self.manager.start()

    def run(self, prompts: list[list[int]], num_new: list[int]) -> list[list[int]]:
        names = [self.manager.add_request(p, max_new_tokens=n) for p, n in zip(prompts, num_new, strict=True)]
        tokens: dict[str, list[int]] = {}
        while len(tokens) < len(names):
            result = self.manager.get_result(timeout=1)
            if result is None:
                if not self.manager.is_running():
                    raise RuntimeError("continuous batching has stopped")
            elif result.error:
                raise RuntimeError(result.error)
            elif result.is_finished():
                tokens[result.request_id] = result.generated_tokens
        return [tokens[name] for name in names]

    def close(self) -> None:
        self.manager.stop(block=True)


if __name__ == "__main__":
    answer(ContinuousBatching, "transformers", "torch")
