"""Settings of one request that cannot hold together, whatever the model."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .sampling import SamplingParams


def contradictions(params: "SamplingParams") -> Iterator[str]:
    """One line for each, naming the fields, their values and what would work. A field that is None says nothing yet."""
    yield from _of_length(params)
    yield from _of_beams(params) if params.num_beams > 1 else _of_samples(params)
    yield from _of_tokens(params)


def _of_length(params: "SamplingParams") -> Iterator[str]:
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        yield f"min_tokens={params.min_tokens} is more than max_tokens={params.max_tokens}"
    if params.max_total_tokens is not None and params.min_tokens >= params.max_total_tokens:
        yield (
            f"min_tokens={params.min_tokens} is not below max_total_tokens={params.max_total_tokens}, which counts the "
            "prompt too"
        )
    if params.stop and not params.detokenize:
        yield f"stop={list(params.stop)} is looked for in the text, but detokenize=False makes none"
    forced = params.forced_token_ids
    if forced and params.max_tokens is not None and len(forced) > params.max_tokens:
        yield f"forced_token_ids has {len(forced)} tokens, but max_tokens={params.max_tokens} lets out fewer"


def _of_beams(params: "SamplingParams") -> Iterator[str]:
    beams = f"num_beams={params.num_beams}"
    sampling = {"temperature": params.temperature}
    if params.temperature is None:  # else these are idle, as they are in greedy decoding
        sampling = {"top_k": params.top_k, "top_p": params.top_p, "min_p": params.min_p}
    for name, value in sampling.items():
        if value is not None and value != (1 if name == "top_p" else 0):
            yield f"{beams} with {name}={value}: beam search does not sample; give temperature=0, or num_beams=1"
    if params.n > params.num_beams:
        yield f"n={params.n} is more than {beams}: beam search gives at most as many outputs as it has beams"
    if params.best_of is not None:
        yield f"best_of={params.best_of} with {beams}: beam search already gives the best of its beams; leave it out"
    for name in ("logprobs", "forced_token_ids", "structured_outputs"):
        if getattr(params, name) is not None:
            yield f"{beams} with {name} is not supported; give num_beams=1"


def _of_samples(params: "SamplingParams") -> Iterator[str]:
    if params.best_of is not None and params.best_of < params.n:
        yield f"best_of={params.best_of} is less than n={params.n}, which are chosen from them"
    if params.best_of is not None and params.best_of > params.n and params.seed is None:
        yield f"best_of={params.best_of} without a seed: nobody could find out again what was left out; give a seed"
    for name, number in (("n", params.n), ("best_of", params.best_of or 1)):
        if number > 1 and params.temperature == 0:
            yield (
                f"{name}={number} with temperature=0: greedy decoding gives the same output every time, whatever the "
                f"seed; give a temperature above 0, or num_beams={number}"
            )
        elif number > 1 and params.forced_token_ids is not None:
            yield f"{name}={number} with forced_token_ids: every output would begin with the same; give {name}=1"


def _of_tokens(params: "SamplingParams") -> Iterator[str]:
    banned = {*(params.suppress_tokens or ())}
    banned |= {word[0] for word in params.bad_words or () if not isinstance(word, str) and len(word) == 1}
    if params.min_tokens:
        banned |= {*params.stop_token_ids} | ({*(params.eos_token_ids or ())} if not params.ignore_eos else set())
    if params.allowed_token_ids is not None and banned.issuperset(params.allowed_token_ids):
        yield (
            f"allowed_token_ids={list(params.allowed_token_ids)} are all banned by suppress_tokens, bad_words or "
            "min_tokens (end tokens); allow one more"
        )
    if params.structured_outputs is None:
        return
    if params.forced_token_ids is not None:
        yield "forced_token_ids with structured_outputs: both say what the output must be; give one"
    if params.min_tokens:
        yield (
            f"min_tokens={params.min_tokens} with structured_outputs: what is complete before could not end; give "
            "min_tokens=0"
        )
