"""What a rank tells of itself once it has loaded: what it holds, on what, and how that is bound."""

from dataclasses import dataclass, replace

from ..shardformer.backends import Bound


@dataclass(frozen=True)
class RankInfo:
    """What a rank holds."""

    rank: int
    coordinate: dict[str, int]
    host: str
    pid: int
    device: str
    dtype: str
    layers: tuple[int, int]  # (start, stop)
    query_heads: tuple[int, int]
    kv_heads: tuple[int, int]
    vocabulary: tuple[int, int]
    has_embedding: bool
    has_lm_head: bool
    num_threads: int
    weight_bytes: int
    bytes_read: int
    load_s: float
    baseline_rss_bytes: int  # resident before loading
    peak_rss_bytes: int
    available_bytes: int  # on its device, once the weights are there
    block_size: int
    block_bytes: int  # one block of the KV cache, in those of both models if there is a draft model
    graph_sizes: tuple[int, ...]  # batches that run from CUDA graphs, the largest first
    graph_bytes: int  # what these graphs take: before they are captured, about
    attention: tuple[Bound, ...]
    ops: str
    collectives: str  # what each axis with several ranks communicates by
    draft: "DraftInfo | None" = None  # what of a draft model is in these numbers

    @property
    def attention_backends(self) -> tuple[str, ...]:
        """The names of those that its layers have bound."""
        return tuple(dict.fromkeys(bound.name for bound in self.attention))

    def row(self, num_blocks: int, name_host: bool) -> dict[str, str]:
        """This rank as a row of a table: column -> cell."""

        def span(ends: tuple[int, int]) -> str:
            first, last = ends[0], ends[1] - 1
            return str(first) if first == last else f"{first}-{last}"

        threads = f"{self.num_threads} thread" + ("s" if self.num_threads > 1 else "")
        extra = (["embedding"] if self.has_embedding else []) + (["LM head"] if self.has_lm_head else [])
        return {
            "rank": str(self.rank),
            "(dp, pp, tp)": str(tuple(self.coordinate.values())),
            **({"host": self.host} if name_host else {}),
            "device": f"{self.device} ({threads})" if self.device == "cpu" else self.device,
            "layers": span(self.layers),
            "query heads": span(self.query_heads),
            "KV heads": span(self.kv_heads),
            "vocabulary": f"{span(self.vocabulary)} ({', '.join(extra)})" if extra else "",
            "weights": f"{self.weight_bytes / 2**20:.0f} MiB",
            "KV cache, up to": f"{self.block_bytes * num_blocks / 2**20:.0f} MiB",
            **({"CUDA graphs": self._graphs} if self.graph_sizes else {}),
        }

    @property
    def _graphs(self) -> str:
        return f"{len(self.graph_sizes)} ({self.graph_bytes / 2**20:.0f} MiB)"


@dataclass(frozen=True)
class DraftInfo:
    """What a rank holds of a draft model."""

    architecture: str
    weight_bytes: int
    block_bytes: int  # one block of its KV cache
    has_graphs: bool  # whether its steps can run from CUDA graphs
    available_bytes: int  # on the device, once its weights are there

    def beside(self, rank: RankInfo) -> RankInfo:
        """The rank with the draft model."""
        return replace(
            rank,
            weight_bytes=rank.weight_bytes + self.weight_bytes,
            block_bytes=rank.block_bytes + self.block_bytes,
            available_bytes=self.available_bytes,
            draft=self,
        )

    def aside(self, rank: RankInfo) -> RankInfo:
        """The rank without the draft model."""
        return replace(
            rank,
            weight_bytes=rank.weight_bytes - self.weight_bytes,
            block_bytes=rank.block_bytes - self.block_bytes,
            draft=None,
        )
