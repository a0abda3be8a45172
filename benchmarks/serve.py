"""The server under load, and what HTTP costs.

    overhead  the same chats to a server by --streams concurrent streams and to an engine in this process, in turns:
              output tokens a second over HTTP must be at least 95 % of those without (median of the rounds' ratios)
    load      --clients concurrent streaming clients for --seconds; of their requests 20 % are left in the middle, 5 %
              are garbage. Afterwards must hold:
                answers     every stream that ended is token for token what an engine in this process says for its seed,
                            whatever it was batched with; of one that was left, what came is the beginning of that
                statuses    200; garbage gets 4xx; whoever is refused gets 429 or 503 with Retry-After; nothing else
                memory      resident memory of the server is flat: a line fitted to the last two thirds of the run rises
                            by at most 2 % (judged from 60 s on; before, the KV cache is touched for the first time)
                blocks      all blocks of the KV cache are free, no request is left
                end         after SIGTERM it exits with 0, and has written no traceback

The server is a process of its own; clients and engine are in this one. Exit code 1 if something is missed.

    python benchmarks/serve.py
    python benchmarks/serve.py --part load --clients 20 --seconds 10
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from meshlm.config import InferenceConfig, SamplingParams
from meshlm.engine import InferenceEngine
from meshlm.serving.bench.client import Reply, Target, new_client, read_answer, send
from meshlm.serving.bench.workloads import Asked, Workload, make_requests
from meshlm.serving.demo_model import demo_model_path

NAME = "demo"
MIN_RATIO = 0.95  # of output tokens a second, over HTTP to offline
MAX_GROWTH = 0.02  # of resident memory
SHORTEST_S = 60  # for memory to be judged
DROPPED, GARBAGE = 0.20, 0.05  # of the requests
MAX_QUEUED = 100
CONFIG: dict[str, Any] = {"max_num_seqs": 64, "num_kv_blocks": 1024}
START_S, END_S = 180, 30
MIB = 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["overhead", "load"], action="append", help="default: both")
    parser.add_argument(
        "--model", default=None, help="a model directory with a chat template (default: the demo model)"
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--streams", type=int, default=32, help="of overhead")
    parser.add_argument("--output-len", type=int, default=64, help="tokens of each answer, of overhead")
    parser.add_argument("--rounds", type=int, default=3, help="of overhead, after one that warms up")
    parser.add_argument("--clients", type=int, default=200, help="of load")
    parser.add_argument("--seconds", type=float, default=180.0, help="of load")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--serve", metavar="PORT", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    model = args.model or str(demo_model_path())
    if args.serve:
        return serve_here(model, args.dtype, args.serve)
    results: dict[str, Any] = {}
    for part in args.part or ["overhead", "load"]:
        results[part] = (overhead if part == "overhead" else load)(model, args)
        if not args.json:
            print("\n".join(results[part].pop("table")), flush=True)
    if args.json:
        for result in results.values():
            result.pop("table")
        print(json.dumps(results, indent=2))
    return 0 if all(result["met"] for result in results.values()) else 1


# ---- the server, in a process of its own -----------------------------------------------------------------------------


def serve_here(model: str, dtype: str, port: int) -> int:
    """Serves, and answers each line on stdin with the engine's state as a line on stdout."""
    from meshlm.engine.async_engine import AsyncInferenceEngine
    from meshlm.serving.api import Service
    from meshlm.serving.serve import serve

    def new_service(engine: AsyncInferenceEngine) -> Service:
        def tell() -> None:
            for _ in sys.stdin:
                print(json.dumps([asdict(replica) for replica in engine.stats().replicas]), flush=True)

        threading.Thread(target=tell, daemon=True).start()
        return Service(engine, (NAME,))

    config = InferenceConfig(dtype=dtype, **CONFIG)
    return serve(
        model, config, new_service=new_service, host="127.0.0.1", port=port, drain_s=10.0, max_queued=MAX_QUEUED
    )


