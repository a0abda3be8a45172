"""`InferenceEngine`: from one line to text, in any world (see `world.py`)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch

from ..config import InferenceConfig, SamplingParams, SpeculativeConfig
from ..config.speculative import as_speculative_config
from ..mesh.interrupts import interrupt_between_steps
from ..mesh.torchrun import torchrun_place
from ..shardformer import Checkpoint, Model, open_checkpoint
from ..shardformer.shardformer import max_model_len
from .binding import Binding, Guessing, try_draft
from .core import EngineCore
from .description import describe_bound, describe_mesh, describe_speculation
from .draft_model import open_draft
from .driving import Driver
from .executor import warn_if_tp_spans_hosts
from .output import EmbeddingOutput, RequestOutput, ScoreOutput
from .plan import (
    check_backend_name,
    check_draft,
    check_fit,
    check_world,
    choose_devices,
    choose_num_blocks,
    look_ahead,
    why_cpu,
)
from .prompts import PreparedRequest, Preparer, Prompt, Room, default_params, find_tokenizer, in_batch, pair
from .rank_info import RankInfo
from .request import Request
from .requests import Requests
from .scoring import embedding_of, prepare_embeddings, prepare_scores, score_of
from .stats import EngineStats
from .structured import GrammarCompiler
from .world import World


class InferenceEngine:
    """Generates with a transformers causal language model on a DP × PP × TP mesh.

    model: a directory with config.json and safetensors, a GGUF file, a transformers module, or a transformers config,
        which gets random weights (for benchmarks).
    config: sizes of the mesh and everything else that has a default.
    tokenizer: a transformers tokenizer; by default the one beside the model's weights.

    A world of one rank runs in this process. A larger one runs in child processes that the engine starts, this
    process driving; or, under torchrun, on the ranks that exist: there, constructing an engine and each of its
    methods are collective, rank 0 drives, and every rank returns or raises the same.

    Raises ValueError (ConfigError, CheckpointError) for what a caller can mend, before any process starts where that
    can be known; RankFailure if a rank cannot start or dies. Close the engine, or use it in a ``with`` statement; it
    is also closed when the interpreter exits.
    """

    def __init__(self, model: Model, config: InferenceConfig | None = None, tokenizer: Any = None) -> None:
        if not isinstance(config, InferenceConfig | None):
            raise TypeError(
                f"config: a {type(config).__name__} is no InferenceConfig; give InferenceConfig(tp_size=2, …)"
            )
        self.config = config = config or InferenceConfig()
        place = torchrun_place()
        if place is not None and (place.world_size > 1 or config.world_size > 1):
            check_world(config, place.world_size)
        elif place is not None:
            place = None  # torchrun with one rank: a world like any other process's
        checkpoint = open_checkpoint(
            model,
            policy=config.policy,
            allow_pickle=config.allow_pickle,
            trust_remote_code=config.trust_remote_code,
        )
        num_local = config.world_size if place is None else place.local_world_size
        devices, self._why_cpu = choose_devices(config, num_local), why_cpu(config, num_local)
        first_rank = 0 if place is None else place.rank - place.local_rank
        self._spec, self.speculative = checkpoint.spec, config.speculative
        draft = self._open_draft(config.speculative)
        check_fit(config, checkpoint.spec, devices, first_rank, None if draft is None else draft.spec)
        self._grammars: GrammarCompiler | None = None
        self._world = World(config, devices, place, checkpoint)
        try:
            with ExitStack() as files:
                self._start(checkpoint, draft, files, model, tokenizer)
        except BaseException:
            self.close()
            raise

    def _start(
        self, checkpoint: Checkpoint, draft: Checkpoint | None, files: ExitStack, model: Model, tokenizer: Any
    ) -> None:
        """Loads the weights on every rank, measures what memory is left, and allocates the cache."""
        loading, config, spec = self._world.begin_load(checkpoint, files), self.config, checkpoint.spec
        if tokenizer is None:  # while the ranks load
            tokenizer = find_tokenizer(model, config.trust_remote_code)
        self.tokenizer = tokenizer
        defaults = default_params(model, checkpoint.eos_token_ids, tokenizer)
        self._model = f"{spec.architecture} ({spec.policy} policy)"
        self._grammars = grammars = GrammarCompiler(tokenizer, spec.vocab_size, defaults.eos_token_ids or ())

        def settle() -> tuple[list[RankInfo], int, int]:
            executor, ranks = self._world.executor, loading()
            warn_if_tp_spans_hosts(config, [rank.host for rank in ranks])
            if draft is not None:
                ranks = try_draft(executor, config, tokenizer, ranks, draft)
            longest = max_model_len(config, spec)
            num_blocks = choose_num_blocks(config, ranks, longest)
            executor.call("allocate", num_blocks)
            longest = min(longest, num_blocks * ranks[0].block_size)
            self._core = EngineCore(executor, config, num_blocks, ranks[0].block_size, look_ahead(config, ranks))
            self._binding = Binding(executor, self._core, config, tokenizer, num_blocks, longest)
            self._requests = Requests(self._core, grammars, tokenizer, config.seed)
            self.driver = Driver(self._core, self._requests)
            return self._binding.begin(ranks, draft), num_blocks, longest

        self.ranks, self.num_blocks, self.max_model_len = self._world.everywhere(settle)
        self.block_size = self.ranks[0].block_size
        self._preparer = Preparer(
            tokenizer=tokenizer,
            defaults=defaults,
            vocab_size=spec.vocab_size,
            max_model_len=self.max_model_len,
            length_reason=f" (the KV cache has {self.num_blocks} blocks of {self.block_size})"
            if self.max_model_len == self.num_blocks * self.block_size
            else "",
            room=Room(config.max_num_seqs, self.num_blocks, self.block_size),
            ranks_are_apart=config.world_size > 1,
        )

    # ---- requests -----------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: Any = None, *, progress: bool = True
    ) -> list[RequestOutput]:
        """Completes prompts; gives their outputs in the order of the prompts.

        prompts: one, or a list; each a text, a list of token ids, or a list of chat messages.
        sampling_params: for all, or a list with one for each prompt: SamplingParams, a transformers GenerationConfig,
            a dict of fields, or None for the model's own defaults.
        progress: show a progress bar on stderr.

        Raises ValueError or TypeError for a prompt or parameter that cannot be served; then no prompt is begun.
        """
        return self._world.everywhere(lambda: self._generate(prompts, sampling_params, progress))

    def stream(self, prompts: Prompt | Sequence[Prompt], sampling_params: Any = None) -> Iterator[RequestOutput]:
        """As `generate`, but gives a request's output each time that it has grown: `delta` is what is new.

        With several prompts, `index` tells whose it is. Leaving the loop aborts what is unfinished.
        """
        return self._world.each_everywhere(lambda: self._stream(prompts, sampling_params))

    def add_request(self, prompt: Prompt, sampling_params: Any = None, request_id: str | None = None) -> str:
        """Queues one prompt for `step` to work on; gives the request's id. Raises as `generate` does."""

        def add() -> str:
            return self._requests.add([self._preparer.prepare(prompt, sampling_params)], [request_id])[0]

        return self._world.everywhere(add)

    def step(self) -> list[RequestOutput]:
        """Does one step of work; gives the outputs of the requests that it moved on."""
        return self._world.everywhere(lambda: self._requests.step())

    def abort(self, request_id: str) -> bool:
        """Ends a request; the next `step` gives its output, with finish_reason "abort". False if it is unknown."""
        return self._world.everywhere(lambda: self._core.abort(request_id))

    def has_unfinished(self) -> bool:
        """Whether `step` has something to do or to give."""
        return self._world.everywhere(lambda: self._requests.has_unfinished)

    def score(
        self,
        texts: Prompt | Sequence[Prompt],
        continuations: Prompt | Sequence[Prompt] | None = None,
        *,
        logprobs: int = 0,
        progress: bool = True,
    ) -> list[ScoreOutput]:
        """How probable texts are: of each token, given those before it. The first is given.

        texts: as the prompts of `generate`, up to `max_model_len` tokens each.
        continuations: one for each text, of which only these tokens are scored; appended token by token, without
            special tokens.
        logprobs: so many of the likeliest tokens are told in each place; -1: all.
        """
        return self._world.everywhere(lambda: self._score(texts, continuations, logprobs, progress))

    def embed(
        self, texts: Prompt | Sequence[Prompt], pooling: str = "mean", normalize: bool = False, *, progress: bool = True
    ) -> list[EmbeddingOutput]:
        """Texts as vectors: the last hidden states (after the final norm) of all tokens, "mean", or of one of them,
        "last" or "first".

        texts: as the prompts of `generate`, up to `max_model_len` tokens each; normalize: to length 1.
        """
        return self._world.everywhere(lambda: self._embed(texts, pooling, normalize, progress))

    # ---- what these do on the driver ----------------------------------------------------------------------------

    def _generate(self, prompts: Any, sampling_params: Any, progress: bool) -> list[RequestOutput]:
        return self._requests.finish(self._prepare(prompts, sampling_params), "Generating", progress)

    def _stream(self, prompts: Any, sampling_params: Any) -> Iterator[RequestOutput]:
        yield from self._requests.run(self._prepare(prompts, sampling_params), every_step=True)

    def _score(self, texts: Any, continuations: Any, logprobs: int, progress: bool) -> list[ScoreOutput]:
        requests = prepare_scores(self._preparer, texts, continuations, logprobs)
        outputs = self._requests.finish(requests, "Scoring", progress)
        return [score_of(request, output) for request, output in zip(requests, outputs, strict=True)]

    def _embed(self, texts: Any, pooling: str, normalize: bool, progress: bool) -> list[EmbeddingOutput]:
        requests = prepare_embeddings(self._preparer, texts, pooling)
        outputs = self._requests.finish(requests, "Embedding", progress)
        return [embedding_of(request, output, normalize) for request, output in zip(requests, outputs, strict=True)]

    def _prepare(self, prompts: Any, sampling_params: Any) -> list[PreparedRequest]:
        return in_batch("prompts", pair(prompts, sampling_params), self._preparer.prepare)

    # ---- for `AsyncInferenceEngine`, whose thread drives --------------------------------------------------------

    @property
    def is_driver(self) -> bool:
        """False on the ranks of torchrun that follow rank 0, which have no `driver`."""
        return self._world.is_driver

    def drive(self, told: Callable[[Sequence[Request]], None], obey: Callable[[bool], bool]) -> None:
        """Steps as long as `obey` says; one collective call, within which the driver's thread has the engine to itself,
        and does with it what `driver` can.

        obey: does what is to be done between two steps; False ends the call. It is told whether it may wait a
        while, there being nothing to compute. told: takes the requests that a step has moved on or ended.
        """
        self._world.everywhere(lambda: self.driver.drive(told, obey))

    def preparer_with(self, tokenizer: Any) -> Preparer:
        """What prepares requests, as `add_request` does, in another thread and with a tokenizer of its own."""
        return replace(self._preparer, tokenizer=tokenizer)

    @property
    def default_params(self) -> SamplingParams:
        """The model's own, which stand where a request says nothing."""
        return self._preparer.defaults

    # ---- what it is and does ------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Queue, cache and token counts, by replica; once every request has ended, all blocks are free."""

        def ask() -> EngineStats:
            self._core.settle()
            return self._core.stats()

        with interrupt_between_steps():
            return self._world.everywhere(ask)

    def busy(self) -> list[dict[str, float]]:
        """Each rank's steps, seconds of computing, and when they began and ended; waits for steps in flight."""

        def ask() -> list[dict[str, float]]:
            self._requests.drain()
            return self._world.executor.call("busy")

        return self._world.everywhere(ask)

    def set_attention_backend(self, name: str) -> None:
        """Binds another attention backend in every layer of every rank, between two steps; or in none.

        name: as `InferenceConfig.attention_backend`. Requests in flight go on. Each rank first proves that the new one
        gives what eager gives, on the shapes of its last step too; CUDA graphs are captured again. Raises ValueError
        with the reason of the first rank that cannot take it; all keep what they have. Ctrl-C waits until it is done.
        """

        def rebind() -> list[RankInfo]:
            check_backend_name("set_attention_backend", name)
            self._requests.drain()
            return self._binding.rebind(self.ranks, name)

        with interrupt_between_steps():
            self.ranks = self._world.everywhere(rebind)

    def enable_spec_decoding(self, speculative: SpeculativeConfig | str | Mapping[str, Any] = "suffix") -> None:
        """Lets tokens be guessed ahead, between two steps; or changes who guesses.

        speculative: a SpeculativeConfig, the name of a method, or a dict of fields. Requests in flight go on; no token
        comes out differently. Raises ValueError for what cannot be, TypeError for what is no such thing: all stays as
        it was then, but that a draft model which could not be replaced is gone.
        """

        def enable() -> Guessing:
            config = as_speculative_config(speculative)
            if config is None:
                raise TypeError("enable_spec_decoding: None is no SpeculativeConfig; disable_spec_decoding() ends it")
            draft = self._open_draft(config)
            if draft is not None:
                local = [rank.device for rank in self.ranks if rank.host == self.ranks[0].host]
                check_draft(self.config, draft.spec, [torch.device(device) for device in local])
            return self._speculate(config, draft)

        self._guess_as(enable)

    def disable_spec_decoding(self) -> None:
        """Lets no token be guessed ahead any more; a draft model's memory is freed."""
        self._guess_as(lambda: self._speculate(None, None))

    def _guess_as(self, change: Callable[[], Guessing]) -> None:
        with interrupt_between_steps():
            guessing = self._world.everywhere(change)
            self.speculative, self.ranks = guessing.config, guessing.ranks
        if guessing.error is not None:
            raise guessing.error

    def _open_draft(self, config: SpeculativeConfig | None) -> Checkpoint | None:
        if config is None or config.model is None:
            return None
        return open_draft(self.config, config.model, self._spec)

    def _speculate(self, config: SpeculativeConfig | None, draft: Checkpoint | None) -> Guessing:
        self._requests.drain()
        return self._binding.guess_as(self.ranks, self.speculative, config, draft)

    def describe(self) -> str:
        """The mesh and what each rank holds; what was bound in each layer, and why nothing else; where each setting
        came from."""
        guessing = [] if self.speculative is None else [describe_speculation(self.speculative, self.ranks)]
        return "\n".join([self.describe_mesh(), "", *describe_bound(self.ranks), *guessing, "", self.config.describe()])

    def describe_mesh(self) -> str:
        """The mesh and what each rank holds, as a table; last, why the CPU was chosen where there is CUDA as well."""
        table = describe_mesh(self._model, self.config, self.ranks, self.num_blocks, self.max_model_len)
        return "\n".join([*table, *([self._why_cpu] if self._why_cpu else [])])

    def check(self) -> None:
        """Proves the bookkeeping of blocks and sequences whole. Raises AssertionError."""
        self._world.everywhere(lambda: self._core.check())

    def close(self) -> None:
        """Ends the ranks and frees their memory; can be called twice. Under torchrun every rank calls it."""
        if self._grammars is not None:
            self._grammars.close()
        self._world.close()

    def __enter__(self) -> "InferenceEngine":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
