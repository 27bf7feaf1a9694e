"""Turn the moments of tokens into figures, and rows of figures into a Markdown table."""

import itertools
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from glm_utils.cli import UserError
from glm_utils.files import check_writable, write_json
from glm_utils.run_record import git_commit, versions

TABLE_ROWS = (  # text, key of a row, factor from the key's unit to the text's, decimals
    ("token_number/s", "tokens_per_second", 1, 2),
    ("gpu memory use (peak reserved, GB)", "peak_reserved_bytes", 1e-9, 2),
    ("load (s)", "load_seconds", 1, 2),
    ("cold first token (ms)", "cold_first_token_seconds", 1e3, 1),
    ("cold run (s)", "cold_run_seconds", 1, 2),
    ("TTFT (ms)", "ttft_seconds", 1e3, 1),
    ("TPOT p50 (ms)", "tpot_p50_seconds", 1e3, 2),
    ("TPOT p95 (ms)", "tpot_p95_seconds", 1e3, 2),
    ("prefill (tokens/s)", "prefill_tokens_per_second", 1, 1),
    ("decode, each sequence (tokens/s)", "decode_tokens_per_second", 1, 2),
    ("decode, whole batch (tokens/s)", "decode_tokens_per_second_total", 1, 2),
    ("decode, spread of the repeats (%)", "decode_spread", 1e2, 1),
    ("repeats", "num_runs", 1, 0),
    ("share of the bandwidth bound (%)", "bandwidth_share", 1e2, 1),
    ("weights (GB)", "weight_bytes", 1e-9, 2),
    ("peak allocated (GB)", "peak_allocated_bytes", 1e-9, 2),
    ("driver, whole card (GB)", "driver_bytes", 1e-9, 2),
    ("peak RSS (GB)", "peak_rss_bytes", 1e-9, 2),
)
NUM_ORIGINAL_ROWS = 2


def summarize(runs: list[list[float]], num_prompt_tokens: int, batch_size: int) -> dict:
    """Compute the figures of some runs of one model; rates and times are medians over the runs.

    Args:
        runs: Seconds from the call to each new token, for each run; at least two tokens.
        num_prompt_tokens: Length of the prompt of one sequence.
        batch_size: Sequences at once.

    Returns:
        ttft_seconds: from the call to the first token; tpot_*: over all gaps between tokens of all runs;
        decode_tokens_per_second: tokens after the first over the time after the first, of one sequence;
        tokens_per_second: all tokens of the batch over the whole time, prefill included; decode_spread: (fastest -
        slowest) / median of the decode rates.
    """
    num_new = len(runs[0])
    gaps = [later - earlier for run in runs for earlier, later in itertools.pairwise(run)]
    ttft = statistics.median(run[0] for run in runs)
    rates = [(num_new - 1) / (run[-1] - run[0]) for run in runs]
    decode = statistics.median(rates)
    return {
        "batch_size": batch_size,
        "num_prompt_tokens": num_prompt_tokens,
        "num_new_tokens": num_new,
        "num_runs": len(runs),
        "tokens_per_second": batch_size * num_new / statistics.median(run[-1] for run in runs),
        "ttft_seconds": ttft,
        "tpot_p50_seconds": percentile(gaps, 0.50),
        "tpot_p95_seconds": percentile(gaps, 0.95),
        "prefill_tokens_per_second": batch_size * num_prompt_tokens / ttft,
        "decode_tokens_per_second": decode,
        "decode_tokens_per_second_total": batch_size * decode,
        "decode_spread": (max(rates) - min(rates)) / decode,
        "runs": [
            {"ttft_seconds": run[0], "decode_tokens_per_second": rate, "total_seconds": run[-1]}
            for run, rate in zip(runs, rates, strict=True)
        ],
    }


def percentile(values: Sequence[float], share: float) -> float:
    """Return the least value that the given share of the values does not exceed (nearest rank)."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def markdown_table(rows: list[dict]) -> str:
    """Write one column a model, aligned; a model whose test ended early has the reason in its first cell.

    Figures that no model has, as those of a GPU on a CPU, have no line; the two of the original project always have.

    Args:
        rows: Figures by model, as in the JSON; "label" names it, "error" says why it has none.
    """
    lines = [["", *(row["label"].replace("|", "\\|") for row in rows)]]
    for index, (text, key, factor, decimals) in enumerate(TABLE_ROWS):
        if index < NUM_ORIGINAL_ROWS or any(key in row for row in rows):
            cells = [f"{row[key] * factor:,.{decimals}f}" if key in row else "-" for row in rows]
            lines.append([text, *cells])
    lines[1][1:] = [row.get("error", cell) for row, cell in zip(rows, lines[1][1:], strict=True)]
    lines.append(["weights of the layers", *(row.get("weight_format", "-") for row in rows)])
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    lines.insert(1, ["-" * first, *("-" * (width - 1) + ":" for width in others)])
    padded = (
        [line[0].ljust(first), *(cell.rjust(width) for cell, width in zip(line[1:], others, strict=True))]
        for line in lines
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def check_report_path(output_json: str | Path | None) -> None:
    """Refuse, before anything is measured, a file that cannot be written.

    Args:
        output_json: The file, or None.

    Raises:
        UserError: A directory, or a file in one that is missing or read-only.
    """
    if output_json is None:
        return
    path = Path(output_json).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        fault = "a directory" if path.is_dir() else f"there is no directory {path.parent}"
        raise UserError(f"--output_json {output_json}: {fault}. Give a file in a directory that can be written to")
    check_writable(path.parent, "--output_json")


def write_report(result: dict, output_json: str | Path | None) -> str:
    """Write the JSON object to a file; return what a script prints: the table and, as the last line, the object.

    Args:
        result: Holds the rows under "models"; versions and commit are added.
        output_json: The file, or None.
    """
    result = {**result, "versions": versions(), "commit": git_commit()}
    if output_json:
        write_json(Path(output_json).expanduser(), result)
    return f"{markdown_table(result['models'])}\n\n{json.dumps(result, ensure_ascii=False)}"
