"""Times of requests as curves: which share of them took no longer than so much."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ...config import ConfigError

_SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(path: str | Path) -> None:
    """Before anything is measured: raises ConfigError where no such file could be drawn."""
    if Path(path).suffix not in _SUFFIXES:
        raise ConfigError(f"plot: {path} does not end in one of {', '.join(_SUFFIXES)}")
    if not Path(path).absolute().parent.is_dir():
        raise ConfigError(f"plot: {Path(path).absolute().parent} is no directory")
    if find_spec("matplotlib") is None:
        raise ConfigError("plot: the package matplotlib is not installed; pip install 'meshlm[plot]'")


def draw(path: str | Path, title: str, curves: Mapping[str, Sequence[float]]) -> None:
    """One panel for each quantity, in milliseconds; those without values are left out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = {name: np.sort(np.asarray(values)) * 1000 for name, values in curves.items() if len(values)}
    columns = min(2, max(1, len(drawn)))
    figure = Figure(figsize=(5 * columns, 3.4 * -(-len(drawn) // columns)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for number, (name, values) in enumerate(drawn.items(), start=1):
        axes = figure.add_subplot(-(-len(drawn) // columns), columns, number)
        axes.step(values, np.arange(1, len(values) + 1) / len(values) * 100, where="post")
        for percent in (50, 90, 99):
            value = float(np.percentile(values, percent))
            axes.axvline(value, color="0.7", linewidth=0.8, zorder=0)
            axes.annotate(f"p{percent}", (value, 2), color="0.4", fontsize=7, rotation=90, va="bottom", ha="right")
        axes.set(xlabel=f"{name} (ms)", ylabel="% of values", ylim=(0, 101), xlim=(0, None))
    figure.savefig(path, dpi=150)
