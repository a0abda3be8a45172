"""Tokens per second of whole models on a GPU, beside transformers in the same run, with random weights.

    decode      one request, 512 tokens in, 257 out: tokens/s after the first, from the time of all less the time of one
    prefill     one prompt of 2048 or 32768 tokens, one token out: prompt tokens/s
    requests    256 requests at once, each with 100-1024 tokens in and 100-1024 out (nano-vllm's workload): output
                tokens/s

    MeshLM      an engine as `InferenceEngine(config, InferenceConfig(…))` makes it; a transformers config as the model
                has its weights drawn on the device (the random-weights load path)
    of limit    of decode: the share of the tokens/s that memory allows, which are the measured bandwidth of copying
                1 GiB over the bytes that a token must read: all weights (but for an embedding table that is not the LM
                head too) and the keys and values of the tokens before it
    generate    transformers' `generate` with the same shape: for decode with a static cache and compiled, as it
                compiles itself, for prefill with its default cache; the first calls, which compile, are left out
    continuous  transformers' continuous batching, with its own defaults; it takes FlashAttention where it finds that,
                else torch's scaled_dot_product_attention, and a line before the table says which
    ratio       MeshLM's rate over the peer's in the row
    target      what must be reached, and whether it is. Exit code 1 if one is missed on a GPU

Targets: decode of the 8B model at 85 % of the limit; requests 3 times as fast as continuous batching. Prompts are the
same random token ids for all, draws are greedy, end tokens ignored, nothing is found in a prefix cache. Rates are of
medians of up to three rounds, but for `requests`: one round. "Qwen3-0.6B dims" are those of Qwen3-0.6B in a Llama:
MeshLM does not have Qwen3's norms of queries and keys yet, and transformers runs the same Llama.

Each engine and model is a part in a process of its own, which has the device's memory to itself. All parts together end
within --budget-s: each may take its share of the time that is left. Where `requests` does not end in time, it is cut:
its rate is that of the tokens until then, which leaves out the end, when few requests run, so that it is rather too
high; it bears the mark "cut". What a part had no time for at all, or failed at, is a line before the table.

With --profile a part more traces decode steps of MeshLM with torch.profiler and prints the operators that take the most
time, and the gaps in which the device waits for the host, by what ran before and after.

On a CPU, and with --toy, models and workloads are tiny, so that a run shows that the script works; no target is judged.
Results go to docs/results, as JSON and as the table in text; of a toy run only if --out says where.

    python benchmarks/gpu.py                              # under 8 minutes
    python benchmarks/gpu.py --profile --model llama --engine meshlm
    python benchmarks/gpu.py --toy
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from _thread import interrupt_main
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import (
    RESULTS,
    Clock,
    choose_device,
    copy_bandwidth,
    format_table,
    heading,
    reason,
    result_stem,
    where_and_when,
    write_results,
)

DECODE_TARGET = ("llama", 0.85)  # share of the limit
REQUESTS_TARGET = 3.0  # times continuous batching
GRACE_S = 8.0  # for a part to end by itself, once its time is over


@dataclass(frozen=True)
class Shape:
    """A model's sizes, as fields of a LlamaConfig."""

    label: str
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
        from transformers import LlamaConfig

        fields = asdict(self)
        del fields["label"]
        rope = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
        ends: dict[str, Any] = {
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }  # no token ends a request
        return LlamaConfig(architectures=["LlamaForCausalLM"], rope_parameters=rope, **ends, **fields)

    def bytes_per_token(self, weight_bytes: int, num_keys: float, element_bytes: int) -> float:
        """That decoding one token must read, with so many keys."""
        table = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size * element_bytes
        kv = 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * element_bytes
        return weight_bytes - table + num_keys * kv


