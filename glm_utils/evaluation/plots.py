"""The plots of a report: changes of the scores, the loss of each example, the probe's loss by kind."""

import importlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from glm_utils.evaluation.bootstrap import Difference
from glm_utils.evaluation.figures import FIGURES, Comparison
from glm_utils.evaluation.probe import LANGUAGE_TITLES
from glm_utils.evaluation.sides import SideResult
from glm_utils.evaluation.verdict import direction

INK, GRID = "#33404d", "#e3e7eb"
COLORS = {1: "#2c7a5b", 0: "#7b8794", -1: "#b5483a"}  # for the better, not sure, for the worse
SCORES = ("bleu-4", "rouge-1", "rouge-2", "rouge-l", "sacrebleu", "coverage")
DPI, SQUARE, WIDE = 160, (5.0, 4.4), (8.0, 4.6)


def write_plots(directory: Path, before: SideResult, after: SideResult, comparison: Comparison) -> list[Path]:
    """Write the plots that the figures allow, as PNG.

    Returns:
        Their paths, in the order of the report.
    """
    paths = []
    scores = {key: comparison.figures[key] for key in SCORES if key in comparison.figures}
    if scores:
        rows = [(FIGURES[key].title, change, direction(key, change)) for key, change in scores.items()]
        paths.append(plot_changes(directory / "scores.png", rows, "change of the scores, points", SQUARE))
    if "loss" in comparison.figures:
        paths.append(plot_losses(directory / "example_losses.png", before.losses, after.losses))
    if comparison.probe_losses:
        names = sorted(comparison.probe_losses, key=lambda name: name in LANGUAGE_TITLES)
        rows = [
            (LANGUAGE_TITLES.get(name, name), comparison.probe_losses[name], -comparison.probe_losses[name].sign)
            for name in names
        ]
        title = "change of the probe's loss, nats per token (right: forgotten)"
        paths.append(plot_changes(directory / "probe_losses.png", rows, title))
    return paths


def plot_changes(
    path: Path, rows: Sequence[tuple[str, Difference, int]], title: str, size: tuple[float, float] = WIDE
) -> Path:
    """Plot differences as dots with their intervals.

    Args:
        path: The file.
        rows: (name, difference, 1 for the better, -1 for the worse, else 0), from the top.
        title: What the axis shows.
        size: Width and height in inches.
    """
    figure, axes = new_figure(size)
    axes.axvline(0, color=INK, linewidth=0.8)
    for place, (_, change, better) in enumerate(rows):
        axes.plot([change.low, change.high], [place, place], color=COLORS[better], linewidth=2.2, alpha=0.55)
        axes.plot(change.change, place, "o", color=COLORS[better], markersize=6)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="x", color=GRID)
    axes.set_xlabel(title, color=INK)
    figure.savefig(path, dpi=DPI)
    return path


def plot_losses(path: Path, before: np.ndarray, after: np.ndarray) -> Path:
    """Plot each example's loss after against the one before; below the diagonal it became more likely.

    Args:
        path: The file.
        before: A row per example of (summed loss, tokens).
        after: The same of the second model.
    """
    figure, axes = new_figure(SQUARE)
    old, new = before[:, 0] / before[:, 1], after[:, 0] / after[:, 1]
    limits = [0, 1.05 * max(old.max(), new.max())]
    axes.plot(limits, limits, color=INK, linewidth=0.8)
    axes.plot(old, new, "o", color="#2f6690", markersize=4.5, alpha=0.55, markeredgewidth=0)
    axes.set(xlim=limits, ylim=limits, aspect="equal")
    axes.grid(color=GRID)
    axes.set_xlabel("loss before, one dot per example", color=INK)
    axes.set_ylabel("loss after", color=INK)
    figure.savefig(path, dpi=DPI)
    return path


def new_figure(size: tuple[float, float]):
    """Return a figure and its axes, without a window system and without state of pyplot.

    Args:
        size: Width and height in inches.
    """
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=INK, length=0, labelsize=9)
    return figure, axes
