"""A workload against a server."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from ...config import ConfigError
from .client import Answer, Reply, Target, new_client, read_answer, send
from .figures import Times
from .workloads import Asked


@dataclass(frozen=True)
class Run:
    """What came of it."""

    times: list[Times]  # of the requests that ended well
    failures: list[str]  # of the others, why
    duration_s: float  # from the first request's coming to the last answer's end
    num_counted: int  # requests whose tokens had to be counted by pieces, as the server told no usage


async def run(
    target: Target, requests: Sequence[Asked], arrivals: Sequence[float], max_concurrency: int | None = None
) -> Run:
    """Sends each request when it comes, or once fewer than `max_concurrency` are under way. Raises ConfigError if a
    first small one, which warms up and is not counted, fails."""
    from tqdm import tqdm

    slots: Any = nullcontext() if max_concurrency is None else asyncio.Semaphore(max_concurrency)
    async with new_client(target) as client:
        first = read_answer(await send(client, target, Asked("Hello", 4)))
        if first.error is not None:
            raise ConfigError(f"url: {target.url} does not serve a first request: {first.error}")
        with tqdm(total=len(requests), unit="request", disable=None, leave=False) as bar:
            started = time.perf_counter()

            async def one(asked: Asked, arrival: float) -> Reply:
                await asyncio.sleep(started + arrival - time.perf_counter())
                async with slots:
                    reply = await send(client, target, asked)
                bar.update()
                return reply

            replies = await asyncio.gather(*map(one, requests, arrivals))
            duration = max(reply.ended_s for reply in replies) - started
    times, failures, num_counted = [], [], 0
    for reply, arrival in zip(replies, arrivals, strict=True):
        answer = read_answer(reply)
        if answer.error is not None:
            failures.append(answer.error)
            continue
        num_counted += answer.num_output is None
        times.append(_times(reply, answer, started + arrival if max_concurrency is not None else None))
    return Run(times, failures, duration, num_counted)


def _times(reply: Reply, answer: Answer, arrived_s: float | None) -> Times:
    return Times(
        sent_s=reply.sent_s,
        content_s=answer.content_s,
        num_prompt=answer.num_prompt or 0,
        num_output=len(answer.content_s) if answer.num_output is None else answer.num_output,
        ended_s=reply.ended_s,
        arrived_s=arrived_s,
    )