class Server:
    """The process, seen from outside."""

    def __init__(self, process: subprocess.Popen[str], port: int, log: Path) -> None:
        self.process, self.url, self._log = process, f"http://127.0.0.1:{port}", log

    def target(self, **values: Any) -> Target:
        return Target(self.url, NAME, **values)

    def replicas(self) -> list[dict[str, int]]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("state\n")
        self.process.stdin.flush()
        found: list[dict[str, int]] = json.loads(self.process.stdout.readline())
        return found

    def is_idle(self) -> bool:
        """No request is left and all blocks are free."""
        return all(
            (r["num_waiting"], r["num_running"], r["num_free_blocks"]) == (0, 0, r["num_blocks"])
            for r in self.replicas()
        )

    def rss_bytes(self) -> int:
        """With the ranks that it has started."""
        found = psutil.Process(self.process.pid)
        return sum(process.memory_info().rss for process in (found, *found.children(recursive=True)))

    def end(self) -> int | None:
        """Its exit code; None if it had to be killed."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return None

    def log(self) -> str:
        return self._log.read_text()


@contextlib.contextmanager
def started_server(model: str, dtype: str) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "--model", model, "--dtype", dtype, "--serve", str(port)]
    with tempfile.TemporaryDirectory(prefix="meshlm-serve-") as folder:
        log = Path(folder) / "stderr"
        with log.open("w") as stderr:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True)
        server = Server(process, port, log)
        try:
            _wait_until_ready(server)
            yield server
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()


def _wait_until_ready(server: Server) -> None:
    latest = time.monotonic() + START_S
    while time.monotonic() < latest:
        if server.process.poll() is not None:
            break
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{server.url}/health/ready", timeout=5):
            return
        time.sleep(0.2)
    sys.exit(f"the server does not come up:\n{server.log()}")


# ---- what HTTP costs -------------------------------------------------------------------------------------------------


def overhead(model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Pairs of the same workload over HTTP and without, each the first in turns."""
    rounds = []
    with (
        started_server(model, args.dtype) as server,
        InferenceEngine(model, InferenceConfig(dtype=args.dtype, **CONFIG)) as engine,
    ):
        ways: dict[str, Callable[[list[Asked]], float]] = {
            "http": lambda requests: asyncio.run(over_http(server, requests)),
            "offline": lambda requests: offline(engine, requests),
        }
        for number in range(args.rounds + 1):
            workload = Workload("fixed", args.streams, 64, args.output_len, seed=args.seed + number)
            requests = make_requests(workload)  # of its own for each round: nothing is in a prefix cache
            order = list(ways) if number % 2 else list(ways)[::-1]
            rounds.append({name: ways[name](requests) for name in order})
    rounds = rounds[1:]
    ratio = statistics.median(pair["http"] / pair["offline"] for pair in rounds)
    met = ratio >= MIN_RATIO
    table = [f"overhead: {args.streams} streams of {args.output_len} tokens, {args.dtype}, output tokens/s"]
    table += [
        f"  http {p['http']:8.1f}   offline {p['offline']:8.1f}   ratio {p['http'] / p['offline']:.3f}" for p in rounds
    ]
    table += [f"  {'met' if met else 'MISSED'}: median ratio {ratio:.3f}, target {MIN_RATIO}"]
    return {"rounds": rounds, "ratio": ratio, "target": MIN_RATIO, "met": met, "table": table}


async def over_http(server: Server, requests: list[Asked]) -> float:
    """Output tokens a second."""
    target = server.target(temperature=0.0)
    async with new_client(target) as client:
        replies = await asyncio.gather(*(send(client, target, asked) for asked in requests))
    answers = [read_answer(reply) for reply in replies]
    assert [answer.error for answer in answers] == [None] * len(requests), answers
    assert [answer.num_output for answer in answers] == [asked.num_output for asked in requests]
    duration = max(reply.ended_s for reply in replies) - min(reply.sent_s for reply in replies)
    return sum(asked.num_output for asked in requests) / duration


def offline(engine: InferenceEngine, requests: list[Asked]) -> float:
    prompts: list[Any] = [[{"role": "user", "content": asked.prompt}] for asked in requests]
    params = [SamplingParams(temperature=0, max_tokens=asked.num_output, ignore_eos=True) for asked in requests]
    begun = time.perf_counter()
    outputs = engine.generate(prompts, params, progress=False)
    duration = time.perf_counter() - begun
    assert [len(output.token_ids) for output in outputs] == [asked.num_output for asked in requests]
    return sum(asked.num_output for asked in requests) / duration


