"""Turn the arrival times of tokens into figures, and the figures of several models into a Markdown table."""

import itertools
import statistics
from pathlib import Path

from glm_utils.report_file import write_report_file
from glm_utils.run_record import git_commit, versions
from glm_utils.tables import markdown_table
from glm_utils.visible_text import json_line

TABLE_ROWS = (  # title, key of a model's figures, factor from the key's unit to the title's, decimals
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
NUM_ORIGINAL_ROWS = 2  # those that chatGLM-6B-QLoRA prints


def summarize(runs: list[list[float]], num_prompt_tokens: int, batch_size: int) -> dict:
    """Compute the figures of one model from its runs; rates and times are medians over the runs.

    Args:
        runs: Seconds from the call to each new token, for each run; at least two tokens.
        num_prompt_tokens: Per sequence.
        batch_size: Sequences generated at once.

    Returns:
        ttft_seconds: from the call to the first token; tpot_*: nearest-rank percentiles of all gaps between tokens;
        decode_tokens_per_second: tokens after the first over the time after the first, of one sequence;
        tokens_per_second: all tokens of the batch over the whole time, prefill included; decode_spread: (fastest -
        slowest) / median of the decode rates.
    """
    num_new = len(runs[0])
    gaps = [later - earlier for run in runs for earlier, later in itertools.pairwise(run)]
    ttft = statistics.median(run[0] for run in runs)
    rates = [(num_new - 1) / (run[-1] - run[0]) for run in runs]
    decode = statistics.median(rates)
    import numpy as np  # here, as a wrong flag is answered before

    tpot_p50, tpot_p95 = np.percentile(gaps, [50, 95], method="inverted_cdf").tolist()
    return {
        "batch_size": batch_size,
        "num_prompt_tokens": num_prompt_tokens,
        "num_new_tokens": num_new,
        "num_runs": len(runs),
        "tokens_per_second": batch_size * num_new / statistics.median(run[-1] for run in runs),
        "ttft_seconds": ttft,
        "tpot_p50_seconds": tpot_p50,
        "tpot_p95_seconds": tpot_p95,
        "prefill_tokens_per_second": batch_size * num_prompt_tokens / ttft,
        "decode_tokens_per_second": decode,
        "decode_tokens_per_second_total": batch_size * decode,
        "decode_spread": (max(rates) - min(rates)) / decode,
        "runs": [
            {"ttft_seconds": run[0], "decode_tokens_per_second": rate, "total_seconds": run[-1]}
            for run, rate in zip(runs, rates, strict=True)
        ],
    }


def models_table(models: list[dict]) -> str:
    """Return a Markdown table with one column per model; a model without figures shows the reason in its first cell.

    A figure that no model has, such as GPU memory on a CPU, gets no line; the two of the original project always do.

    Args:
        models: The figures of each model, as in the JSON; "label" names it, "error" says why it has none.
    """
    lines = []
    for index, (title, key, factor, decimals) in enumerate(TABLE_ROWS):
        if index < NUM_ORIGINAL_ROWS or any(key in figures for figures in models):
            cells = [f"{figures[key] * factor:,.{decimals}f}" if key in figures else "-" for figures in models]
            lines.append([title, *cells])
    lines[0][1:] = [figures.get("error", cell) for figures, cell in zip(models, lines[0][1:], strict=True)]
    lines.append(["weights of the layers", *(figures.get("weight_format", "-") for figures in models)])
    return markdown_table(["", *(figures["label"] for figures in models)], lines)


def write_report(result: dict, output_json: str | Path | None) -> str:
    """Write the result to a file; return what a script prints: the table and, as the last line, the JSON object.

    Args:
        result: Holds the figures of each model under "models"; versions and commit are added.
        output_json: None: the result is only returned.

    Raises:
        UserError: The file cannot be written.
    """
    result = {**result, "versions": versions(), "commit": git_commit()}
    text = f"{models_table(result['models'])}\n\n{json_line(result)}"
    if output_json:
        write_report_file(result, output_json)
    return text
