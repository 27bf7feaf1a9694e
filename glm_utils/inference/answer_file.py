"""Write the output of a job: the rows of the input with their answers, as JSONL, CSV or XLSX."""

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from loguru import logger

from glm_utils.cli import UserError
from glm_utils.data.find_files import find_files
from glm_utils.data.xlsx_rows import import_openpyxl
from glm_utils.disk import hidden_sibling
from glm_utils.files import atomic_files, check_output_file
from glm_utils.inference.partial_answers import PARTIAL_ENDING, json_line
from glm_utils.inference.prompt_file import PromptRow
from glm_utils.inference.workbook import write_workbook
from glm_utils.output_lock import lock_output

ENDINGS = (".jsonl", ".csv", ".xlsx")
RECORD_ENDING = ".run_config.json"  # after the name of the output
FILE_COLUMN = "file"  # of a row, where there are several
ADDED_COLUMNS = ("sample", "answer", "num_tokens", "ended_by", "error")
MAX_SHOWN = 10
# What a spreadsheet takes for a formula, but for plain numbers. Source: OWASP, CSV injection.
FORMULA, NUMBER = re.compile(r"[=+\-@\t\r\n＝＋－＠]"), re.compile(r"[+-]?\d+(\.\d+)?")


def check_output_path(output_path: str) -> Path:
    """Check, before any work, that an output can be written.

    Args:
        output_path: The file.

    Returns:
        The path, links followed.

    Raises:
        UserError: An unknown ending, or a place that cannot be written to.
    """
    path = Path(output_path).expanduser()
    if path.suffix.lower() not in ENDINGS:
        raise UserError(
            f"--output_path {output_path}: unknown ending {path.suffix!r}. Give a name in .jsonl, .csv or .xlsx"
        )
    if path.suffix.lower() == ".xlsx":
        import_openpyxl(path, "writes")
    return check_output_file(path, "--output_path", (PARTIAL_ENDING, RECORD_ENDING))


def find_inputs(data_path: str, output_path: Path, overwrite: bool) -> list[Path]:
    """Return the files of prompts; globs leave out what a job that was stopped left beside its output.

    Args:
        data_path: Files or globs, separated by commas.
        output_path: See `check_output_path`.
        overwrite: Whether an output that exists may be replaced.

    Raises:
        UserError: A file is missing, or the output is one of them or exists.
    """
    beside = [output_path.with_name(f"{output_path.name}{ending}") for ending in (PARTIAL_ENDING, RECORD_ENDING)]
    found = find_files(data_path, leave_out=beside)
    if output_path in {path.resolve() for path in found}:
        raise UserError(f"--output_path {output_path}: the file of prompts itself. Give another file")
    if output_path.exists() and not overwrite:
        raise UserError(f"--output_path {output_path}: exists. Give another file, or --overwrite")
    return found


@contextmanager
def lock_answers(path: Path, overwrite: bool) -> Iterator[None]:
    """Hold the lock of an output while the block runs.

    Raises:
        UserError: Another run writes it, or has written it since it was checked.
    """
    with lock_output(hidden_sibling(path, "lock"), f"--output_path {path}", remove=True):
        if path.exists() and not overwrite:
            raise UserError(
                f"--output_path {path}: another run has just written it. Give another file, or --overwrite"
            )
        yield


def output_rows(rows: Sequence[PromptRow], answers: dict[tuple[int, int], dict], num_samples: int) -> list[dict]:
    """Return the rows of the output, in the order of the input: each answer beside its row's columns.

    The rows of several files get a first column that names their file.

    Args:
        rows: The prompts.
        answers: See `PartialAnswers`.
        num_samples: Answers to each prompt.
    """
    found = []
    has_several = len({row.path for row in rows}) > 1
    for index, row in enumerate(rows):
        columns = keep_columns(row.columns, (FILE_COLUMN, *ADDED_COLUMNS) if has_several else ADDED_COLUMNS)
        columns = {FILE_COLUMN: str(row.path), **columns} if has_several else columns
        if row.error:
            found.append({**columns, "error": row.error})
            continue
        for sample in range(num_samples):
            answer = answers[index, sample]
            numbered = {"sample": sample} if num_samples > 1 else {}
            added = {name: answer[name] for name in ("answer", "num_tokens", "ended_by")}
            found.append({**columns, **numbered, **added})
    return found


