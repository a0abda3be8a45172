"""Every family's greedy tokens are transformers' own, on every mesh; docs/families.md says which, and is held to it.

A few families run here; all of them, `slow`, in processes of their own (tests/shared/parity.py), whose results the
other tests share. Equality is strict: references in which two logits nearly tie are not used (`Reference.faults`).
"""

import pytest
from families import FAMILIES, NOT_BUILT, greedy_reference, tiny_config, tiny_model
from families_document import DOCUMENT, find, is_of_another_transformers, passes, read, write
from parity import CONFIG, MESHES, OPTIONAL, Item, Result, measure, meshes_of, policy_of

from meshlm import InferenceConfig, InferenceEngine

QUICK = ("llama", "gemma2", "gpt2", "bloom")
MIN_PASSING = 100
of_the_document = pytest.mark.skipif(is_of_another_transformers(), reason="documented with another transformers")


@pytest.fixture(scope="session")
def results() -> list[Result]:
    return measure()


def documented() -> list[Item]:
    """What passes, as the document says."""
    return [
        Item(row.family, row.policy, mesh)
        for row in read()
        if row.title.startswith("passes on") and set(meshes := row.outcome.split(", ")) <= set(MESHES)
        for mesh in meshes
    ]


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


@of_the_document
def test_the_document_names_every_family_and_its_policy() -> None:
    rows = [row for row in read() if row.title in ("passes on", "why not")]
    assert {row.family: row.policy for row in rows} == {family: policy_of(family) for family in FAMILIES}
    assert len(rows) == len(FAMILIES)
    good = {row.family: set(row.outcome.split(", ")) for row in rows if row.title == "passes on"}
    for family, meshes in good.items():
        tried = set(meshes_of(family, policy_of(family)))
        assert tried - set(OPTIONAL) <= meshes <= tried, family
    assert good.keys().isdisjoint(NOT_BUILT)
    assert DOCUMENT.read_text().startswith(f"# Families\n\n{len(good)} of the {len(FAMILIES)} families")
    assert len(good) >= MIN_PASSING


def test_a_reference_that_tells_nothing_is_found_out() -> None:
    """As transformers draws it, a tiny model repeats its last token, whatever comes before."""
    from transformers import AutoModelForCausalLM

    dull = AutoModelForCausalLM.from_config(tiny_config("llama")).eval()
    faults = greedy_reference(dull).faults()
    assert any("distinct tokens" in fault for fault in faults)


# ---- all families ----------------------------------------------------------------------------------------------------


@of_the_document
@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("item", documented(), ids=lambda item: f"{item.family}-{item.policy}-{item.mesh}")
def test_parity(item: Item, results: list[Result]) -> None:
    [result] = [result for result in find(results, item.family, item.policy) if result.mesh == item.mesh]
    assert (result.passed, result.reason, result.faults) == (True, "", [])


@of_the_document
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_document_says_what_was_found(results: list[Result]) -> None:
    assert sum(passes(find(results, family, policy_of(family))) for family in FAMILIES) >= MIN_PASSING
    assert DOCUMENT.read_text() == write(results)
