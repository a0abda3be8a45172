"""The workloads: how each is asked of an engine and timed."""

import random
import statistics
import time
from collections.abc import Callable, Iterator

from .engines import Decodes, Engine, Serves
from .tasks import Result, Task, random_tokens


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
