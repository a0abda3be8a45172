"""What there is to do: models, workloads, a part's task, and what comes of it. All of it is plain."""

import random
import time
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A model's sizes, as fields of its family's config in transformers."""

    label: str
    family: str  # as in `LlamaConfig`, `LlamaForCausalLM`
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    rope_theta: float
    max_position_embeddings: int

    def config(self) -> Any:
        import transformers

        fields = asdict(self)
        family = fields.pop("family")
        del fields["label"]
        rope = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
        ends: dict[str, Any] = {
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }  # no token ends a request
        new = getattr(transformers, f"{family}Config")
        return new(architectures=[f"{family}ForCausalLM"], rope_parameters=rope, **ends, **fields)

    def bytes_per_token(self, weight_bytes: int, num_keys: float, element_bytes: int) -> float:
        """That decoding one token must read, with so many keys."""
        table = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size * element_bytes
        kv = 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * element_bytes
        return weight_bytes - table + num_keys * kv


MODELS = {
    "llama": Shape("Llama-3-8B", "Llama", 4096, 14336, 32, 32, 8, 128, 128256, False, 500000.0, 131072),
    "qwen": Shape("Qwen3-0.6B", "Qwen3", 1024, 3072, 28, 16, 8, 128, 151936, True, 1000000.0, 40960),
}
TOY_MODELS = {
    "llama": Shape("toy Llama", "Llama", 64, 96, 2, 4, 2, 32, 500, False, 10000.0, 2048),
    "qwen": Shape("toy Qwen3", "Qwen3", 32, 48, 2, 4, 2, 32, 300, True, 10000.0, 2048),
}


@dataclass(frozen=True)
class Workloads:
    """How much is asked for; all counts are tokens but for `num_requests`."""

    decode: tuple[int, int]  # in, out
    prefill: tuple[int, ...]
    num_requests: int
    request_lens: tuple[int, int]  # least and most, of prompts and of outputs
    rounds: int
    profile: tuple[int, int]  # prompt, steps


FULL = Workloads((512, 257), (2048, 32768), 256, (100, 1024), 3, (512, 16))
TOY = Workloads((12, 17), (20, 48), 6, (4, 12), 3, (8, 3))


@dataclass(frozen=True)
class Result:
    """One workload of one engine."""

    model: str
    engine: str
    workload: str
    tokens_per_s: float | None
    seconds: float | None = None  # of a round
    rounds: int = 0
    cut: bool = False
    of_limit: float | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Task:
    """What a part's process is to do; everything in it is plain."""

    model: str
    engines: tuple[str, ...]
    device: str
    toy: bool
    ends_at: float  # time.time()
    max_num_batched_tokens: int | None
    attention_backend: str
    profile_seqs: int

    @property
    def shape(self) -> Shape:
        return (TOY_MODELS if self.toy else MODELS)[self.model]

    @property
    def workloads(self) -> Workloads:
        return TOY if self.toy else FULL

    @property
    def dtype(self) -> str:
        return "float32" if self.device == "cpu" else "bfloat16"

    def left(self) -> float:
        """Seconds."""
        return self.ends_at - time.time()


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def random_tokens(task: Task, count: int, seed: object = 0) -> list[int]:
    rng = random.Random(f"{seed}")
    return [rng.randrange(task.shape.vocab_size) for _ in range(count)]
