"""What the ranks bind while no step is in flight, at the start or later: attention backends, draft models, CUDA graphs.

On the driver. Every rank takes a change, or all keep what they have.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..config import ConfigError, InferenceConfig, SpeculativeConfig
from ..mesh.launch import RankFailure
from ..shardformer import Checkpoint
from ..shardformer.shardformer import max_model_len
from .core import EngineCore
from .draft_model import check_tokenizer, draft_config
from .executor import Executor, rank_name
from .plan import check_draft_room
from .rank_info import DraftInfo, RankInfo


@dataclass(frozen=True)
class Guessing:
    """Who guesses tokens ahead, as it turned out."""

    config: SpeculativeConfig | None
    ranks: list[RankInfo]
    error: ValueError | None = None  # why it is not who was asked for, if that showed when the one before was gone


def try_draft(
    executor: Executor, config: InferenceConfig, tokenizer: Any, ranks: Sequence[RankInfo], draft: Checkpoint
) -> list[RankInfo]:
    """Lets every rank load a draft model, or none; the ranks with it. It is not bound yet."""
    check_tokenizer(config, draft.name, tokenizer)
    found: list[DraftInfo | str] = executor.call("try_draft", draft)
    for number, info in enumerate(found):
        if isinstance(info, str):
            executor.call("forget_draft")
            raise ValueError(info if len(found) == 1 else f"{rank_name(config, number)}: {info}")
    return [info.beside(rank) for rank, info in zip(ranks, found, strict=True) if isinstance(info, DraftInfo)]


class Binding:
    """Binds for an engine whose cache is allocated.

    num_blocks: of the cache. longest: tokens of a sequence.
    """

    def __init__(
        self,
        executor: Executor,
        core: EngineCore,
        config: InferenceConfig,
        tokenizer: Any,
        num_blocks: int,
        longest: int,
    ) -> None:
        self._executor, self._core, self._config, self._tokenizer = executor, core, config, tokenizer
        self._num_blocks, self._longest = num_blocks, longest

    def begin(self, ranks: Sequence[RankInfo], draft: Checkpoint | None) -> list[RankInfo]:
        """At the start. draft: what every rank has tried. The ranks as they are then."""
        self._bind_draft()
        found = self._capture(ranks)
        self._capture_draft(found)
        self._let_guess(self._config.speculative, draft)
        return found

    # ---- attention ----------------------------------------------------------------------------------------------

    def rebind(self, ranks: Sequence[RankInfo], name: str) -> list[RankInfo]:
        """Another attention backend in every layer. Raises ValueError with the reason of the first rank that cannot."""
        for rank, reason in enumerate(self._executor.call("try_backend", name)):
            if reason is not None:
                raise ValueError(reason if len(ranks) == 1 else f"{rank_name(self._config, rank)}: {reason}")
        try:
            return self._swap(ranks)
        except RankFailure:
            raise
        except RuntimeError as error:  # of capturing
            self._swap(ranks)
            raise ValueError(f"set_attention_backend({name!r}): {error}") from error

    def _swap(self, ranks: Sequence[RankInfo]) -> list[RankInfo]:
        """Binds what was tried, or what was bound before it."""
        changes = self._executor.call("bind_backend")
        return self._capture([replace(rank, **changed) for rank, changed in zip(ranks, changes, strict=True)])

    # ---- who guesses --------------------------------------------------------------------------------------------

    def guess_as(
        self,
        ranks: Sequence[RankInfo],
        former: SpeculativeConfig | None,
        config: SpeculativeConfig | None,
        draft: Checkpoint | None,
    ) -> Guessing:
        """Another one who guesses, or nobody, in place of `former`."""
        alone = [rank if rank.draft is None else rank.draft.aside(rank) for rank in ranks]
        found = alone
        if draft is not None:
            found = try_draft(self._executor, self._config, self._tokenizer, alone, draft)
            try:
                check_draft_room(found, self._num_blocks)
            except ConfigError:
                self._executor.call("forget_draft")
                raise
        try:
            self._bind_draft()
            self._capture_draft(found)
        except RankFailure:
            raise
        except RuntimeError as error:
            self._bind_draft()  # none: the one before is gone already
            if former is not None and former.model is not None:
                former = None
                self._let_guess(None, None)
            return Guessing(former, alone, ValueError(f"SpeculativeConfig.model: {error}"))
        self._let_guess(config, draft)
        return Guessing(config, found)

    def _bind_draft(self) -> None:
        """Lets every rank take the draft model that was tried, or none."""
        found = self._executor.call("bind_draft", self._num_blocks)
        if failed := [reason for reason in found if reason is not None]:
            raise RuntimeError(failed[0])

    def _let_guess(self, config: SpeculativeConfig | None, draft: Checkpoint | None) -> None:
        """Tells the replicas who guesses. draft: the model that every rank has taken."""
        longest = 0
        if draft is not None:
            longest = max_model_len(draft_config(self._config, draft.spec, self._config.block_size), draft.spec)
        self._core.speculate(config, longest)

    # ---- CUDA graphs --------------------------------------------------------------------------------------------

    def _capture(self, ranks: Sequence[RankInfo]) -> list[RankInfo]:
        """Lets every rank capture its CUDA graphs, if all of them can; the ranks as they are then."""
        sizes = ranks[0].graph_sizes if all(rank.graph_sizes for rank in ranks) else ()
        if not sizes:
            return [replace(rank, graph_sizes=(), graph_bytes=0) for rank in ranks]
        self._capture_model(0, sizes)
        taken = self._executor.call("graph_bytes")
        return [replace(rank, graph_sizes=sizes, graph_bytes=size) for rank, size in zip(ranks, taken, strict=True)]

    def _capture_draft(self, ranks: Sequence[RankInfo]) -> None:
        """The same for the draft model, if there is one. ranks: as they are once the target's are captured."""
        if ranks[0].graph_sizes and all(rank.draft is not None and rank.draft.has_graphs for rank in ranks):
            self._capture_model(1, ranks[0].graph_sizes)

    def _capture_model(self, model: int, sizes: Sequence[int]) -> None:
        from tqdm import tqdm

        call, which = self._executor.call, "the draft model's " if model else ""
        call("begin_graphs", model, sizes[0], self._longest)
        for size in tqdm(sizes, desc=f"Capturing {which}CUDA graphs", unit="graph"):
            if failed := [reason for reason in call("capture", model, size) if reason is not None]:
                raise RuntimeError(failed[0])
