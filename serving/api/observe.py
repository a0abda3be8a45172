"""`GET /metrics` for Prometheus, and `GET /mesh` for the page."""

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from ...engine.rank_info import RankInfo
from ...engine.stats import ReplicaStats
from ..mesh_watch import MeshWatch, RankState
from ..metrics import CONTENT_TYPE, Metrics, kv_usage
from .answers import JsonAnswer
from .service import Service


def observe_routes(service: Service) -> APIRouter:
    router = APIRouter()
    engine = service.engine
    metrics = Metrics(engine, service.model_name)
    watch = MeshWatch(engine, metrics.note_tokens)

    @router.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(await watch.look()), media_type=CONTENT_TYPE)

    @router.get("/mesh")
    async def mesh() -> Response:
        """What each rank holds and does, as JSON. It may be asked for every second.

        model, max_model_len, block_size (tokens), dtype, is_ready, shape: {dp, pp, tp} (sizes), num_layers,
        num_unfinished (requests), span_s (what rates are of: the time before the last look, a second or more).

        replicas: one for each dp: replica, num_running and num_waiting (requests), num_queued_tokens (still to be
        computed), num_blocks, num_free_blocks, kv_usage (0 to 1), tokens_per_s, num_steps, num_preemptions,
        prompt_tokens, cached_tokens (of these, from the prefix cache), output_tokens, drafted_tokens, accepted_tokens.

        ranks: one for each rank: rank, dp, pp, tp (its place), host, pid, device, layers, query_heads, kv_heads
        (each [start, stop], stop excluded), has_embedding, has_lm_head, weight_bytes, kv_bytes, attention (names of
        its backends), num_steps, busy_s (since the start), busy_share (0 to 1).
        """
        sample = await watch.look()
        config, ranks = engine.config, engine.engine.ranks
        return JsonAnswer(
            {
                "model": service.model_name,
                "max_model_len": engine.max_model_len,
                "block_size": engine.engine.block_size,
                "dtype": ranks[0].dtype,
                "is_ready": service.is_ready,
                "shape": {"dp": config.dp_size, "pp": config.pp_size, "tp": config.tp_size},
                "num_layers": max(rank.layers[1] for rank in ranks),
                "num_unfinished": engine.num_unfinished,
                "span_s": watch.span_s,
                "replicas": [
                    {"replica": number, "tokens_per_s": watch.tokens_per_s(number), **_of_replica(replica)}
                    for number, replica in enumerate(sample.replicas)
                ],
                "ranks": [
                    {**_of_rank(info, engine.engine.num_blocks, state), "busy_share": watch.busy_share(info.rank)}
                    for info, state in zip(ranks, sample.ranks, strict=True)
                ],
            }
        )

    return router


def _of_replica(replica: ReplicaStats) -> dict[str, Any]:
    return {
        "num_running": replica.num_running,
        "num_waiting": replica.num_waiting,
        "num_queued_tokens": replica.num_queued_tokens,
        "num_blocks": replica.num_blocks,
        "num_free_blocks": replica.num_free_blocks,
        "kv_usage": kv_usage(replica),
        "num_steps": replica.num_steps,
        "num_preemptions": replica.num_preemptions,
        "prompt_tokens": replica.num_prompt_tokens,
        "cached_tokens": replica.num_cached_tokens,
        "output_tokens": replica.num_output_tokens,
        "drafted_tokens": replica.num_drafted,
        "accepted_tokens": replica.num_accepted,
    }


def _of_rank(info: RankInfo, num_blocks: int, state: RankState) -> dict[str, Any]:
    return {
        "rank": info.rank,
        **info.coordinate,
        "host": info.host,
        "pid": info.pid,
        "device": info.device,
        "layers": info.layers,
        "query_heads": info.query_heads,
        "kv_heads": info.kv_heads,
        "has_embedding": info.has_embedding,
        "has_lm_head": info.has_lm_head,
        "weight_bytes": info.weight_bytes,
        "kv_bytes": num_blocks * info.block_bytes,
        "attention": info.attention_backends,
        "num_steps": state.num_steps,
        "busy_s": state.busy_s,
    }
