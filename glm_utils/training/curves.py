"""training_loss.png and eval_loss.png: the losses of a run, over resumes too, drawn if matplotlib is installed."""

import math
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

from loguru import logger

from glm_utils.files import atomic_files

CURVES = {"loss": "training_loss.png", "eval_loss": "eval_loss.png"}  # by the key in log_history
INSTALL_COMMAND = "pip install -e '.[eval]' -c constraints.txt"
SMOOTHED_SHARE = 0.1  # of the curve, over which the smoothed one averages


def write_curves(output_dir: Path, log_history: Iterable[dict]) -> None:
    """Write the curves of which there are values; without matplotlib, log how to install it.

    Args:
        output_dir: Where they go.
        log_history: The Trainer's; it comes with a checkpoint, so it holds the steps before a resume too.
    """
    history = list(log_history)
    curves = {name: points for key, name in CURVES.items() if (points := finite_points(history, key))}
    if not curves:
        return
    if find_spec("matplotlib") is None:
        logger.info(f"no {' and '.join(curves)}: matplotlib is not installed. Run {INSTALL_COMMAND}")
        return
    with atomic_files(output_dir, last="eval_loss.png") as temporary_dir:
        for name, points in curves.items():
            draw_curve(temporary_dir / name, points)


def finite_points(log_history: Iterable[dict], key: str) -> list[tuple[int, float]]:
    """Return (step, value) of the entries with a finite value, by step; of two for one step, the later one."""
    values = {entry["step"]: entry[key] for entry in log_history if key in entry and math.isfinite(entry[key])}
    return sorted(values.items())


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the exponential moving average of values, over a tenth of them.

    It starts at the first value and weighs only what came before, without a pull towards zero.
    """
    decay = 1 - 1 / max(1.0, SMOOTHED_SHARE * len(values))
    averages, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        averages.append(total / weight)
    return averages


def draw_curve(path: Path, points: Sequence[tuple[int, float]]) -> None:
    """Draw values over steps, raw and smoothed, as a PNG file.

    The figure stands alone: pyplot would keep it and might open a window. Matplotlib is loaded here, because it would
    take half a second of every start.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps, values = zip(*points, strict=True)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    axes.plot(steps, values, color="#9db8d9", linewidth=1, marker="o" if len(steps) < 40 else "", markersize=3)
    axes.plot(steps, smoothed(values), color="#1f4e8c", linewidth=2)
    axes.legend(["raw", "smoothed"], frameon=False)
    axes.set(xlabel="step", ylabel=path.stem.replace("_", " "), xmargin=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")
