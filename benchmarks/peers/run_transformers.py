"""transformers `generate`: one left-padded batch, as long as its longest request; each gets the tokens it asked for."""

import torch
import transformers
from protocol import Runner, answer


class Transformers(Runner):
    def __init__(self, model: str, dtype: str, threads: int) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self.model = self.model.to(self.device).eval()
        self.model.generation_config.eos_token_id = None

    def run(self, prompts: list[list[int]], num_new: list[int]) -> list[list[int]]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        out = self.model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=max(num_new), pad_token_id=0
        )
        return [row[:n] for row, n in zip(out[:, longest:].tolist(), num_new, strict=True)]


if __name__ == "__main__":
    answer(Transformers, "transformers", "torch")
