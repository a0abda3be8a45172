"""Every family's greedy tokens are transformers' own, on every mesh; docs/families.md says which, and is held to it.

A few families run here; all of them, `slow`, in processes of their own (tests/shared/parity.py), whose results the
other tests share. Equality is strict: references in which two logits nearly tie are not used (`Reference.faults`).
"""

import re

import pytest
from families import FAMILIES, NOT_BUILT, greedy_reference, tiny_config, tiny_model
from parity import CONFIG, DOCUMENT, OPTIONAL, Result, document, measure, meshes_of, passing, policy

from meshlm import InferenceConfig, InferenceEngine

QUICK = ("llama", "gemma2", "gpt2", "bloom")
MIN_PASSING = 100


def read_document() -> tuple[dict[str, list[str]], list[str], dict[str, str]]:
    """docs/families.md: the families that pass with their meshes, those that do not, and the policy of each."""
    tables = DOCUMENT.read_text().split("## The others")
    good, others = ([line.strip("| ").split(" | ", 3) for line in re.findall(r"^\| .*", t, re.M)[1:]] for t in tables)
    policies = {family: policy for family, _, policy, _ in good + others}
    assert len(policies) == len(good) + len(others)
    return {row[0]: row[3].split(", ") for row in good}, [row[0] for row in others], policies


@pytest.fixture(scope="session")
def results() -> list[Result]:
    return measure()


# ---- quick -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", QUICK)
def test_a_module_on_one_rank(family: str) -> None:
    model = tiny_model(family)
    reference = greedy_reference(model)
    assert reference.faults() == []
    params = {"temperature": 0, "max_tokens": len(reference.outputs[0]), "ignore_eos": True}
    with InferenceEngine(model, InferenceConfig(**CONFIG)) as engine:
        outputs = engine.generate(reference.prompts, params, progress=False)
    assert [list(output.token_ids) for output in outputs] == reference.outputs


def test_the_document_names_every_family_and_its_policy() -> None:
    good, others, policies = read_document()
    assert policies == {family: policy(family) for family in FAMILIES}
    for family, meshes in good.items():
        assert set(meshes_of(family)) - set(OPTIONAL) <= set(meshes) <= set(meshes_of(family))
    assert set(NOT_BUILT) <= set(others)
    assert len(good) >= MIN_PASSING
    assert DOCUMENT.read_text().startswith(f"# Families\n\n{len(good)} of the {len(FAMILIES)} families")


def test_a_reference_that_tells_nothing_is_found_out() -> None:
    """As transformers draws it, a tiny model repeats its last token, whatever comes before."""
    from transformers import AutoModelForCausalLM

    dull = AutoModelForCausalLM.from_config(tiny_config("llama")).eval()
    faults = greedy_reference(dull).faults()
    assert any("distinct tokens" in fault for fault in faults)


# ---- all families ----------------------------------------------------------------------------------------------------


def _cases() -> list[tuple[str, str]]:
    return [(family, mesh) for family, meshes in read_document()[0].items() for mesh in meshes]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("family", "mesh"), _cases())
def test_parity(family: str, mesh: str, results: list[Result]) -> None:
    [result] = [result for result in results if (result.family, result.mesh) == (family, mesh)]
    assert (result.passed, result.reason, result.faults) == (True, "", [])


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_document_says_what_was_found(results: list[Result]) -> None:
    assert len(passing(results)) >= MIN_PASSING
    assert DOCUMENT.read_text() == document(results)
