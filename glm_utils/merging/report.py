"""What merging and quantizing did to the weights, summarized over the layers for each kind of Linear."""

from collections.abc import Collection
from statistics import median_high

import torch

from glm_utils.adapter import LoraPair
from glm_utils.merging.arithmetic import SLICE_ROWS


class MergeReport:
    """Norms of updates and errors by module path.

    Attributes:
        updates: Relative norm of each update, |scale * B A| / |W|.
        nf4_errors: Relative error of each weight in NF4, |W - NF4(W)| / |W|.
        quantization_errors: (squared error, squared norm) of each int8 or int4 weight, by method: "search" (as
            written) and "absmax" (for comparison).
    """

    def __init__(self):
        self.updates: dict[str, float] = {}
        self.nf4_errors: dict[str, float] = {}
        self.quantization_errors: dict[str, dict[str, tuple[float, float]]] = {"search": {}, "absmax": {}}

    def add_update(self, path: str, weight: torch.Tensor, pair: LoraPair) -> None:
        """Record the norm of an update."""
        # |B A|^2 = sum((B^T B) * (A A^T)): two r x r matrices, and none of the size of the weight
        squared = ((pair.b.T @ pair.b) * (pair.a @ pair.a.T)).sum().clamp(min=0).item()
        self.updates[path] = pair.scale * squared**0.5 / max(squared_norm(weight) ** 0.5, 1e-30)

    def add_nf4_error(self, path: str, weight: torch.Tensor, rounded: torch.Tensor) -> None:
        """Record the error of a weight that was rounded to NF4."""
        norm = max(squared_norm(weight), 1e-30)
        self.nf4_errors[path] = (squared_distance(weight, rounded) / norm) ** 0.5

    def add_quantization_error(self, path: str, method: str, weight: torch.Tensor, rounded: torch.Tensor) -> None:
        """Record the error of a weight that was rounded to int8 or int4."""
        self.quantization_errors[method][path] = (squared_distance(weight, rounded), squared_norm(weight))

    def relative_weight_error(self, method: str = "search") -> float | None:
        """Return the squared error of all quantized weights over their squared norm; None if there are none."""
        pairs = self.quantization_errors[method].values()
        total = sum(norm for _, norm in pairs)
        return sum(error for error, _ in pairs) / max(total, 1e-30) if pairs else None

    def lines(self, merge_base: str) -> list[str]:
        """Return the report as a few lines for the log; merge_base is "original" or "nf4"."""
        lines = [f"update |scale B A| / |W|: {in_words(self.updates)}"] if self.updates else []
        if self.nf4_errors:
            lines.append(f"NF4 error |W - NF4(W)| / |W|: {in_words(self.nf4_errors)}{self._compare(merge_base)}")
        if errors := self._relative_errors():
            searched, absmax = self.relative_weight_error(), self.relative_weight_error("absmax")
            lines.append(
                f"squared relative weight error of the whole model: {searched:.3g} (with absmax scales it would be "
                f"{absmax:.3g}); {in_words(errors)}"
            )
        return lines

    def _compare(self, merge_base: str) -> str:
        """Compare the NF4 error with the update, as the end of a line."""
        if not self.updates:
            return ""
        error, update = median_high(self.nf4_errors.values()), median_high(self.updates.values())
        used = "the NF4 weights, as trained on" if merge_base == "nf4" else "the original weights"
        return (
            ". QLoRA trains on NF4(W) + update, so the NF4 weights are closer to training: the original ones differ "
            f"by {error / max(update, 1e-30):.3g} times the norm of the update. Merged into: {used}. Compare the "
            "evaluation loss of both before you choose"
        )

    def _relative_errors(self) -> dict[str, float]:
        """Return the squared relative error of each quantized weight."""
        errors = self.quantization_errors["search"]
        return {path: error / max(norm, 1e-30) for path, (error, norm) in errors.items()}

    def record(self) -> dict:
        """Return the medians, and the figures of each kind of Linear, for run_config.json."""
        figures = {
            "update_norm": self.updates,
            "nf4_error": self.nf4_errors,
            "relative_weight_error": self._relative_errors(),
        }
        return {
            "update_norm_median": median_or_none(self.updates.values()),
            "nf4_error_median": median_or_none(self.nf4_errors.values()),
            "relative_weight_error": self.relative_weight_error(),
            "relative_weight_error_of_absmax": self.relative_weight_error("absmax"),
            "by_module": {name: summarize_by_module(values) for name, values in figures.items() if values},
        }


def in_words(values: dict[str, float]) -> str:
    """Say how values by module path spread, and which kind of Linear has the largest one."""
    largest = max(values, key=values.__getitem__)
    return (
        f"{min(values.values()):.3g} to {values[largest]:.3g} ({largest.rpartition('.')[2]}), median "
        f"{median_high(values.values()):.3g} of {len(values)} weights"
    )


def summarize_by_module(values: dict[str, float]) -> dict[str, dict[str, float]]:
    """Return lowest, highest and median value and the number of layers, by kind of Linear."""
    kinds: dict[str, list[float]] = {}
    for path, value in values.items():
        kinds.setdefault(path.rpartition(".")[2], []).append(value)
    return {
        kind: {"min": min(part), "max": max(part), "median": median_high(part), "num_layers": len(part)}
        for kind, part in kinds.items()
    }


def median_or_none(values: Collection[float]) -> float | None:
    """Return the median, of an even number of values the higher one of the middle; None if there are no values."""
    return median_high(values) if values else None


def squared_norm(weight: torch.Tensor) -> float:
    """Return the sum of squares, in fp32."""
    return torch.linalg.vector_norm(weight, dtype=torch.float32).item() ** 2


def squared_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the squared Frobenius distance, in fp32 by slices of rows."""
    pairs = zip(first.split(SLICE_ROWS), second.split(SLICE_ROWS), strict=True)
    return sum((a.float() - b.float()).square().sum().item() for a, b in pairs)
