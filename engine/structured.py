"""Structured output: what tokens may come next, as bitmasks, so that the output is a sentence of a grammar.

`GrammarCompiler` makes a `Grammar` of a request's `StructuredOutputsParams` beside the engine's own thread; each
sequence follows it by a `Matcher`. All of it lives on the driver; ranks get the masks (`apply_bitmask`).
The grammars, their compiler and the walk over the vocabulary are llguidance's (a derivative-based lexer under an Earley
parser, whose cost hardly depends on the schema's size).
"""

import re
import reprlib
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..config import ConfigError, StructuredOutputsParams
from .grammars import grammar_of, why_too_large

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Mask = NDArray[np.int32]  # [..., ceil(vocab_size / 32)], bit i % 32 of word i // 32: whether token i may come

_COMPILED_AT_ONCE = 2
_CACHED = 64  # grammars; one takes kilobytes as a rule, and with these limits a hundred megabytes at worst
_LEXER_FUEL = 300_000  # the library's default, 10**6, lets (a{1000}){1000} take 190 MB; with this it takes 45
_LEXER_STATES = 50_000  # of 1 to 2 kB, met while outputs are written
_COMPILE_SECONDS = 20.0
_EXIT_SECONDS = 5.0
_COMPILE_STACK = 2**29  # bytes, of address space only: the library recurses, and a stack that ends ends the process
_LONGEST_REASON = 300  # characters


@dataclass(frozen=True)
class _Vocabulary:
    """A model's tokens, as the library sees them."""

    tokenizer: "LLTokenizer"
    size: int  # of the model's LM head, which may be padded, or lack the tokenizer's last tokens
    eos: int  # in a mask of the library's: whether the text may end here

    @property
    def num_words(self) -> int:
        """In a row of ours."""
        return (self.size + 31) // 32

    @property
    def num_library_words(self) -> int:
        """In a row of the library's, which has room for all of the tokenizer's tokens too."""
        return (self.tokenizer.vocab_size + 31) // 32


