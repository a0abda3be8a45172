"""What is printed: a line for each workload of a model, and whether its target is met."""

from collections.abc import Sequence
from dataclasses import dataclass

from measuring import format_table

from .engines import ENGINES
from .tasks import Result, Shape, Task

DECODE_TARGET = ("llama", 0.85)  # share of the limit
REQUESTS_TARGET = 3.0  # times continuous batching


@dataclass(frozen=True)
class Line:
    """A row of the table: a workload of a model."""

    model: str
    workload: str
    by_engine: dict[str, Result]

    @property
    def ratio(self) -> float | None:
        """Ours over the peer's."""
        ours, *peers = (self.by_engine.get(name) for name in ENGINES)
        rates = [peer.tokens_per_s for peer in peers if peer is not None and peer.tokens_per_s]
        return ours.tokens_per_s / rates[0] if ours is not None and ours.tokens_per_s and rates else None

    @property
    def target(self) -> tuple[str, float, float | None] | None:
        """(in words, what is to be reached, what is)."""
        if self.workload == "decode" and self.model == DECODE_TARGET[0]:
            ours = self.by_engine.get("meshlm")
            return f"{DECODE_TARGET[1]:.0%} of limit", DECODE_TARGET[1], None if ours is None else ours.of_limit
        if self.workload.endswith("requests"):
            return f"ratio {REQUESTS_TARGET:g}", REQUESTS_TARGET, self.ratio
        return None

    @property
    def met(self) -> bool | None:
        """None where nothing is to be met, or a peer's figure is missing."""
        if self.target is None:
            return None
        ours = self.by_engine.get("meshlm")
        if ours is None or ours.tokens_per_s is None:
            return False
        _, wanted, reached = self.target
        return None if reached is None else reached >= wanted


def lines_of(results: Sequence[Result], tasks: Sequence[Task]) -> list[Line]:
    """A line for each workload that was to be measured, found or not."""
    lines = []
    for model in dict.fromkeys(task.model for task in tasks):
        work = next(task.workloads for task in tasks if task.model == model)
        for workload in ("decode", *(f"prefill {n}" for n in work.prefill), f"{work.num_requests} requests"):
            found = [result for result in results if (result.model, result.workload) == (model, workload)]
            lines.append(Line(model, workload, {result.engine: result for result in found}))
    return lines


def table(lines: Sequence[Line], shapes: dict[str, Shape], judged: bool) -> list[str]:
    def rate(result: Result | None) -> str:
        if result is None or result.tokens_per_s is None:
            return "-"
        return f"{result.tokens_per_s:.5g}" + (" cut" if result.cut else "")

    cells = []
    for line in lines:
        ours = line.by_engine.get("meshlm")
        target = ""
        if judged and line.target is not None:
            verdict = "no figure to compare with" if line.met is None else "ok" if line.met else "MISSED"
            target = f"{line.target[0]}: {verdict}"
        cells.append(
            [
                shapes[line.model].label,
                line.workload,
                rate(ours),
                "-" if ours is None or ours.of_limit is None else f"{ours.of_limit:.1%}",
                rate(line.by_engine.get("generate")),
                rate(line.by_engine.get("continuous")),
                "-" if line.ratio is None else f"{line.ratio:.2f}",
                target,
            ]
        )
    columns = ["model", "tokens/s", "MeshLM", "of limit", "generate", "continuous", "ratio", "target"]
    return format_table(columns, cells, 2)