# ---- the load test ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A request whose answer is known."""

    content: str
    seed: int
    temperature: float
    max_tokens: int
    text: str = ""
    num_output: int = 0

    @property
    def body(self) -> dict[str, Any]:
        return {
            "model": NAME,
            "messages": [{"role": "user", "content": self.content}],
            "seed": self.seed,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


@dataclass
class Tally:
    """What clients have seen."""

    outcomes: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def fault(self, text: str) -> None:
        self.outcomes["FAULTS"] += 1
        self.faults.append(text)


def known_cases(model: str, dtype: str, seed: int, count: int = 64) -> tuple[list[Case], int]:
    """Requests with their answers, from an engine in this process; and how many were left out, since another batch gave
    another answer: two tokens as good as equal, which no server could tell apart either."""
    rng = random.Random(seed)
    contents = [asked.prompt for asked in make_requests(Workload("fixed", count, 12, seed=seed))]
    cases = [
        Case(f"Tell me about: {content}", rng.randrange(2**31), rng.choice((0.0, 0.7, 1.0)), rng.randint(8, 48))
        for content in contents
    ]
    with InferenceEngine(model, InferenceConfig(dtype=dtype, **CONFIG)) as engine:

        def answers(some: list[Case]) -> list[Case]:
            prompts: list[Any] = [[{"role": "user", "content": case.content}] for case in some]
            params = [SamplingParams(temperature=c.temperature, seed=c.seed, max_tokens=c.max_tokens) for c in some]
            outputs = engine.generate(prompts, params, progress=False)
            return [
                Case(case.content, case.seed, case.temperature, case.max_tokens, output.text, len(output.token_ids))
                for case, output in zip(some, outputs, strict=True)
            ]

        together = answers(cases)
        apart = [case for first in range(0, count, 5) for case in answers(cases[first : first + 5])]
    agreed = [case for case, other in zip(together, apart, strict=True) if case == other]
    return agreed, count - len(agreed)


async def clients_for(server: Server, cases: list[Case], tally: Tally, args: argparse.Namespace) -> list[list[float]]:
    """Lets all clients work until the time is up; the server's memory every second, as (seconds, bytes)."""
    began = time.monotonic()
    memory: list[list[float]] = []

    async def watch() -> None:
        while True:
            memory.append([time.monotonic() - began, server.rss_bytes()])
            await asyncio.sleep(1)

    async def work(number: int, client: httpx.AsyncClient) -> None:
        rng = random.Random(f"{args.seed} {number}")
        while time.monotonic() < began + args.seconds:
            dice = rng.random()
            if dice < GARBAGE:
                await send_garbage(client, server, rng.randrange(len(GARBAGE_BODIES) + 1), tally)
            else:
                await ask(client, rng, rng.choice(cases), dice < GARBAGE + DROPPED, tally)

    async with new_client(server.target()) as client:
        for kind in range(len(GARBAGE_BODIES) + 1):  # each once, however short the run
            await send_garbage(client, server, kind, tally)
        began = time.monotonic()
        watching = asyncio.create_task(watch())
        await asyncio.gather(*(work(number, client) for number in range(args.clients)))
        watching.cancel()
    return memory


async def ask(client: httpx.AsyncClient, rng: random.Random, case: Case, leaves: bool, tally: Tally) -> None:
    """One stream. leaves: in the middle, after so many pieces or, if they are slow to come, so many seconds."""
    most_pieces, most_s = (rng.randrange(1, 12), rng.uniform(0.05, 10)) if leaves else (None, None)
    reply = Reply(sent_s=time.perf_counter())
    try:
        async with (
            asyncio.timeout(most_s),
            client.stream("POST", "/chat/completions", json=case.body) as response,
        ):
            reply.status, reply.retry_after = response.status_code, response.headers.get("Retry-After")
            async for piece in response.aiter_raw():
                reply.pieces.append((time.perf_counter(), piece))
                if len(reply.pieces) == most_pieces:
                    break
    except TimeoutError:
        pass
    except httpx.HTTPError as error:
        reply.error = f"{type(error).__name__}: {error}"
    tally.statuses[reply.status or 0] += 1
    if reply.status in (429, 503) and reply.retry_after is not None:
        tally.outcomes["refused"] += 1
        await asyncio.sleep(min(5.0, float(reply.retry_after)) * rng.random())
    elif reply.error is not None or reply.status not in (200, None) or (reply.status is None and not leaves):
        tally.fault(f"status {reply.status}, Retry-After {reply.retry_after}: {read_answer(reply).error}")
    elif leaves:
        judge_beginning(case, reply, tally)
    else:
        judge_whole(case, reply, tally)


def judge_whole(case: Case, reply: Reply, tally: Tally) -> None:
    answer = read_answer(reply)
    found, known = (answer.text, answer.num_output), (case.text, case.num_output)
    if answer.error is not None or found != known:
        tally.fault(f"seed {case.seed}: {answer.error or ''} {found} instead of {known}")
    else:
        tally.outcomes["whole"] += 1


def judge_beginning(case: Case, reply: Reply, tally: Tally) -> None:
    answer = read_answer(Reply(reply.sent_s, 200, reply.pieces))
    if not case.text.startswith(answer.text):
        tally.fault(f"seed {case.seed}: {answer.text!r} is no beginning of {case.text!r}")
    else:
        tally.outcomes["left"] += 1


MESSAGE = {"role": "user", "content": "Hello"}
ASKED: dict[str, Any] = {"model": NAME, "messages": [MESSAGE], "max_tokens": 4}
GARBAGE_BODIES: list[dict[str, Any]] = [  # what httpx is to send to the chat route
    {"content": b'{"messages": ['},
    {"content": bytes(range(256)) * 100},
    {"content": b"[" * 100_000},
    {"content": b""},
    {"json": {**ASKED, "messages": "Hello"}},
    {"json": {**ASKED, "messages": []}},
    {"json": {**ASKED, "messages": [{**MESSAGE, "content": "long " * 20_000}]}},
    {"json": {**ASKED, "temperature": -5}},
    {"json": {**ASKED, "max_tokens": "many"}},
    {"json": {**ASKED, "n": 0}},
    {"json": {**ASKED, "model": "no-such-model"}},
    {"method": "GET"},
    {"url": "/nothing-here", "json": ASKED},
]


async def send_garbage(client: httpx.AsyncClient, server: Server, kind: int, tally: Tally) -> None:
    """Something that is no request; it is to be told so."""
    if kind == len(GARBAGE_BODIES):
        await send_noise(server, tally)
        return
    garbage = GARBAGE_BODIES[kind]
    try:
        response = await client.request(**{"method": "POST", "url": "/chat/completions", **garbage})
    except httpx.HTTPError as error:
        tally.fault(f"garbage {kind}: {type(error).__name__}: {error}")
        return
    tally.statuses[response.status_code] += 1
    if 400 <= response.status_code < 500:
        tally.outcomes["garbage"] += 1
    else:
        tally.fault(f"garbage {kind} was answered with {response.status_code}: {response.text[:200]}")


async def send_noise(server: Server, tally: Tally) -> None:
    """Bytes that are not HTTP: the connection is to be closed, with 400 or nothing."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
    answer = b""
    try:
        writer.write(b"\x16\x03\x01" + bytes(range(256)) + b"\r\n\r\n")
        answer = await asyncio.wait_for(reader.read(200), 30)
    except (OSError, TimeoutError) as error:
        if isinstance(error, TimeoutError):
            tally.fault("bytes that are not HTTP: the connection stays open")
    finally:
        writer.close()
    if answer and not answer.startswith(b"HTTP/1.1 4"):
        tally.fault(f"bytes that are not HTTP were answered with {answer!r}")
    tally.outcomes["garbage"] += 1


def growth_of(memory: list[list[float]]) -> tuple[float, float]:
    """(share by which a line fitted to the last two thirds rises, MiB a minute)."""
    late = [sample for sample in memory if sample[0] >= memory[-1][0] / 3]
    if len(late) < 3:
        return 0.0, 0.0
    slope, start = statistics.linear_regression([moment for moment, _ in late], [size for _, size in late])
    first, last = (start + slope * late[index][0] for index in (0, -1))
    return (last - first) / first, slope * 60 / MIB


def load(model: str, args: argparse.Namespace) -> dict[str, Any]:
    cases, num_left_out = known_cases(model, args.dtype, args.seed)
    tally = Tally()
    with started_server(model, args.dtype) as server:
        memory = asyncio.run(clients_for(server, cases, tally, args))
        latest = time.monotonic() + END_S
        while not (idle := server.is_idle()) and time.monotonic() < latest:
            time.sleep(0.2)
        replicas = server.replicas()
        code, log = server.end(), server.log()
    growth, slope = growth_of(memory)
    judged = args.seconds >= SHORTEST_S
    whole = tally.outcomes["whole"]
    checks = {
        "answers and statuses": (not tally.faults and whole > 0, _outcomes(tally)),
        "memory": (
            growth <= MAX_GROWTH or not judged,
            f"{memory[-1][1] / MIB:.0f} MiB, {growth:+.2%} fitted ({slope:+.1f} MiB/min), target {MAX_GROWTH:.0%}"
            + ("" if judged else f"; not judged below {SHORTEST_S} s"),
        ),
        "blocks": (idle, ", ".join(f"{r['num_free_blocks']} of {r['num_blocks']} free" for r in replicas)),
        "end": (code == 0 and "Traceback" not in log, f"exit code {code}"),
    }
    met = all(holds for holds, _ in checks.values())
    table = [
        f"load: {args.clients} clients for {args.seconds:g} s; {len(cases)} known answers ({num_left_out} left out)"
    ]
    table += [f"  {'met' if holds else 'MISSED':6}  {name:20}  {text}" for name, (holds, text) in checks.items()]
    table += [f"          {fault}" for fault in tally.faults[:10]]
    if "Traceback" in log:
        table += [f"          {line}" for line in log.splitlines()[-40:]]
    return {
        "outcomes": dict(tally.outcomes),
        "statuses": {str(status): count for status, count in sorted(tally.statuses.items())},
        "faults": tally.faults[:100],
        "rss": {"growth": growth, "mib_per_minute": slope, "samples": memory},
        "replicas": replicas,
        "exit_code": code,
        "met": met,
        "table": table,
    }


def _outcomes(tally: Tally) -> str:
    statuses = ", ".join(f"{count} × {status or 'none'}" for status, count in sorted(tally.statuses.items()))
    return ", ".join(f"{count} {name}" for name, count in tally.outcomes.items()) + f"; statuses {statuses}"


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
