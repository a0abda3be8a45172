"""What replicas and ranks do, looked up at most once a second, and only if somebody asks."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from ..engine.async_engine import AsyncInferenceEngine
from ..engine.driving import Driver
from ..engine.stats import ReplicaStats

_EVERY_S = 1.0
_PATIENCE_S = 2.0  # with a step that is under way: until it is back, what was last known is told


@dataclass(frozen=True)
class RankState:
    """A rank's totals since the start."""

    num_steps: int = 0
    busy_s: float = 0.0


@dataclass(frozen=True)
class Sample:
    """The engine at one moment."""

    at_s: float  # time.monotonic()
    replicas: tuple[ReplicaStats, ...]
    ranks: tuple[RankState, ...]


class MeshWatch:
    """The latest two samples: what happened between them is what happens now.

    looked: is called with each, on the engine's thread.
    """

    def __init__(self, engine: AsyncInferenceEngine, looked: Callable[[Driver], None] = lambda driver: None) -> None:
        self._engine, self._looked, self._looking = engine, looked, asyncio.Lock()
        idle = (RankState(),) * len(engine.engine.ranks)
        self.before = self.latest = Sample(time.monotonic(), engine.stats().replicas, idle)
        self._asked_s = self.latest.at_s

    async def look(self) -> Sample:
        """The state of replicas as it is, that of ranks not older than a second, or than a step that takes longer."""
        async with self._looking:
            if (now := time.monotonic()) - self._asked_s >= _EVERY_S:
                self._asked_s = now
                with suppress(TimeoutError, RuntimeError):  # RuntimeError: the engine has ended
                    await self._look()
        return Sample(self.latest.at_s, self._engine.stats().replicas, self.latest.ranks)

    async def _look(self) -> None:
        async with asyncio.timeout(_PATIENCE_S):
            busy = await self._engine.call(self._ask)
        ranks = tuple(RankState(int(rank["steps"]), rank["busy_s"]) for rank in busy)
        self.before, self.latest = self.latest, Sample(time.monotonic(), self._engine.stats().replicas, ranks)

    def _ask(self, driver: Driver) -> list[dict[str, float]]:
        self._looked(driver)
        return driver.busy()

    @property
    def span_s(self) -> float:
        """Between the two samples."""
        return max(self.latest.at_s - self.before.at_s, 1e-9)

    def tokens_per_s(self, replica: int) -> float:
        before, latest = self.before.replicas[replica], self.latest.replicas[replica]
        return (latest.num_output_tokens - before.num_output_tokens) / self.span_s

    def busy_share(self, rank: int) -> float:
        """Of the time between the samples."""
        return min(1.0, (self.latest.ranks[rank].busy_s - self.before.ranks[rank].busy_s) / self.span_s)
