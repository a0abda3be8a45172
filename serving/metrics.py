"""What Prometheus is told: names and meanings as vLLM's, with the prefix `meshlm:`; every series by DP replica.

Counts are read off the engine when somebody asks. What a request took is noted on the engine's thread: when somebody
asks, of those under way, and of each once it ends. No token is any dearer for it.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..engine.async_engine import AsyncInferenceEngine
from ..engine.driving import Driver
from ..engine.request import Request
from ..engine.stats import ReplicaStats
from .mesh_watch import Sample

CONTENT_TYPE = CONTENT_TYPE_LATEST
FINISH_REASONS = ("stop", "length", "abort", "error")
_SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_LONG_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)

_GAUGES: dict[str, tuple[str, Callable[[ReplicaStats], float]]] = {
    "num_requests_running": ("Requests in the running batch.", lambda r: r.num_running),
    "num_requests_waiting": ("Requests that wait to be computed.", lambda r: r.num_waiting),
    "num_queued_tokens": (
        "Tokens still to be computed, expected outputs included: a new request goes where they are fewest.",
        lambda r: r.num_queued_tokens,
    ),
    "kv_cache_usage_perc": ("Share of the KV cache's blocks that requests hold, 0 to 1.", lambda r: kv_usage(r)),
    "kv_cache_blocks": ("Blocks of the KV cache.", lambda r: r.num_blocks),
}
_COUNTERS: dict[str, tuple[str, Callable[[ReplicaStats], float]]] = {
    "num_preemptions": ("Sequences that gave up their blocks and were computed again.", lambda r: r.num_preemptions),
    "prompt_tokens": ("Prompt tokens of requests that were begun.", lambda r: r.num_prompt_tokens),
    "generation_tokens": ("Tokens generated.", lambda r: r.num_output_tokens),
    "prefix_cache_queries": ("Prompt tokens looked for in the prefix cache.", lambda r: r.num_prompt_tokens),
    "prefix_cache_hits": ("Of these, those found.", lambda r: r.num_cached_tokens),
    "spec_decode_num_draft_tokens": ("Tokens guessed ahead.", lambda r: r.num_drafted),
    "spec_decode_num_accepted_tokens": ("Of these, those that were right.", lambda r: r.num_accepted),
    "engine_steps": ("Steps of the model.", lambda r: r.num_steps),
}


def kv_usage(replica: ReplicaStats) -> float:
    return 1.0 - replica.num_free_blocks / replica.num_blocks


class Metrics(Collector):
    """The metrics of one engine, in a registry of their own."""

    def __init__(self, engine: AsyncInferenceEngine, model_name: str) -> None:
        self._engine, self._model_name = engine, model_name
        self._sample: Sample | None = None
        self.registry = CollectorRegistry(auto_describe=False)
        self._ttft = self._histogram("time_to_first_token_seconds", "Until a request's first token.", _LONG_S)
        self._itl = self._histogram("inter_token_latency_seconds", "Between two tokens of a request.", _SHORT_S)
        self._e2e = self._histogram("e2e_request_latency_seconds", "Until a request ended by itself.", _LONG_S)
        self._queue = self._histogram("request_queue_time_seconds", "Until a request's first step.", _LONG_S)
        self._prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self._generation = self._histogram("request_generation_tokens", "Tokens generated for a request.", _TOKENS)
        self._outcomes = Counter(
            "meshlm:request_success",
            "Requests that ended, by how they did.",
            ("model_name", "replica", "finished_reason"),
            registry=self.registry,
        )
        for replica in range(engine.config.dp_size):
            for reason in FINISH_REASONS:
                self._outcomes.labels(model_name, str(replica), reason)
        self.registry.register(self)
        self._noted: dict[Request, int] = {}  # tokens whose times have been, of requests under way
        engine.engine.driver.watch_ends(self._on_end)

    def _histogram(self, name: str, meaning: str, buckets: Sequence[float]) -> list[Histogram]:
        """One for each replica."""
        family = Histogram(
            f"meshlm:{name}", meaning, ("model_name", "replica"), registry=self.registry, buckets=buckets
        )
        return [family.labels(self._model_name, str(replica)) for replica in range(self._engine.config.dp_size)]

    def _on_end(self, request: Request) -> None:
        replica, timings = request.replica, request.timings
        sequences = [completion.sequence for completion in request.completions]
        reason = _outcome([str(sequence.finish_reason) for sequence in sequences])
        self._outcomes.labels(self._model_name, str(replica), reason).inc()
        if timings.queue_s is not None:
            self._queue[replica].observe(timings.queue_s)
        self._note_tokens(request)
        if reason in ("stop", "length"):
            self._e2e[replica].observe(timings.total_s)
            self._prompt[replica].observe(request.first.num_prompt_tokens)
            self._generation[replica].observe(sum(sequence.num_output_tokens for sequence in sequences))

    def note_tokens(self, driver: Driver) -> None:
        """Of the requests under way, the times that were not noted yet. On the engine's thread."""
        for request in driver.unfinished():
            self._noted[request] = self._note_tokens(request)

    def _note_tokens(self, request: Request) -> int:
        """How many tokens have been noted now."""
        noted, token_s = self._noted.pop(request, 0), request.token_s
        if token_s and not noted:
            self._ttft[request.replica].observe(token_s[0])
        for before, after in pairwise(token_s[max(0, noted - 1) :]):
            self._itl[request.replica].observe(after - before)
        return len(token_s)

    def text(self, sample: Sample) -> bytes:
        """The exposition. sample: what replicas and ranks do now."""
        self._sample = sample
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        sample = self._sample
        if sample is None:
            return
        for name, (meaning, value_of) in _GAUGES.items():
            gauge = GaugeMetricFamily(f"meshlm:{name}", meaning, labels=("model_name", "replica"))
            for number, replica in enumerate(sample.replicas):
                gauge.add_metric((self._model_name, str(number)), value_of(replica))
            yield gauge
        for name, (meaning, value_of) in _COUNTERS.items():
            counter = CounterMetricFamily(f"meshlm:{name}", meaning, labels=("model_name", "replica"))
            for number, replica in enumerate(sample.replicas):
                counter.add_metric((self._model_name, str(number)), value_of(replica))
            yield counter
        refused = CounterMetricFamily(
            "meshlm:requests_refused", "Requests that found the queue full (HTTP 429).", labels=("model_name",)
        )
        refused.add_metric((self._model_name,), self._engine.num_refused)
        yield refused
        labels = ("model_name", "rank", "replica", "stage", "tp")
        busy = CounterMetricFamily("meshlm:rank_busy_seconds", "Time a rank has spent computing steps.", labels=labels)
        for rank, info in zip(sample.ranks, self._engine.engine.ranks, strict=True):
            place = (str(info.coordinate[axis]) for axis in ("dp", "pp", "tp"))
            busy.add_metric((self._model_name, str(info.rank), *place), rank.busy_s)
        yield busy


def _outcome(reasons: Sequence[str]) -> str:
    """Of a request, by those of its completions: the worst."""
    return next((bad for bad in ("error", "abort") if bad in reasons), reasons[0] if reasons else "abort")