MODELS = {
    "llama": Shape("Llama-3-8B", 4096, 14336, 32, 32, 8, 128, 128256, False, 500000.0, 131072),
    "qwen": Shape("Qwen3-0.6B dims", 1024, 3072, 28, 16, 8, 128, 151936, True, 1000000.0, 40960),
}
TOY_MODELS = {
    "llama": Shape("toy Llama", 64, 96, 2, 4, 2, 32, 500, False, 10000.0, 2048),
    "qwen": Shape("toy tied Llama", 32, 48, 2, 4, 2, 32, 300, True, 10000.0, 2048),
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


# ---- the engines: run in a part's process ---------------------------------------------------------------------------


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


def random_tokens(task: Task, count: int, seed: object = 0) -> list[int]:
    rng = random.Random(f"{seed}")
    return [rng.randrange(task.shape.vocab_size) for _ in range(count)]


def seconds_of(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def timed_rounds(task: Task, call: Callable[[int], float]) -> list[float]:
    """What `call` gives for each round, of which the first warms up, while there is time."""
    started = time.time()
    call(0)
    longest, values = time.time() - started, list[float]()
    while len(values) < task.workloads.rounds and (not values or task.left() > longest):
        values.append(call(1 + len(values)))
    return values


def decode(task: Task, engine: Engine, named: Callable[..., Result]) -> Iterator[Result]:
    assert isinstance(engine, Decodes)
    num_in, num_out = task.workloads.decode

    def one(round_: int) -> float:
        """Seconds of the tokens after the first."""
        prompt = random_tokens(task, num_in, f"decode {round_}")
        first = seconds_of(lambda: engine.generate(prompt, 1))
        return seconds_of(lambda: engine.generate(prompt, num_out)) - first

    times = timed_rounds(task, one)
    seconds = statistics.median(times)
    if seconds <= 0:
        yield named("decode", None, seconds, len(times), failure=f"{num_out} tokens took no longer than one")
        return
    rate = (num_out - 1) / seconds
    yield named("decode", rate, seconds, len(times), of_limit=engine.of_limit(rate))


def prefill(task: Task, engine: Engine, named: Callable[..., Result]) -> Iterator[Result]:
    assert isinstance(engine, Decodes)
    for length in task.workloads.prefill:

        def one(round_: int, length: int = length) -> float:
            prompt = random_tokens(task, length, f"prefill {round_}")
            return seconds_of(lambda: engine.generate(prompt, 1))

        times = timed_rounds(task, one)
        seconds = statistics.median(times)
        yield named(f"prefill {length}", length / seconds, seconds, len(times))


def requests(task: Task, engine: Engine, named: Callable[..., Result]) -> Iterator[Result]:
    assert isinstance(engine, Serves)
    rng, work = random.Random("requests"), task.workloads
    lens = [(rng.randint(*work.request_lens), rng.randint(*work.request_lens)) for _ in range(work.num_requests)]
    prompts = [random_tokens(task, num_in, f"request {index}") for index, (num_in, _) in enumerate(lens)]
    num_new = [num_out for _, num_out in lens]
    started = time.perf_counter()
    num_tokens = engine.requests(prompts, num_new, max(1.0, task.left() - 2))
    seconds = time.perf_counter() - started
    name = f"{work.num_requests} requests"
    if not num_tokens:
        yield named(name, None, seconds, failure="no token came in time")
    else:
        yield named(name, num_tokens / seconds, seconds, 1, cut=num_tokens < sum(num_new))


MEASUREMENTS: dict[str, Callable[[Task, Engine, Callable[..., Result]], Iterator[Result]]] = {
    "decode": decode,
    "prefill": prefill,
    "requests": requests,
}


def run_part(tasks: Sequence[Task], results: Path) -> None:
    """Works in a process of its own; each result goes to the end of a file as soon as it is there."""

    def write(kind: str, value: Any) -> None:
        with results.open("a") as file:
            file.write(json.dumps({"kind": kind, "value": value}) + "\n")

    signal.signal(signal.SIGINT, signal.default_int_handler)  # `interrupted_after` needs it, whatever the shell did
    for task in tasks:
        if task.device != "cpu":
            torch.cuda.set_device(torch.device(task.device))
        for name in task.engines:
            label = f"{task.shape.label}, {name}"
            say(f"{label}: loading, {task.left():.0f} s left")
            engine = None
            try:
                engine = (MeshLM if name == "profile" else ENGINES[name])(task)
                if name == "profile":
                    assert isinstance(engine, MeshLM)
                    write("profile", profile(task, engine))
                    continue
                for workload in engine.workloads:
                    if task.left() < 0:
                        raise TimeoutError(f"no time was left for {workload}")
                    try:
                        engine.prepare(workload)
                        for result in MEASUREMENTS[workload](task, engine, partial(Result, task.model, name)):
                            write("result", asdict(result))
                            rate = result.failure or f"{result.tokens_per_s:.5g} tokens/s"
                            cut = ", cut" if result.cut else ""
                            say(f"{label}: {result.workload}: {rate}{cut}; {task.left():.0f} s left")
                    except TimeoutError:
                        raise
                    except Exception as error:  # one that fails to compile, say, must not take the next with it
                        traceback.print_exc()
                        write("note", f"{label}, {workload}: FAILED: {reason(error)}")
                        torch._dynamo.reset()
            except Exception as error:  # a part that fails must not take the others' figures with it
                if not isinstance(error, TimeoutError):
                    traceback.print_exc()
                write("note", f"{label}: FAILED: {reason(error)}")
            finally:
                if engine is not None:
                    for note in engine.notes:
                        write("note", f"{label}: {note}")
                    with suppress(Exception):
                        engine.close()


# ---- the trace of a decode step -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """Something that ran, in microseconds of the trace."""

    name: str
    start: float
    end: float


def profile(task: Task, ours: MeshLM) -> dict[str, Any]:
    """Traces decode steps and prints what they are made of."""
    num_in, num_steps = task.workloads.profile
    engine, activities = ours.engine, [torch.profiler.ProfilerActivity.CPU]
    if task.device != "cpu":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    for index in range(task.profile_seqs):
        engine.add_request(random_tokens(task, num_in, f"profile {index}"), ours.params(2 * num_steps + 16))
    started: set[str] = set()
    while len(started) < task.profile_seqs:  # prompts
        started |= {output.request_id for output in engine.step()}
    for _ in range(4):
        engine.step()
    with torch.profiler.profile(activities=activities) as trace:
        begin = time.perf_counter()
        for _ in range(num_steps):
            engine.step()
        step_us = (time.perf_counter() - begin) / num_steps * 1e6
    for request_id in started:
        engine.abort(request_id)

    events = [event for event in trace.events() if not getattr(event, "is_user_annotation", False)]
    of_device = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    what = "device" if of_device else "host"  # on a CPU, torch's own operators; C++ ops are gaps there
    chosen = of_device or [event for event in events if event.cpu_parent is None]
    spans = [Span(event.name, event.time_range.start, event.time_range.end) for event in chosen]
    found = summary(spans, num_steps) | {"step_us": step_us, "what": what, "num_seqs": task.profile_seqs}
    found |= {"model": task.shape.label, "host_operators_us": operators(events, num_steps)}
    print("\n".join(told(found)), flush=True)
    return found


def summary(spans: Sequence[Span], num_steps: int) -> dict[str, Any]:
    """Of each step: the kernels that take the most time, and the gaps between kernels, by the two around them."""
    by_name, counts, gaps, gap_counts = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    ordered = sorted(spans, key=lambda span: span.start)
    busy = 0.0
    last: Span | None = None  # that ends the latest so far
    for span in ordered:
        by_name[span.name] += span.end - span.start  # type: ignore[assignment]
        counts[span.name] += 1
        if last is not None and span.start > last.end:
            pair = f"{last.name[:44]} -> {span.name[:44]}"
            gaps[pair] += span.start - last.end  # type: ignore[assignment]
            gap_counts[pair] += 1
        busy += max(0.0, span.end - max(span.start, last.end if last else span.start))
        if last is None or span.end > last.end:
            last = span
    whole = last.end - ordered[0].start if last is not None else 0.0
    return {
        "launches": len(spans) / num_steps,
        "busy_us": busy / num_steps,
        "idle_us": (whole - busy) / num_steps,
        "kernels": [(name, us / num_steps, counts[name] / num_steps) for name, us in by_name.most_common(15)],
        "gaps": [(pair, us / num_steps, gap_counts[pair] / num_steps) for pair, us in gaps.most_common(10)],
    }


def operators(events: Sequence[Any], num_steps: int) -> list[tuple[str, float, float]]:
    """The host's time in each operator itself, a step."""
    times, counts = Counter[str](), Counter[str]()
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CPU:
            times[event.name] += event.self_cpu_time_total
            counts[event.name] += 1
    return [(name, us / num_steps, counts[name] / num_steps) for name, us in times.most_common(10)]


def told(found: dict[str, Any]) -> list[str]:
    lines = [
        f"decode step of {found['model']}, {found['num_seqs']} sequences, while traced (the trace itself takes time): "
        f"{found['step_us']:.0f} us; {found['what']} busy {found['busy_us']:.0f} us, idle {found['idle_us']:.0f} us; "
        f"{found['launches']:.0f} launches"
    ]
    for title, key in (
        (f"{found['what']}: time by kernel", "kernels"),
        (f"{found['what']}: gaps between kernels", "gaps"),
        ("host: own time by operator", "host_operators_us"),
    ):
        rows = [[name[:92], f"{us:.1f}", f"{count:.1f}", ""] for name, us, count in found[key]]
        lines += ["", *format_table([title, "us a step", "times", ""], rows, 1)]
    return lines


# ---- the parts, and what is printed: the driver's process -----------------------------------------------------------

SHARES_S = {  # of the time, one to another
    ("llama", "meshlm"): 95,
    ("qwen", "meshlm"): 50,
    ("llama", "generate"): 110,
    ("qwen", "generate"): 65,
    ("llama", "continuous"): 90,
    ("qwen", "continuous"): 50,
    ("llama", "profile"): 40,
    ("qwen", "profile"): 30,
}


def run_in_child(tasks: Sequence[Task], timeout_s: float) -> list[dict[str, Any]]:
    """What a part wrote before it ended, or was ended."""
    with tempfile.TemporaryDirectory(prefix="meshlm-gpu-") as directory:
        results = Path(directory) / "results"
        results.touch()
        part = json.dumps([asdict(task) for task in tasks])
        command = [sys.executable, __file__, "--part", part, "--part-results", str(results)]
        process = subprocess.Popen(command, start_new_session=True)
        note = None
        try:
            if process.wait(timeout_s) != 0:
                note = f"its process ended with exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            note = f"ended after {timeout_s:.0f} s: what is missing had no time"
        finally:
            with suppress(ProcessLookupError):  # its own children too: compilers
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        lines = [json.loads(line) for line in results.read_text().splitlines(keepends=True) if line.endswith("\n")]
    if note is not None:
        names = ", ".join(f"{task.shape.label}, {' and '.join(task.engines)}" for task in tasks)
        lines.append({"kind": "note", "value": f"{names}: {note}"})
    return lines


@dataclass(frozen=True)
class Line:
    """A row of the table: a workload of a model."""

    model: str
    workload: str
    by_engine: dict[str, Result]

    @property
    def ratio(self) -> float | None:
        """Ours over the peer's."""
        ours, *peers = (self.by_engine.get(name) for name in ENGINES)
        rates = [peer.tokens_per_s for peer in peers if peer is not None and peer.tokens_per_s]
        return ours.tokens_per_s / rates[0] if ours is not None and ours.tokens_per_s and rates else None

    @property
    def target(self) -> tuple[str, float, float | None] | None:
        """(in words, what is to be reached, what is)."""
        if self.workload == "decode" and self.model == DECODE_TARGET[0]:
            ours = self.by_engine.get("meshlm")
            return f"{DECODE_TARGET[1]:.0%} of limit", DECODE_TARGET[1], None if ours is None else ours.of_limit
        if self.workload.endswith("requests"):
            return f"ratio {REQUESTS_TARGET:g}", REQUESTS_TARGET, self.ratio
        return None

    @property
    def met(self) -> bool | None:
        """None where nothing is to be met, or a peer's figure is missing."""
        if self.target is None:
            return None
        ours = self.by_engine.get("meshlm")
        if ours is None or ours.tokens_per_s is None:
            return False
        _, wanted, reached = self.target
        return None if reached is None else reached >= wanted


def lines_of(results: Sequence[Result], tasks: Sequence[Task]) -> list[Line]:
    """A line for each workload that was to be measured, found or not."""
    lines = []
    for model in dict.fromkeys(task.model for task in tasks):
        work = next(task.workloads for task in tasks if task.model == model)
        for workload in ("decode", *(f"prefill {n}" for n in work.prefill), f"{work.num_requests} requests"):
            found = [result for result in results if (result.model, result.workload) == (model, workload)]
            lines.append(Line(model, workload, {result.engine: result for result in found}))
    return lines


def table(lines: Sequence[Line], shapes: dict[str, Shape], judged: bool) -> list[str]:
    def rate(result: Result | None) -> str:
        if result is None or result.tokens_per_s is None:
            return "-"
        return f"{result.tokens_per_s:.5g}" + (" cut" if result.cut else "")

    cells = []
    for line in lines:
        ours = line.by_engine.get("meshlm")
        target = ""
        if judged and line.target is not None:
            verdict = "no figure to compare with" if line.met is None else "ok" if line.met else "MISSED"
            target = f"{line.target[0]}: {verdict}"
        cells.append(
            [
                shapes[line.model].label,
                line.workload,
                rate(ours),
                "-" if ours is None or ours.of_limit is None else f"{ours.of_limit:.1%}",
                rate(line.by_engine.get("generate")),
                rate(line.by_engine.get("continuous")),
                "-" if line.ratio is None else f"{line.ratio:.2f}",
                target,
            ]
        )
    columns = ["model", "tokens/s", "MeshLM", "of limit", "generate", "continuous", "ratio", "target"]
    return format_table(columns, cells, 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="tiny models and workloads (always on a CPU)")
    parser.add_argument("--device", default="auto", help="cuda, cuda:N or cpu")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--engine", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--profile", action="store_true", help="trace decode steps too")
    parser.add_argument("--profile-seqs", type=int, default=1, help="sequences in a traced step")
    parser.add_argument("--attention-backend", default="auto", help="of MeshLM")
    parser.add_argument("--max-num-batched-tokens", type=int, help="of MeshLM (default: its own)")
    parser.add_argument("--budget-s", type=float, default=450.0, help="seconds that all parts together may take")
    parser.add_argument(
        "--out", type=Path, help="folder for the results (default: docs/results, or none for a toy run)"
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--part-results", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part is not None:
        run_part(
            [Task(**{**task, "engines": tuple(task["engines"])}) for task in json.loads(args.part)], args.part_results
        )
        return 0

    began = time.time()
    device = choose_device(args.device)
    toy = args.toy or device.type != "cuda"
    engines = [*args.engine, *(["profile"] if args.profile else [])]
    planned = [key for key in SHARES_S if key[0] in args.model and key[1] in engines]

    def task(model: str, engines: tuple[str, ...], ends_at: float) -> Task:
        options = (args.max_num_batched_tokens, args.attention_backend, args.profile_seqs)
        return Task(model, engines, str(device), toy, ends_at, *options)

    where = where_and_when(device)
    print("\n".join(heading(where)), flush=True)
    tasks, written = list[Task](), list[dict[str, Any]]()
    if toy:  # one process for all: most of its time is that of imports
        ends_at = began + args.budget_s
        tasks = [task(model, (engine,), ends_at) for model, engine in planned]
        written = run_in_child(tasks, args.budget_s + GRACE_S)
    else:
        for index, (model, engine) in enumerate(planned):
            left = began + args.budget_s - time.time()
            allotted = left * SHARES_S[model, engine] / sum(SHARES_S[key] for key in planned[index:])
            tasks.append(task(model, (engine,), time.time() + allotted - GRACE_S))
            written += run_in_child(tasks[-1:], allotted)

    results = [Result(**line["value"]) for line in written if line["kind"] == "result"]
    notes = [line["value"] for line in written if line["kind"] == "note"]
    lines, judged = lines_of(results, tasks), not toy and "meshlm" in engines
    missed = [line for line in lines if line.met is False]
    text = [*heading(where), *notes, "", *table(lines, TOY_MODELS if toy else MODELS, judged)]
    text.append("toy sizes: targets are not judged" if toy else f"{time.time() - began:.0f} s in all")
    out = args.out or (None if toy else RESULTS)
    if out is not None:
        result = {
            **where,
            "toy": toy,
            "seconds": time.time() - began,
            "met": not missed if judged else None,
            "notes": notes,
            "results": [asdict(result) for result in results],
            "lines": [
                {
                    "model": line.model,
                    "workload": line.workload,
                    "ratio": line.ratio,
                    "met": line.met if judged else None,
                }
                for line in lines
            ],
            "profiles": [line["value"] for line in written if line["kind"] == "profile"],
        }
        print(f"written: {write_results(out, result_stem('gpu', where), result, text)}")
    print("\n" + "\n".join(text))
    return 1 if judged and missed else 0


if __name__ == "__main__":
    sys.exit(main())
