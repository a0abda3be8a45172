"""The driver's loop: requests in, steps out to the replicas, tokens back.

One scheduler for each DP replica. `step()` first fills every replica's pipeline (up to `pp_size` steps in flight, and
one more where it looks ahead), then waits for one step to come back and hands its tokens to their requests. In a
pipeline what comes next goes off before the caller makes outputs of them.
"""

import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent import futures
from concurrent.futures import Future

from ..config import InferenceConfig, SpeculativeConfig
from .beam_search import BeamSearch
from .block_manager import BlockManager
from .constraint import Constraint
from .detokenizer import Detokenizer
from .executor import Executor
from .prompts import PreparedRequest
from .request import Completion, Request, sequences_of
from .scheduler import ScheduledStep, Scheduler
from .sequence import Sequence
from .speculation.speculator import create_speculator
from .stats import EngineStats, ReplicaStats
from .structured import Grammar

_PATIENCE_S = 0.1  # of a step that can only wait for grammars: Ctrl-C, other requests and a close come in between


class Replica:
    """A scheduler, the steps that it has in flight, and its totals."""

    def __init__(self, config: InferenceConfig, num_blocks: int, block_size: int, look_ahead: bool) -> None:
        self.scheduler = Scheduler(
            BlockManager(num_blocks, block_size, config.enable_prefix_caching),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            num_stages=config.pp_size,
            look_ahead=look_ahead,
        )
        self.in_flight: deque[tuple[ScheduledStep, float]] = deque()  # with the time when it was submitted
        self.last_collected_s = 0.0
        self.num_steps = self.num_draft_steps = 0
        self.num_prompt_tokens = self.num_cached_tokens = self.num_output_tokens = 0

    def work_with(self, sequence: Sequence) -> int:
        """Tokens that this replica would have to compute if it took a prompt too, but for those of its output."""
        return self.scheduler.work + sequence.num_tokens - self.scheduler.num_cached(sequence)

    def stats(self) -> ReplicaStats:
        scheduler = self.scheduler
        return ReplicaStats(
            num_waiting=len(scheduler.waiting),
            num_running=len(scheduler.running),
            num_queued_tokens=scheduler.work,
            num_blocks=scheduler.blocks.num_blocks,
            num_free_blocks=scheduler.blocks.num_free_blocks,
            num_preemptions=scheduler.num_preemptions,
            num_steps=self.num_steps,
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens,
            num_output_tokens=self.num_output_tokens,
            num_draft_steps=self.num_draft_steps,
            num_drafted=scheduler.num_drafted,
            num_accepted=scheduler.num_accepted,
        )

    def on_submitted(self, step: ScheduledStep, now: float) -> None:
        self.in_flight.append((step, now))
        self.num_steps += step.input.model == 0
        self.num_draft_steps += step.input.model == 1

    def on_collected(self, now: float) -> ScheduledStep:
        """The step that has come back; what it took tells what guesses cost."""
        step, submitted_s = self.in_flight.popleft()
        given, speculator = step.input, self.scheduler.speculator
        if speculator is not None and given.num_tokens == len(given.samples):
            speculator.observe_step(given.model, given.num_tokens, now - max(submitted_s, self.last_collected_s))
        self.last_collected_s = now
        return step


