"""What merging and quantising did to the weights, summarised by kind of Linear over the layers."""

import torch

from glm_utils.adapter import LoraPair
from glm_utils.merging.arithmetic import SLICE_ROWS


class MergeReport:
    """Squared norms of weights, updates and errors, by module path.

    Attributes:
        updates: Relative norm of each update, |scale * B A| / |W|.
        nf4_errors: Relative norm of what NF4 took from each weight, |W - NF4(W)| / |W|.
        quantization_errors: (squared error, squared norm) of each weight in int8 or int4, by method: "search" as
            written, "absmax" for comparison.
    """

    def __init__(self):
        self.updates: dict[str, float] = {}
        self.nf4_errors: dict[str, float] = {}
        self.quantization_errors: dict[str, dict[str, tuple[float, float]]] = {"search": {}, "absmax": {}}

    def add_update(self, path: str, weight: torch.Tensor, pair: LoraPair) -> None:
        """Note an update's norm; |B A|^2 = sum((B^T B) * (A A^T)) needs no product of the weight's size."""
        squared = ((pair.b.T @ pair.b) * (pair.a @ pair.a.T)).sum().clamp(min=0).item()
        self.updates[path] = pair.scale * squared**0.5 / max(squared_norm(weight) ** 0.5, 1e-30)

    def add_nf4_error(self, path: str, weight: torch.Tensor, rounded: torch.Tensor) -> None:
        """Note what NF4 took from a weight."""
        norm = max(squared_norm(weight), 1e-30)
        self.nf4_errors[path] = (squared_distance(weight, rounded) / norm) ** 0.5

    def add_quantization_error(self, path: str, method: str, weight: torch.Tensor, decoded: torch.Tensor) -> None:
        """Note what int8 or int4 took from a weight."""
        self.quantization_errors[method][path] = (squared_distance(weight, decoded), squared_norm(weight))

    def relative_weight_error(self, method: str = "search") -> float | None:
        """Return the squared error over the squared norm of all quantised weights; None when there are none."""
        pairs = self.quantization_errors[method].values()
        total = sum(norm for _, norm in pairs)
        return sum(error for error, _ in pairs) / max(total, 1e-30) if pairs else None

    def lines(self, merge_base: str) -> list[str]:
        """Describe the norms in lines for the log.

        Args:
            merge_base: "original" or "nf4".
        """
        lines = [f"update |scale B A| / |W|: {summary}" for summary in summarize_by_module(self.updates)]
        lines += [f"NF4 error |W - NF4(W)| / |W|: {summary}" for summary in summarize_by_module(self.nf4_errors)]
        if self.nf4_errors and self.updates:
            error, update = median(self.nf4_errors.values()), median(self.updates.values())
            used = "the NF4 weights, as trained on" if merge_base == "nf4" else "the original weights"
            lines.append(
                "QLoRA trains on NF4(W) + update, so NF4 is the base nearer to training: the original differs from "
                f"it by {error / max(update, 1e-30):.3g} times the update's norm. Merged into: {used}. Compare the "
                "evaluation loss of both before you choose"
            )
        errors = self.quantization_errors["search"]
        squared = {path: error / max(norm, 1e-30) for path, (error, norm) in errors.items()}
        lines += [f"squared relative weight error: {summary}" for summary in summarize_by_module(squared)]
        if errors:
            searched, absmax = self.relative_weight_error(), self.relative_weight_error("absmax")
            lines.append(f"squared relative weight error of the whole model: {searched:.3g} (absmax {absmax:.3g})")
        return lines

    def record(self) -> dict:
        """Return the medians for run_config.json."""
        return {
            "update_norm_median": median(self.updates.values()),
            "nf4_error_median": median(self.nf4_errors.values()),
            "relative_weight_error": self.relative_weight_error(),
            "relative_weight_error_of_absmax": self.relative_weight_error("absmax"),
        }


def summarize_by_module(values: dict[str, float]) -> list[str]:
    """Return one line "name: lowest, median and highest over n layers" for each kind of Linear."""
    kinds: dict[str, list[float]] = {}
    for path, value in values.items():
        kinds.setdefault(path.rpartition(".")[2], []).append(value)
    return [
        f"{kind} {min(part):.3g} to {max(part):.3g}, median {median(part):.3g}, {len(part)} layers"
        for kind, part in kinds.items()
    ]


def median(values) -> float | None:
    """Return the upper median; None of nothing."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else None


def squared_norm(weight: torch.Tensor) -> float:
    """Return the sum of squares, in fp32."""
    return torch.linalg.vector_norm(weight, dtype=torch.float32).item() ** 2


def squared_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the squared Frobenius distance, in fp32 by slices of rows."""
    pairs = zip(first.split(SLICE_ROWS), second.split(SLICE_ROWS), strict=True)
    return sum((a.float() - b.float()).square().sum().item() for a, b in pairs)
