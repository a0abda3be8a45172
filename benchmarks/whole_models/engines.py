"""What generates, in a part's process: MeshLM, transformers' `generate`, and its continuous batching."""

import threading
import time
from _thread import interrupt_main
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from measuring import Clock, copy_bandwidth, reason

from .tasks import Task, random_tokens


class Engine:
    """Something that generates: a `Decodes`, a `Serves`, or both, as its workloads ask."""

    workloads: tuple[str, ...]

    def __init__(self, task: Task) -> None:
        self.task, self.notes = task, list[str]()

    def prepare(self, workload: str) -> None:
        """What a workload needs to have run once; not timed."""

    def of_limit(self, tokens_per_s: float) -> float | None:
        """Share of the decode rate that memory allows."""
        return None

    def close(self) -> None:
        pass


class Decodes(Engine, ABC):
    """An engine for one request."""

    @abstractmethod
    def generate(self, prompt: Sequence[int], num_new: int) -> None:
        """Greedily, to the end."""


class Serves(Engine, ABC):
    """An engine for many."""

    @abstractmethod
    def requests(self, prompts: list[list[int]], num_new: list[int], limit_s: float) -> int:
        """All of them at once, until they are done or the time is over: tokens that were generated."""


class MeshLM(Decodes, Serves):
    """Ours."""

    workloads = ("decode", "prefill", "requests")

    def __init__(self, task: Task) -> None:
        from meshlm import InferenceConfig, InferenceEngine

        super().__init__(task)
        self.copy_rate = copy_bandwidth(Clock(torch.device(task.device)), task.toy)
        given: dict[str, Any] = {"dtype": task.dtype}
        if task.toy:
            given["num_kv_blocks"] = 256
        if task.max_num_batched_tokens is not None:
            given["max_num_batched_tokens"] = task.max_num_batched_tokens
        config = InferenceConfig(
            device=task.device,
            attention_backend=task.attention_backend,
            enable_prefix_caching=False,
            **given,
        )
        self.engine = InferenceEngine(task.shape.config(), config)
        self.notes.append(f"copy bandwidth {self.copy_rate / 1e9:.4g} GB/s")
        self.notes.append(self.engine.describe_mesh().splitlines()[0])

    def params(self, num_new: int) -> Any:
        from meshlm import SamplingParams

        return SamplingParams(temperature=0.0, max_tokens=num_new, ignore_eos=True, detokenize=False)

    def generate(self, prompt: Sequence[int], num_new: int) -> None:
        (output,) = self.engine.generate([list(prompt)], self.params(num_new), progress=False)
        assert len(output.token_ids) == num_new

    def prepare(self, workload: str) -> None:
        self.generate(random_tokens(self.task, 16), 4)

    def requests(self, prompts: list[list[int]], num_new: list[int], limit_s: float) -> int:
        before = self.engine.stats().num_output_tokens
        with suppress(KeyboardInterrupt), interrupted_after(limit_s):
            self.engine.generate(prompts, [self.params(n) for n in num_new], progress=False)
        return self.engine.stats().num_output_tokens - before

    def of_limit(self, tokens_per_s: float) -> float | None:
        num_in, num_out = self.task.workloads.decode
        weights, num_keys = self.engine.ranks[0].weight_bytes, num_in + num_out / 2
        each = self.task.shape.bytes_per_token(weights, num_keys, getattr(torch, self.task.dtype).itemsize)
        return tokens_per_s * each / self.copy_rate

    def close(self) -> None:
        self.engine.close()


class Transformers(Engine):
    """A transformers model with random weights, made on the device."""

    def __init__(self, task: Task) -> None:
        from transformers import AutoModelForCausalLM, GenerationConfig

        super().__init__(task)
        dtype = getattr(torch, task.dtype)
        with torch.device(task.device):
            model = AutoModelForCausalLM.from_config(task.shape.config(), dtype=dtype, attn_implementation="sdpa")
        self.model = model.eval()
        self.model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)


class Generate(Transformers, Decodes):
    """transformers' `generate`."""

    workloads = ("decode", "prefill")

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.cache: dict[str, Any] = {}

    def prepare(self, workload: str) -> None:
        num_in, num_out = self.task.workloads.decode
        if workload == "decode":
            # One size for both lengths that are timed, or the second would be compiled for anew.
            self.cache = {"cache_implementation": "static", "max_cache_len": num_in + num_out}
            self.generate(random_tokens(self.task, num_in), num_out)  # compiles; the next one records the graph
        else:
            self.cache = {}

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], num_new: int) -> None:
        ids = torch.tensor([prompt], device=self.task.device)
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_new, **self.cache)
        assert out.shape[1] == len(prompt) + num_new
        out.tolist()  # waits


class Continuous(Transformers, Serves):
    """transformers' continuous batching."""

    workloads = ("requests",)

    @torch.no_grad()
    def prepare(self, workload: str) -> None:
        """A manager as `generate_batch` makes it, its graphs captured, which has served two requests."""
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig
        from transformers.generation.continuous_batching.utils import WorkloadHints

        longest = self.task.workloads.request_lens[1]
        # A toy must not take the machine's memory for its cache, as the default does.
        sizes: dict[str, Any] = {"num_blocks": 16, "max_batch_tokens": 64} if self.task.toy else {}
        for switch in (True, False):
            try:
                self.manager = self.model.init_continuous_batching(
                    GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=-1, max_new_tokens=longest),
                    ContinuousBatchingConfig(auto_switch_to_flash=switch, **sizes),
                    WorkloadHints(longest, longest, self.task.workloads.num_requests),
                )
                break
            except Exception as error:  # it may want a FlashAttention that it then cannot load
                if not switch:
                    raise
                self.notes.append(f"no FlashAttention: {reason(error)}")
        self.notes.append(f"continuous batching's attention: {self.model.config._attn_implementation}")
        self.manager.warmup()
        self.manager.start()
        self.requests([random_tokens(self.task, 16)] * 2, [4, 4], self.task.left())

    def requests(self, prompts: list[list[int]], num_new: list[int], limit_s: float) -> int:
        manager, num_done, num_tokens = self.manager, 0, 0
        ends_at = time.perf_counter() + limit_s
        for prompt, new in zip(prompts, num_new, strict=True):
            manager.add_request(prompt, max_new_tokens=new)
        while num_done < len(prompts) and time.perf_counter() < ends_at:
            output = manager.get_result(timeout=0.05)
            if output is None:
                if not manager.is_running():
                    raise RuntimeError("transformers' generation thread has ended") from (
                        manager.background_thread_status.fatal_error
                    )
            elif output.is_finished():
                if output.error is not None:
                    raise RuntimeError(output.error)
                num_done, num_tokens = num_done + 1, num_tokens + len(output.generated_tokens)
        if num_done < len(prompts):  # cut
            running = list(manager.batch_processor.scheduler.active_requests.values())
            num_tokens += sum(state.generated_len() for state in running)
        return num_tokens

    def close(self) -> None:
        self.manager.stop(block=True, timeout=5, hard_stop=True)


ENGINES: dict[str, type[Engine]] = {"meshlm": MeshLM, "generate": Generate, "continuous": Continuous}


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Ctrl-C for the block, after so long."""
    timer = threading.Timer(seconds, interrupt_main)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