class EngineCore:
    """Schedules requests over the replicas behind an executor. Not thread-safe."""

    def __init__(
        self, executor: Executor, config: InferenceConfig, num_blocks: int, block_size: int, look_ahead: bool = False
    ) -> None:
        self.executor, self.config = executor, config
        self.replicas = [Replica(config, num_blocks, block_size, look_ahead) for _ in range(config.dp_size)]
        self._requests: dict[str, Request] = {}
        self._by_sequence: dict[Sequence, tuple[Request, Completion]] = {}
        self._compiling: dict[Request, Future[Grammar]] = {}
        self._aborted: list[Request] = []  # and others that the next step gives
        self._failed: Exception | None = None  # which the next step raises
        self.observers: list[Callable[[Request], None]] = []  # told of each request that has ended, however it did

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests or self._aborted)

    @property
    def unfinished(self) -> list[Request]:
        return list(self._requests.values())

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def add(
        self,
        request_id: str,
        index: int,
        prepared: PreparedRequest,
        *,
        seed: int,
        new_detokenizer: Callable[[], Detokenizer | None],
        grammar: Future[Grammar] | None = None,
    ) -> None:
        """Queues a request with the replica that has the least work, a prefix that it has cached counting for it.

        index: the request's place among the prompts it came with; seed: of its noise; grammar: its output's, compiled
        by others; the request waits for it.
        """
        params = prepared.params
        sequences = sequences_of(request_id, prepared, seed)
        completions = [Completion(sequence, new_detokenizer()) for sequence in sequences]
        request = Request(request_id, index, prepared.text, params, sequences[0], completions, time.monotonic())
        if params.num_beams > 1:
            request.search = BeamSearch(request.first, params, new_detokenizer)
        self._requests[request_id] = request
        self._by_sequence |= {completion.sequence: (request, completion) for completion in completions}
        if grammar is not None:
            self._compiling[request] = grammar
        else:
            self._queue(request)

    def _queue(self, request: Request) -> None:
        first = request.first
        request.replica = min(range(len(self.replicas)), key=lambda i: self.replicas[i].work_with(first))
        self.replicas[request.replica].scheduler.add(first)

    def abort(self, request_id: str, silently: bool = False) -> bool:
        """Ends a request; unless silently, the next `step` gives it for the last time. False if it is unknown."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._end(request, "abort")
        if not silently:
            self._aborted.append(request)
        return True

    def _end(self, request: Request, reason: str) -> None:
        """Ends what is unfinished of a request, from outside."""
        is_queued = self._compiling.pop(request, None) is None
        if request.search is not None:
            request.search.give_up(reason)
            self._conclude(request, request.search)
        for completion in request.completions:
            if completion.sequence.finish_reason is None:
                if is_queued:
                    self.replicas[request.replica].scheduler.finish(completion.sequence, reason)
                else:
                    completion.sequence.end(reason)
                if completion.detokenizer is not None:
                    completion.detokenizer.finish()
        self._retire(request)

    def step(self) -> list[Request]:
        """Fills the pipelines, waits for one step, and gives the requests that it moved on or that were aborted."""
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise failed
        moved, self._aborted = self._aborted, []
        moved += self._compiled(wait=not moved and not self._is_busy)
        self._fill()
        if any(replica.in_flight for replica in self.replicas):
            moved += self._collect()
            if self.config.pp_size > 1:
                self._fill_meanwhile(moved)
        return moved

    def _fill_meanwhile(self, moved: list[Request]) -> None:
        """Fills the pipelines before the caller looks at what a step moved, which is not lost if that fails: the first
        stage waits for these sequences."""
        try:
            self._fill()
        except Exception as error:
            self._failed = error  # first the caller gets what was moved
        except BaseException:
            self._aborted += moved
            raise

    @property
    def _is_busy(self) -> bool:
        """Whether there is something to compute."""
        return any(replica.in_flight or replica.scheduler.has_work for replica in self.replicas)

    def _compiled(self, wait: bool) -> list[Request]:
        """Queues the requests whose grammar is there; gives those that failed for it. wait: a little, for the first."""
        if self._compiling and wait:
            futures.wait(self._compiling.values(), _PATIENCE_S, futures.FIRST_COMPLETED)
        failed = []
        for request, grammar in [item for item in self._compiling.items() if item[1].done()]:
            error = self._constrain(request, grammar)
            del self._compiling[request]
            if error is None:
                self._queue(request)
            else:
                for completion in request.completions:
                    completion.sequence.end("error", error)
                self._retire(request)
                failed.append(request)
        return failed

    def _constrain(self, request: Request, grammar: Future[Grammar]) -> str | None:
        """Lets a grammar take hold of a request's sequences; why it cannot."""
        error = grammar.exception()  # not raised: others wait for it too, and it would keep all that caught it
        if error is not None:
            return str(error)
        compiled = grammar.result()
        for completion in request.completions:
            sequence = completion.sequence
            sequence.constraint = constraint = Constraint(compiled, sequence.stop_token_ids)
            if constraint.error is not None:
                return constraint.error
        return None

    def settle(self) -> None:
        """Where nothing is asked for any more, waits for the steps still in flight, which hold blocks for nobody."""
        if not self.has_unfinished:
            self.drain()

    def drain(self) -> list[Request]:
        """Waits for all steps in flight, so that nothing is under way on any rank; the requests that these moved on."""
        moved = []
        while any(replica.in_flight for replica in self.replicas):
            moved += self._collect()
        return moved

    def _fill(self) -> None:
        for index, replica in enumerate(self.replicas):
            while len(replica.in_flight) < replica.scheduler.max_in_flight:
                step = replica.scheduler.schedule()
                if step is None:
                    break
                now = time.monotonic()
                for sequence in step.sequences:
                    self._on_scheduled(replica, sequence, now)
                replica.on_submitted(step, now)
                self.executor.submit(index, step.input)

    def _on_scheduled(self, replica: Replica, sequence: Sequence, now: float) -> None:
        request, _ = self._by_sequence[sequence]
        if request.scheduled_s is None:
            request.scheduled_s = now
            replica.num_prompt_tokens += sequence.num_prompt_tokens
            replica.num_cached_tokens += sequence.num_cached_tokens or 0

    def _collect(self) -> list[Request]:
        index, output = self.executor.collect()
        replica = self.replicas[index]
        now = time.monotonic()
        step = replica.on_collected(now)
        assert step.input.step_id == output.step_id
        moved = replica.scheduler.update(step, output, lambda sequence: self._heed(replica, sequence, now))
        requests: dict[Request, None] = {}
        for sequence in moved:
            request, completion = self._by_sequence[sequence]
            requests[request] = None
            if sequence.finish_reason is not None and completion.detokenizer is not None:
                completion.detokenizer.finish()
        for request in requests:
            if request.search is not None:
                self._search_on(replica, request, request.search, now)
            if request.ended:
                self._retire(request)
        return list(requests)

    def _heed(self, replica: Replica, sequence: Sequence, now: float) -> str | None:
        """Takes note of a sequence's new token; why the sequence ends with it by its text or its grammar, or None."""
        replica.num_output_tokens += 1
        request, completion = self._by_sequence[sequence]
        if sequence is request.first:
            request.token_s.append(now - request.arrival_s)
        token_id, detokenizer, reason = sequence.token_ids[-1], completion.detokenizer, None
        if sequence.constraint is not None:
            reason, sequence.error = sequence.constraint.accept(token_id), sequence.constraint.error
        if detokenizer is not None:
            may_stop = sequence.num_output_tokens >= sequence.min_tokens
            if detokenizer.append(token_id, look_for_stop=may_stop):
                reason = reason or "stop"
        return reason

    def _search_on(self, replica: Replica, request: Request, search: BeamSearch, now: float) -> None:
        """Lets the beams of a request go on, or end, once it is known with what all of them may."""
        if error := next((sequence.error for sequence in search.sequences if sequence.error), None):
            search.give_up("error", error)
            self._conclude(request, search)
        elif search.is_ready:
            request.token_s.append(now - request.arrival_s)
            replica.num_output_tokens += len(search.beams)
            chosen = search.choose()
            if not chosen:
                self._conclude(request, search)
                return
            completion = self._by_sequence[search.sequences[0]][1]
            heirs = [(continuation.beam, continuation.token_id) for continuation in chosen]
            sequences = replica.scheduler.advance_beams(search.sequences, heirs)
            self._forget(search.sequences)
            self._by_sequence |= dict.fromkeys(sequences, (request, completion))
            search.follow(chosen, sequences)

    def _conclude(self, request: Request, search: BeamSearch) -> None:
        """A request's completions are what its search has found."""
        for sequence in search.sequences:
            self.replicas[request.replica].scheduler.finish(sequence, "abort")
        self._forget(search.sequences)
        request.completions = [Completion(h.sequence, h.detokenizer, h.logprob) for h in search.outputs()]
        request.search = None
        self._by_sequence |= {completion.sequence: (request, completion) for completion in request.completions}

    def _forget(self, sequences: Seq[Sequence]) -> None:
        for sequence in sequences:
            del self._by_sequence[sequence]

    def _retire(self, request: Request) -> None:
        del self._requests[request.request_id]
        self._forget([completion.sequence for completion in request.completions])
        for told in self.observers:
            told(request)

    def speculate(self, config: SpeculativeConfig | None, longest: int) -> None:
        """Lets every replica guess tokens ahead, or none; no step is in flight. longest: as `create_speculator`."""
        for replica in self.replicas:
            replica.scheduler.speculate(None if config is None else create_speculator(config, longest))

    def stats(self) -> EngineStats:
        return EngineStats(tuple(replica.stats() for replica in self.replicas))

    def check(self) -> None:
        """Proves every replica's bookkeeping whole. Raises AssertionError."""
        for replica in self.replicas:
            replica.scheduler.check()
