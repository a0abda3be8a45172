"""From transformers' `GenerationConfig` to the fields of `SamplingParams`."""

from collections.abc import Callable
from typing import Any

from .errors import ConfigError

SAMPLING = ("top_k", "top_p", "min_p")  # naming one of these, with no temperature, asks for sampling

# transformers, GenerationConfig._get_default_generation_params
_SAMPLING_DEFAULTS: dict[str, Any] = {"temperature": 1.0, "top_k": 50}

# SamplingParams' name -> GenerationConfig's
_NAMES = {
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "stop": "stop_strings",
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
    "bad_words": "bad_words_ids",
    "suppress_tokens": "suppress_tokens",
    "begin_suppress_tokens": "begin_suppress_tokens",
    "length_penalty": "length_penalty",
    "early_stopping": "early_stopping",
}

# Settings that change the output and are not supported, each with the value that changes nothing. What only makes
# generating faster is not among them (assistants, prompt lookup, caches, compilation).
_UNSUPPORTED: dict[str, Any] = {
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "penalty_alpha": 0.0,
    "guidance_scale": 1.0,
    "constraints": [],
    "force_words_ids": [],
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "watermarking_config": None,
    "dola_layers": None,
    "token_healing": False,
    "max_time": None,
    "assistant_ensemble_weight": None,
}
_UNSUPPORTED_IN_SAMPLING: dict[str, Any] = {"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "top_h": None}
_UNSUPPORTED_IN_BEAM_SEARCH: dict[str, Any] = {"renormalize_logits": False}  # without beams it shifts all logits alike


def read_generation_config(generation_config: Any, strict: bool) -> dict[str, Any]:
    """Fields of SamplingParams, without those that nothing is said about; values are not checked.

    strict: a caller's own config, all of which must be supported (ConfigError). Else a model's, of which what is not
    supported is left out, and so is how many outputs or beams there are, which is the request's to say.
    """

    def get(name: str) -> Any:
        return getattr(generation_config, name, None)

    beams = get("num_beams") not in (None, 1)
    # Unset, `do_sample` leaves it to the model whether to sample; not so with beams.
    do_sample = get("do_sample") if strict and not beams else bool(get("do_sample"))
    values = {ours: get(theirs) for ours, theirs in _NAMES.items()}
    values |= {
        "max_total_tokens": get("max_length") if get("max_new_tokens") is None else None,
        "eos_token_ids": [eos] if isinstance(eos := get("eos_token_id"), int) else eos,
        "logit_bias": _single_token_bias(get("sequence_bias"), strict),
    }
    if strict:
        _refuse_unsupported(get, sampling=do_sample is not False, beams=beams)
        values |= {"n": get("num_return_sequences"), "num_beams": get("num_beams")}
    if do_sample is False:
        values["temperature"] = 0.0
    else:
        values |= {name: get(name) for name in ("temperature", *SAMPLING)}
    if do_sample:
        values |= {name: value for name, value in _SAMPLING_DEFAULTS.items() if values[name] is None}
    return {name: value for name, value in values.items() if value is not None}


def _single_token_bias(sequence_bias: Any, strict: bool) -> dict[int, float] | None:
    """`sequence_bias` maps sequences of token ids to a bias, or lists [sequence, bias]."""
    if not sequence_bias:
        return None
    try:
        bias = {tuple(ids): value for ids, value in getattr(sequence_bias, "items", lambda: sequence_bias)()}
    except (TypeError, ValueError):
        bias = {(): None}
    if strict and any(len(ids) != 1 for ids in bias):
        raise ConfigError(
            f"GenerationConfig.sequence_bias={sequence_bias!r} is not supported; single tokens may have a bias"
        )
    return {ids[0]: value for ids, value in bias.items() if len(ids) == 1} or None


def _refuse_unsupported(get: Callable[[str], Any], sampling: bool, beams: bool) -> None:
    neutral = dict(_UNSUPPORTED)
    if sampling:
        neutral |= _UNSUPPORTED_IN_SAMPLING
    if beams:
        neutral |= _UNSUPPORTED_IN_BEAM_SEARCH
    if get("min_new_tokens") is None:  # which replaces min_length
        neutral["min_length"] = 0
    problems = [
        f"GenerationConfig.{name}={get(name)!r} is not supported"
        for name, value in neutral.items()
        if get(name) is not None and get(name) != value
    ]
    if problems:
        raise ConfigError("; ".join(problems))
