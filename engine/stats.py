"""What an engine is doing, in numbers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ReplicaStats:
    """One DP replica's present state and totals since the start."""

    num_waiting: int
    num_running: int
    num_queued_tokens: int  # to be computed, outputs that are expected included: what requests are balanced by
    num_blocks: int
    num_free_blocks: int
    num_preemptions: int
    num_steps: int
    num_prompt_tokens: int  # of finished and running requests
    num_cached_tokens: int  # of those, found in the prefix cache
    num_output_tokens: int
    num_draft_steps: int  # of a draft model
    num_drafted: int  # tokens that were guessed ahead
    num_accepted: int  # of these, those that were right


@dataclass(frozen=True)
class EngineStats:
    """State and totals of the engine, by DP replica."""

    replicas: tuple[ReplicaStats, ...]

    @property
    def num_preemptions(self) -> int:
        return sum(replica.num_preemptions for replica in self.replicas)

    @property
    def num_cached_tokens(self) -> int:
        return sum(replica.num_cached_tokens for replica in self.replicas)

    @property
    def num_output_tokens(self) -> int:
        return sum(replica.num_output_tokens for replica in self.replicas)

    @property
    def num_drafted(self) -> int:
        return sum(replica.num_drafted for replica in self.replicas)

    @property
    def num_accepted(self) -> int:
        return sum(replica.num_accepted for replica in self.replicas)
