"""Data files for tests: one content in every form, written in every layout."""

import csv
import json

import openpyxl

SYSTEM = "你是文案。"
HISTORY = [("上衣怎么写？", "写材质。")]
PAIR = ("裙子怎么写？", "写颜色。")
SHARED = {"history": [list(pair) for pair in HISTORY], "system": SYSTEM}
MESSAGES = [
    {"role": "system", "content": SYSTEM},
    {"role": "user", "content": HISTORY[0][0]},
    {"role": "assistant", "content": HISTORY[0][1]},
    {"role": "user", "content": PAIR[0]},
    {"role": "assistant", "content": PAIR[1]},
]
FROM = {"user": "human", "assistant": "gpt"}
CONVERSATIONS = [{"from": FROM[one["role"]], "value": one["content"]} for one in MESSAGES[1:]]
ROWS = {  # one content, by the names of the forms
    "messages": {"messages": MESSAGES},
    "conversations": {"conversations": CONVERSATIONS, "system": SYSTEM},
    "instruction/output": {"instruction": PAIR[0], "input": "", "output": PAIR[1], **SHARED},
    "content/summary": {"content": PAIR[0], "summary": PAIR[1], **SHARED},
    "prompt/response": {"prompt": PAIR[0], "response": PAIR[1], **SHARED},
    "prompt/completion": {"prompt": PAIR[0], "completion": PAIR[1], **SHARED},
    "query/response": {"query": PAIR[0], "response": PAIR[1], **SHARED},
    "question/answer": {"question": PAIR[0], "answer": PAIR[1], **SHARED},
}


def jsonl(*values):
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def cells_of(row):
    """Return the values of a row as a table holds them."""
    return [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in row.values()]


def write_as(path, rows):
    """Write rows of one form in the layout that a name asks for; return the path."""
    if path.suffix == ".xlsx":
        return write_sheets(path, {"data": [list(rows[0]), *map(cells_of, rows)]})
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            file.write(jsonl(*rows))
        elif path.suffix == ".json":
            json.dump(rows, file, ensure_ascii=False, indent=1)
        else:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([list(rows[0]), *map(cells_of, rows)])
    return path


def write_sheets(path, sheets):
    """Write a workbook: rows of values by the name of the sheet."""
    workbook = openpyxl.Workbook()
    workbook.remove(workbook.active)
    for title, rows in sheets.items():
        sheet = workbook.create_sheet(title)
        for row in rows:
            sheet.append(row)
    workbook.save(path)
    return path