def keep_columns(columns: dict, added: Sequence[str]) -> dict:
    """Return columns of the input, those with a name of the output's own as input_NAME."""
    taken, kept = {*columns, *added}, {}
    for name, value in columns.items():
        if name in added:
            while name in taken:
                name = f"input_{name}"
            taken.add(name)
        kept[name] = value
    return kept


def write_output(path: Path, rows: list[dict], record: dict) -> None:
    """Write the output and, beside it, NAME.run_config.json, atomically.

    Args:
        path: .jsonl, .csv or .xlsx.
        rows: See `output_rows`.
        record: What the run was.

    Raises:
        UserError: The disk is full, or the file cannot be written.
    """
    try:
        with atomic_files(path.parent, last=path.name, name="--output_path") as temporary_dir:
            WRITERS[path.suffix.lower()](temporary_dir / path.name, rows)
            text = json.dumps(record, ensure_ascii=False, indent=2, default=str) + "\n"
            record_path = temporary_dir / f"{path.name}{RECORD_ENDING}"
            record_path.write_bytes(text.encode("utf-8", "backslashreplace"))  # file names need not be UTF-8
    except UserError as error:
        raise UserError(f"{error}. The answers are in {path.name}{PARTIAL_ENDING}") from error


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Write one object per line, values as they are."""
    path.write_bytes(b"".join(map(json_line, rows)))


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write a table that spreadsheets read as UTF-8 and in which nothing is a formula."""
    names = column_names(rows)
    with path.open("w", encoding="utf-8-sig", errors="replace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(map(csv_field, names))
        writer.writerows([csv_field(row.get(name)) for name in names] for row in rows)


def write_table(path: Path, rows: list[dict]) -> None:
    """Write a workbook."""
    names = column_names(rows)
    write_workbook(path, names, [[row.get(name) for name in names] for row in rows])


def column_names(rows: list[dict]) -> list[str]:
    """Return the columns of all rows, those of the output last."""
    added = [name for name in ADDED_COLUMNS if any(name in row for row in rows)]
    return [name for name in dict.fromkeys(name for row in rows for name in row) if name not in added] + added


def csv_field(value: object) -> str:
    """Return a value as text that a spreadsheet does not run: what it takes for a formula has ' in front."""
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"'{text}" if FORMULA.match(text) and not NUMBER.fullmatch(text) else text


WRITERS = {".jsonl": write_jsonl, ".csv": write_csv, ".xlsx": write_table}


def log_columns(rows: Sequence[PromptRow], output_path: Path) -> None:
    """Say which columns only some of the files have, where the output is a table with all of them."""
    columns: dict[Path, dict] = {}
    for row in rows:
        columns.setdefault(row.path, {}).update(row.columns)
    everywhere = set.intersection(*map(set, columns.values()))
    partly = {path: [name for name in names if name not in everywhere] for path, names in columns.items()}
    if any(partly.values()) and output_path.suffix.lower() != ".jsonl":
        shown = [f"{path} ({', '.join(names[:MAX_SHOWN])})" for path, names in partly.items() if names]
        logger.info(
            "the output has the columns of all files, empty where a row's file has none. Only in some: "
            + ", ".join([*shown[:MAX_SHOWN], *(["..."] if len(shown) > MAX_SHOWN else [])])
        )


def log_errors(rows: Sequence[PromptRow], most: int = MAX_SHOWN) -> None:
    """Report the rows that cannot be answered.

    Args:
        rows: The prompts.
        most: Rows that are reported one by one.
    """
    errors = [row.error for row in rows if row.error]
    for error in errors[:most]:
        logger.warning(error)
    if len(errors) > most:
        logger.warning(f"and {len(errors) - most} more rows, see `error` in the output")


def count_rows(rows: Sequence[dict]) -> dict[str, int]:
    """Return how many rows of an output ended in which way."""
    ends = Counter(row.get("ended_by", "error") for row in rows)
    return {"num_rows": len(rows), **{f"num_{end}": ends[end] for end in ("end", "length", "error")}}


def describe(counts: dict[str, int]) -> str:
    """Say how the rows of an output ended."""
    text = f"{counts['num_end'] + counts['num_length']} answers"
    text += f", {counts['num_length']} of them stopped by length" if counts["num_length"] else ""
    return text + (f", {counts['num_error']} rows with an error" if counts["num_error"] else "")
