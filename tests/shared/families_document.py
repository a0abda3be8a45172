"""docs/families.md, of what `parity.measure` finds.

python tests/shared/families_document.py              all families, and writes the file (minutes)
python tests/shared/families_document.py llama gpt2   some, and prints what is found
"""

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import transformers
from families import FAMILIES, NOT_BUILT
from parity import GENERIC, HAND_WRITTEN, MESHES, OPTIONAL, Result, measure, policy_of

DOCUMENT = Path(__file__).parents[2] / "docs" / "families.md"


def is_of_another_transformers() -> bool:
    """Whether the document tells of another version than the one installed, with other families."""
    version = re.search(r"in transformers (\d\S+)", DOCUMENT.read_text())
    return version is not None and version[1] != transformers.__version__


def find(results: Iterable[Result], family: str, policy: str) -> list[Result]:
    return [result for result in results if (result.family, result.policy) == (family, policy)]


def passes(tried: Sequence[Result]) -> bool:
    """Whether a family's results are right on every mesh; those of `OPTIONAL` may have been refused."""
    return bool(tried) and all(result.passed or (result.refused and result.mesh in OPTIONAL) for result in tried)


def write(results: Sequence[Result]) -> str:
    """The document's text."""
    good = [family for family in sorted(FAMILIES) if passes(find(results, family, policy_of(family)))]
    by_hand = [family for family in good if policy_of(family) == HAND_WRITTEN]
    version = transformers.__version__
    lines = [
        "# Families",
        "",
        f"{len(good)} of the {len(FAMILIES)} families of causal language models in transformers {version} pass:",
        f"{len(by_hand)} by hand-written policies, {len(good) - len(by_hand)} by the generic one. To pass is to",
        "generate, from a tiny random model in float32, the tokens that transformers generates, 24 for each of 6",
        "prompts in one batch, on every mesh named. `python tests/shared/families_document.py` writes this page, and",
        "`tests/families` holds it to be true.",
        "",
        *_table("passes on", good, policy_of, results),
        "",
        "## The others",
        "",
        *_table("why not", [family for family in sorted(FAMILIES) if family not in good], policy_of, results),
        "",
        '## Hand-written families with `policy="generic"`',
        "",
        *_table("passes on, or why not", by_hand, lambda _: GENERIC, results),
    ]
    return "\n".join(lines) + "\n"


def _table(last: str, families: Iterable[str], policy: Callable[[str], str], results: Iterable[Result]) -> list[str]:
    lines = [f"| family | architecture | policy | {last} |", "|---|---|---|---|"]
    for family in families:
        outcome = _outcome(family, find(results, family, policy(family)))
        lines.append(f"| {family} | {FAMILIES[family]} | {policy(family)} | {outcome} |")
    return lines


def _outcome(family: str, tried: Sequence[Result]) -> str:
    if family in NOT_BUILT:
        return f"not tried: {NOT_BUILT[family]}"
    passed = [mesh for mesh in MESHES if any(result.mesh == mesh and result.passed for result in tried)]
    if passes(tried):
        return ", ".join(passed)
    reasons: dict[str, list[str]] = {}
    for result in tried:
        if not result.passed:
            reasons.setdefault(result.reason.replace("|", "\\|"), []).append(result.mesh)
    told = [reason if "1" in meshes else f"{', '.join(meshes)}: {reason}" for reason, meshes in reasons.items()]
    return "; ".join([*([f"passes on {', '.join(passed)}"] if passed else []), *told])


@dataclass(frozen=True)
class Row:
    """A line of one of the tables."""

    title: str  # of the last column
    family: str
    policy: str
    outcome: str


def read() -> list[Row]:
    """All lines of the document's tables."""
    rows, title = [], ""
    for line in re.findall(r"^\| .*", DOCUMENT.read_text(), re.M):
        family, _, policy, last = line.strip("| ").split(" | ", 3)
        if family == "family":
            title = last
        else:
            rows.append(Row(title, family, policy, last))
    return rows


def main(families: Sequence[str]) -> None:
    results = measure(families or FAMILIES)
    if not families:
        DOCUMENT.write_text(write(results))
    for result in results:
        if not result.passed or result.faults or families:
            outcome = "passed" if result.passed else result.reason
            print(result.family, result.policy, result.mesh, outcome, *result.faults, sep=" | ")
    print(f"{sum(passes(find(results, family, policy_of(family))) for family in FAMILIES)} families pass")


if __name__ == "__main__":
    main(sys.argv[1:])
