"""Requests on the driver: numbered, given to the core, and their outputs to who waits for them.

Several calls of `generate` and `stream` may be under way at once, and `step` beside them. Whichever does a step keeps
the outputs that others wait for, until they look.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import count
from typing import Any

from ..config import SamplingParams
from ..mesh.interrupts import interrupt_between_steps
from .core import EngineCore
from .detokenizer import Detokenizer
from .output import RequestOutput
from .prompts import PreparedRequest
from .request import Request
from .structured import Grammar, GrammarCompiler

_SEED_STEP = 0x5851F42D4C957F2D  # odd: requests without a seed draw differently


class Requests:
    """What the core works on.

    tokenizer: for the texts of outputs, or None. seed: of requests that have none.
    """

    def __init__(self, core: EngineCore, grammars: GrammarCompiler, tokenizer: Any, seed: int) -> None:
        self._core, self._grammars, self._tokenizer, self._seed = core, grammars, tokenizer, seed
        self._num_added = 0
        self._numbers = count()
        self._claimed: set[str] = set()  # ids of the requests that a running `run` waits for
        self._unclaimed: list[RequestOutput] = []  # outputs that moved on while another call was stepping

    # ---- in -----------------------------------------------------------------------------------------------------

    def add(self, requests: Sequence[PreparedRequest], request_ids: Sequence[str | None] = ()) -> list[str]:
        """Queues all of the requests; their ids. Raises ValueError if one is in use."""
        given = request_ids or [None] * len(requests)
        ids = [request_id or self.fresh_id() for request_id in given]
        for request_id in ids:
            if request_id in self._core:
                raise ValueError(f"request_id={request_id!r} is in use by a request that has not ended")
        for index, (request_id, request) in enumerate(zip(ids, requests, strict=True)):
            params = request.params
            own_seed = self._seed + (self._num_added + 1) * _SEED_STEP
            self._core.add(
                request_id,
                index,
                request,
                seed=own_seed if params.seed is None else params.seed,
                new_detokenizer=partial(self._new_detokenizer, params),
                grammar=self._grammar(params),
            )
            self._num_added += 1
        return ids

    def fresh_id(self) -> str:
        """A request id that no request in the core has. From any thread."""
        return next(name for name in map("request-{}".format, self._numbers) if name not in self._core)

    def _grammar(self, params: SamplingParams) -> Future[Grammar] | None:
        return None if params.structured_outputs is None else self._grammars.submit(params.structured_outputs)

    def _new_detokenizer(self, params: SamplingParams) -> Detokenizer | None:
        if self._tokenizer is None or not params.detokenize:
            return None
        return Detokenizer(self._tokenizer, params.stop, params.skip_special_tokens, params.include_stop_str_in_output)

    # ---- out ----------------------------------------------------------------------------------------------------

    def step(self) -> list[RequestOutput]:
        """Does one step, if there is something to do; the outputs that no `run` waits for."""
        if self._core.has_unfinished:
            with interrupt_between_steps():
                self._keep(self._core.step())
        return self._take(lambda request_id: request_id not in self._claimed)

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has something to do or to give."""
        return self._core.has_unfinished or any(o.request_id not in self._claimed for o in self._unclaimed)

    def drain(self) -> None:
        """Waits for all steps in flight, so that ranks can be changed."""
        self._keep(self._core.drain())

    def run(self, requests: Sequence[PreparedRequest], every_step: bool) -> Iterator[RequestOutput]:
        """Queues requests, steps until they have ended, gives their outputs; keeps others' for who waits for them."""
        unfinished: set[str] = set()
        try:
            with interrupt_between_steps():
                unfinished = set(self.add(requests))
                self._claimed |= unfinished
            while unfinished:
                outputs = self._take(unfinished.__contains__)
                if not outputs:
                    with interrupt_between_steps():
                        for request in self._core.step():
                            if request.request_id not in unfinished:
                                self._keep([request])
                            elif every_step or request.ended:
                                outputs.append(request.output())
                ended = {output.request_id for output in outputs if output.finished}
                unfinished -= ended
                self._claimed -= ended
                yield from outputs
        finally:
            for request_id in unfinished:  # interrupted, or the caller has seen enough
                self._core.abort(request_id, silently=True)
            self._take(unfinished.__contains__)
            self._claimed -= unfinished

    def finish(self, requests: Sequence[PreparedRequest], doing: str, progress: bool) -> list[RequestOutput]:
        """Runs requests to their ends, under a progress bar; their outputs in the same order."""
        from tqdm import tqdm

        finished: dict[int, RequestOutput] = {}
        started, num_tokens = time.monotonic(), 0
        with tqdm(total=len(requests), desc=doing, unit="request", disable=not progress) as bar:
            for output in self.run(requests, every_step=False):
                finished[output.index] = output
                num_tokens += sum(len(each.token_ids) for each in output.outputs) or output.num_prompt_tokens
                bar.set_postfix_str(f"{num_tokens / (time.monotonic() - started):.1f} tokens/s", refresh=False)
                bar.update()
        return [finished[index] for index in range(len(requests))]

    def _keep(self, moved: Sequence[Request]) -> None:
        self._unclaimed += [request.output() for request in moved]

    def _take(self, wanted: Callable[[str], bool]) -> list[RequestOutput]:
        """Outputs out of those that are unclaimed, by request id."""
        taken = [output for output in self._unclaimed if wanted(output.request_id)]
        if taken:
            self._unclaimed = [output for output in self._unclaimed if not wanted(output.request_id)]
        return taken
