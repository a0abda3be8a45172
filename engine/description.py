"""What `InferenceEngine.describe` says of the mesh, and of what ranks have bound."""

from collections import defaultdict
from collections.abc import Collection, Sequence

from ..config import InferenceConfig, SpeculativeConfig
from ..shardformer.backends import Bound
from ..shardformer.backends.bound import Refusals
from .rank_info import RankInfo


def describe_mesh(
    model: str, config: InferenceConfig, ranks: Sequence[RankInfo], num_blocks: int, max_model_len: int
) -> list[str]:
    """Lines: the mesh and its cache, and a table of what each rank holds. model: its architecture."""
    head = (
        f"{model} on dp={config.dp_size} × pp={config.pp_size} × tp={config.tp_size}, {ranks[0].dtype}, "
        f"max_model_len {max_model_len}; KV cache of each replica: {num_blocks} blocks of {ranks[0].block_size} tokens"
    )
    bound = [f"attention {', '.join(rank.attention_backends)}; ops {rank.ops}" for rank in ranks]
    several_hosts = len({rank.host for rank in ranks}) > 1
    rows = [rank.row(num_blocks, several_hosts) for rank in ranks]
    if len(set(bound)) > 1:
        rows = [{**row, "bound": text} for row, text in zip(rows, bound, strict=True)]
    else:
        head += f"; {bound[0]}"
    columns = list(rows[0])
    widths = {column: max(len(column), *(len(row[column]) for row in rows)) for column in columns}
    lines = [{column: column for column in columns}, *rows]
    return [head, *("  ".join(row[c].ljust(widths[c]) for c in columns).rstrip() for row in lines)]


def describe_bound(ranks: Sequence[RankInfo]) -> list[str]:
    """Lines: each attention backend with its layers, below it why no other is bound there; the ops. Ranks are named
    where they differ."""
    groups: dict[tuple[str, Refusals], dict[int, Bound]] = defaultdict(dict)
    for rank in ranks:
        for bound in rank.attention:
            groups[bound.name, bound.refused][rank.rank] = bound
    lines = []
    for (name, refused), holders in groups.items():
        layers = {layer for bound in holders.values() for layer in bound.layers}
        if all(_has_all(holders.get(rank.rank), rank, layers) for rank in ranks):
            lines.append(f"attention: {name} in {_span('layer', layers)}")
        else:
            having: dict[tuple[int, ...], list[int]] = defaultdict(list)
            for number, bound in holders.items():
                having[bound.layers].append(number)
            lines += [f"attention on {_span('rank', r)}: {name} in {_span('layer', own)}" for own, r in having.items()]
        found: dict[str, list[int]] = defaultdict(list)
        for number, bound in holders.items():
            for text in bound.tuned:
                found[text].append(number)
        for text, numbers in found.items():
            where = "" if len(numbers) == len(holders) else f" on {_span('rank', numbers)}"
            lines.append(f"  tuned{where}: {text}")
        lines += [f"  not {other}: {reason}" for other, reason in refused]
    lines += _alike_or_not("ops", [(rank.rank, rank.ops) for rank in ranks])
    return lines + _alike_or_not("collectives", [(rank.rank, rank.collectives) for rank in ranks if rank.collectives])


def _alike_or_not(what: str, found: Sequence[tuple[int, str]]) -> list[str]:
    """Of what each rank has: one line for all, or one for those that have the same."""
    having: dict[str, list[int]] = defaultdict(list)
    for rank, name in found:
        having[name].append(rank)
    if len(having) == 1:
        return [f"{what}: {name}" for name in having]
    return [f"{what} on {_span('rank', ranks)}: {name}" for name, ranks in having.items()]


def describe_speculation(config: SpeculativeConfig, ranks: Sequence[RankInfo]) -> str:
    """Who guesses now, in one line; `InferenceConfig.speculative` is who did at the start."""
    length = "always" if not config.adaptive else "up to"
    who: str = config.method
    drafts = [rank.draft for rank in ranks if rank.draft is not None]
    if drafts:
        size = max(draft.weight_bytes for draft in drafts) / 2**20
        who += f" {config.model} ({drafts[0].architecture}, {size:.0f} MiB of weights on a rank)"
    return f"speculative decoding: {who}, {length} {config.num_speculative_tokens} tokens"


def _has_all(bound: Bound | None, rank: RankInfo, layers: Collection[int]) -> bool:
    """Whether a rank has bound it in all of those layers that it holds."""
    held = {layer for layer in layers if rank.layers[0] <= layer < rank.layers[1]}
    return held == set(bound.layers if bound is not None else ())


def _span(what: str, numbers: Collection[int]) -> str:
    """``layers 0-3, 6``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return f"{what}{'s' * (len(numbers) > 1)} " + ", ".join("-".join(map(str, run)) for run in runs)