class GrammarCompiler:
    """Compiles grammars for one tokenizer in threads of its own, and keeps the latest.

    tokenizer: a transformers tokenizer; None, or one that the library cannot read, is refused when a grammar is asked
    for. vocab_size: of the model's LM head. eos_token_ids: the model's own, which never count as text.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Iterable[int] = ()) -> None:
        self._tokenizer, self._vocab_size, self._eos_token_ids = tokenizer, vocab_size, tuple(eos_token_ids)
        self._vocabulary: _Vocabulary | ConfigError | None = None  # made with the first grammar
        self._making_vocabulary = threading.Lock()
        self._lock = threading.Lock()  # of what follows
        self._grammars: OrderedDict[StructuredOutputsParams, Future[Grammar]] = OrderedDict()
        self._waiting: deque[tuple[StructuredOutputsParams, Future[Grammar]]] = deque()
        self._running: set[Future[Grammar]] = set()
        self._threads: set[threading.Thread] = set()  # of these, and of what was given up
        weakref.finalize(self, _await_threads, self._waiting, self._threads)  # when the process ends

    def submit(self, params: StructuredOutputsParams) -> "Future[Grammar]":
        """The grammar, when it is compiled: at once if it was asked for before. The future cannot be cancelled.

        It raises ConfigError, one line, where there is none: of that request alone.
        """
        reason = why_too_large(params)
        if reason is not None:  # and to be kept
            return _failed(_refusal(params, reason))
        with self._lock:
            future = self._grammars.get(params)
            if future is not None:
                self._grammars.move_to_end(params)
                return future
            future = self._grammars[params] = Future()
            future.set_running_or_notify_cancel()  # others may wait for it too
            while len(self._grammars) > _CACHED:
                self._grammars.popitem(last=False)
            self._waiting.append((params, future))
            self._begin()
            return future

    def close(self) -> None:
        """Compiles no more; what is not compiled yet raises ConfigError."""
        with self._lock:
            ended = [*self._running, *(future for _, future in self._waiting)]
            self._running.clear()
            self._waiting.clear()
        for future in ended:
            future.set_exception(ConfigError("structured_outputs: the engine was closed before they were compiled"))

    def _begin(self) -> None:
        """Lets those compile that have waited longest; called with the lock.

        The library cannot be interrupted: what is given up goes on in its thread, which neither counts here nor keeps
        the process for long from its end.
        """
        while self._waiting and len(self._running) < _COMPILED_AT_ONCE:
            params, future = self._waiting.popleft()
            self._running.add(future)
            thread = threading.Thread(target=self._run, args=(params, future), name="grammar", daemon=True)
            self._threads.add(thread)
            try:
                _start_with_stack(thread)
            except RuntimeError as error:  # no memory for its stack, say: another time there may be
                self._threads.discard(thread)
                self._running.discard(future)
                self._grammars.pop(params, None)
                future.set_exception(_refusal(params, str(error)))

    def _run(self, params: StructuredOutputsParams, future: "Future[Grammar]") -> None:
        slow = _refusal(params, f"it takes more than {_COMPILE_SECONDS:g} s to compile")
        timer = threading.Timer(_COMPILE_SECONDS, self._end, (future, slow))
        timer.daemon = True
        outcome: Grammar | ConfigError
        try:
            timer.start()
            outcome = self._compile(params)
        except ConfigError as error:
            outcome = error
        except BaseException as error:  # a panic of the library is no Exception
            outcome = _refusal(params, str(error))
        timer.cancel()
        self._end(future, outcome)
        self._threads.discard(threading.current_thread())

    def _end(self, future: "Future[Grammar]", outcome: "Grammar | ConfigError") -> None:
        """Called when it is compiled and when its time is up, whichever comes first."""
        with self._lock:
            if future not in self._running:
                return
            self._running.remove(future)
            self._begin()
        if isinstance(outcome, ConfigError):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    def _compile(self, params: StructuredOutputsParams) -> "Grammar":
        vocabulary = self._get_vocabulary()
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(initial_lexer_fuel=_LEXER_FUEL, max_lexer_states=_LEXER_STATES, verbose_errors=False)
        matcher = LLMatcher(vocabulary.tokenizer, grammar_of(params), log_level=0, limits=limits)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        # The first mask is the longest to make, and copies of the matcher know it; and it shows what has no sentence.
        text_may_follow = Matcher(matcher, vocabulary, ()).fill(np.empty(vocabulary.num_words, np.int32))
        if not text_may_follow:
            raise ValueError(f"{'only the empty text' if matcher.is_accepting() else 'no text'} fulfils it")
        return Grammar(matcher, vocabulary)

    def _get_vocabulary(self) -> _Vocabulary:
        with self._making_vocabulary:
            if self._vocabulary is None:
                try:
                    self._vocabulary = _make_vocabulary(self._tokenizer, self._vocab_size, self._eos_token_ids)
                except ConfigError as error:
                    self._vocabulary = error
            if isinstance(self._vocabulary, ConfigError):
                raise ConfigError(str(self._vocabulary))
            return self._vocabulary


@dataclass(frozen=True, eq=False)
class Grammar:
    """A compiled grammar, shared by the requests that ask for it."""

    start: "LLMatcher"
    vocabulary: _Vocabulary

    def matcher(self, end_token_ids: Iterable[int]) -> "Matcher":
        """For one sequence. end_token_ids: all that end it, stop token ids too; none if there are none it heeds."""
        return Matcher(self.start.deep_copy(), self.vocabulary, end_token_ids)


class Matcher:
    """Follows one sequence's output through a grammar.

    An end token of the request may come where the output is a whole sentence, and nowhere else, be it text otherwise.
    `error` says why it cannot go on (its grammar is too ambiguous, say): the request fails, alone.
    """

    def __init__(self, inner: "LLMatcher", vocabulary: _Vocabulary, end_token_ids: Iterable[int]) -> None:
        self.inner, self.vocabulary = inner, vocabulary  # the library's has seen all tokens but an end token
        self.end_token_ids = frozenset(i for i in end_token_ids if 0 <= i < vocabulary.size)
        self.error: str | None = None
        self._ended = False  # by an end token, the last one accepted
        self._exhausted = False  # found by the last mask: no more text can come

    @property
    def is_finished(self) -> bool:
        """Nothing but an end token may come: the output is whole. Ask after `accept`, and again after `fill`, since
        of some grammars only the mask shows it."""
        return self.error is None and (self._ended or self._exhausted or self.inner.is_stopped())

    def fill(self, mask: Mask) -> bool:
        """Writes what tokens may come next into a row [ceil(vocab_size / 32)].

        False: no text may come, the sequence is finished or in error. The row then allows its end tokens, and if it has
        none, everything: whatever a step that is under way draws there is thrown away.
        """
        # The library's row knows neither the request's end tokens nor the model's padding.
        row = np.empty(self.vocabulary.num_library_words, np.uint32)
        self.inner.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        allowed = mask.view(np.uint32)
        allowed[:] = row[: len(allowed)]
        eos = self.vocabulary.eos
        may_end = self._ended or bool(row[eos // 32] >> np.uint32(eos % 32) & np.uint32(1))
        if self._ended:
            allowed[:] = 0
        if self.vocabulary.size % 32:
            allowed[-1] &= np.uint32(2 ** (self.vocabulary.size % 32) - 1)
        _clear(allowed, self.end_token_ids)
        if eos < self.vocabulary.size:
            _clear(allowed, (eos,))
        text_may_follow = bool(allowed.any())
        if self.inner.is_error():
            self._fail(_one_line(self.inner.get_error()))
        elif not text_may_follow and not may_end:
            self._fail("no token of the vocabulary, end tokens aside, continues it")
        self._exhausted = not text_may_follow
        if may_end:
            _set(allowed, self.end_token_ids)
        if not allowed.any():
            allowed[:] = 2**32 - 1
        return text_may_follow and self.error is None

    def accept(self, token_id: int) -> bool:
        """Takes the next token. False, and nothing is changed, if it may not come."""
        if self._ended or self.error is not None:
            return False
        if token_id in self.end_token_ids:
            self._ended = self.inner.is_accepting()
            return self._ended
        if token_id == self.vocabulary.eos or not 0 <= token_id < self.vocabulary.tokenizer.vocab_size:
            return False
        if not self.inner.try_consume_tokens([token_id]):
            if self.inner.is_error():
                self._fail(_one_line(self.inner.get_error()))
            return False
        self._exhausted = False
        return True

    def rollback(self, num_tokens: int) -> None:
        """Takes back the last tokens accepted."""
        if num_tokens and self._ended:
            self._ended = False
            num_tokens -= 1
        if num_tokens:
            self._exhausted = False
            if not self.inner.rollback(num_tokens):
                self._fail(_one_line(self.inner.get_error()))

    def fill_after(self, drafts: Sequence[int], masks: Mask, num_known: int = 0) -> int:
        """What may come after each draft: masks [len(drafts), ceil(vocab_size / 32)]; the state stays.

        Returns how many drafts, from the first, may come and be followed by text; as many rows are filled. num_known:
        rows that are filled already.
        """
        num_valid, num_accepted, error = 0, 0, self.error
        for draft, mask in zip(drafts, masks, strict=True):
            if not self.accept(draft):
                break
            num_accepted += 1
            if num_accepted > num_known and not self.fill(mask):
                break
            num_valid += 1
        self.rollback(num_accepted)
        self._exhausted = False  # else none was accepted, or the sequence has ended
        if not self.inner.is_error():
            self.error = error  # of a guess that led nowhere nothing remains
        return num_valid

    def _fail(self, reason: str) -> None:
        self.error = self.error or f"structured output cannot go on: {reason}"


def _make_vocabulary(tokenizer: Any, vocab_size: int, eos_token_ids: Sequence[int]) -> _Vocabulary:
    if tokenizer is None:
        raise ConfigError("structured output needs a tokenizer: give InferenceEngine one")
    try:
        from llguidance.hf import from_tokenizer
    except ImportError as error:
        raise ConfigError(f"structured output needs the package llguidance: {error}") from None
    size = len(tokenizer)
    # The library wants one token that is no text. Any special token will do, if the model has no end token.
    candidates = [*eos_token_ids, tokenizer.eos_token_id, *tokenizer.all_special_ids, size - 1]
    eos = next(i for i in candidates if i is not None and 0 <= i < size)
    try:
        library = from_tokenizer(tokenizer, n_vocab=max(size, vocab_size), eos_token=eos)
    except BaseException as error:  # a panic of the library is no Exception
        kind = type(tokenizer).__name__
        raise ConfigError(f"structured output does not work with this tokenizer ({kind}): {_one_line(error)}") from None
    return _Vocabulary(library, vocab_size, eos)


def _await_threads(waiting: "deque[Any]", threads: set[threading.Thread]) -> None:
    """A thread that comes back from the library while the interpreter is taken down would crash the process."""
    deadline = time.monotonic() + _EXIT_SECONDS
    waiting.clear()
    while threads and time.monotonic() < deadline:
        time.sleep(0.01)


def _start_with_stack(thread: threading.Thread) -> None:
    """With a stack of `_COMPILE_STACK`."""
    before = threading.stack_size(_COMPILE_STACK)
    try:
        thread.start()
    finally:
        threading.stack_size(before)


def _failed(error: ConfigError) -> "Future[Grammar]":
    future: Future[Grammar] = Future()
    future.set_exception(error)
    return future


def _refusal(params: StructuredOutputsParams, reason: str) -> ConfigError:
    value = reprlib.repr(getattr(params, params.kind))
    return ConfigError(f"StructuredOutputsParams.{params.kind}: {value} is not valid: {_one_line(reason)}")


def _one_line(message: Any) -> str:
    """The library's message without the excerpt of the grammar that it draws."""
    lines = [line.strip() for line in str(message).splitlines()]
    reasons = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    told = reasons or [line for line in lines if line and not re.match(r"\d+ \||\^+$|<state>", line)]
    text = " ".join(told) or "no reason given"
    return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + "..."


def _set(words: NDArray[np.uint32], token_ids: Iterable[int]) -> None:
    for i in token_ids:
        words[i // 32] |= np.uint32(1 << i % 32)


def _clear(words: NDArray[np.uint32], token_ids: Iterable[int]) -> None:
    for i in token_ids:
        words[i // 32] &= np.uint32(2**32 - 1 - (1 << i % 32))
