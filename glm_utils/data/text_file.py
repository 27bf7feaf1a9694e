"""The text of a data file: UTF-8, and what Excel, WPS and Windows write instead, recognized and read directly."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from glm_utils.cli import UserError
from glm_utils.files import LFS_MAGIC

MAX_TEXT_BYTES = 8 << 30  # of one file, which is read into memory as a whole
SAMPLE_BYTES = 1 << 20  # by which an encoding is judged
MIN_GB2312 = 0.6  # share of characters beyond ASCII; of other encodings read as GBK fewer are that common
MAX_UTF8 = (
    0.2  # share of bytes beyond ASCII that are characters of UTF-8, from which a file is taken for damaged UTF-8
)
UTF8_CHARACTER = re.compile(rb"[\xe2-\xef][\x80-\xbf]{2}")
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f]")  # which a text does not have
SHOWN_CHARACTERS = 16
BINARIES = {  # by their first bytes: what it is, and what to do
    b"PK\x03\x04": ("a ZIP file", "Unpack it; a workbook needs the ending .xlsx"),
    b"\xd0\xcf\x11\xe0": ("an old or encrypted Office file", "Save it as .xlsx without a password"),
    b"PAR1": ("a Parquet file", "Convert it to JSON lines, e.g. pandas.read_parquet(OLD).to_json(NEW, "
              "orient='records', lines=True, force_ascii=False)"),
    b"\x1f\x8b": ("compressed with gzip", "Unpack it with gunzip"),
    b"(\xb5/\xfd": ("compressed with zstd", "Unpack it with zstd -d"),
    b"7z\xbc\xaf": ("a 7-Zip file", "Unpack it"),
    b"%PDF": ("a PDF file", "Give a JSON, CSV or XLSX file"),
}  # fmt: skip


@dataclass(frozen=True)
class TextFile:
    """The text of a file.

    Attributes:
        note: In which encoding it was read, if it is not UTF-8; None: it is.
    """

    text: str
    note: str | None = None


def check_file(path: Path, remedy: str, num_bytes: int | None = None) -> None:
    """Check that a file is there and of a size that can be read.

    Args:
        path: The file.
        remedy: What to do if it is missing.
        num_bytes: How many of its bytes are to be read; None: all.

    Raises:
        UserError: It is missing, a directory, cannot be read, or too large.
    """
    try:
        is_dir, is_file = path.is_dir(), path.is_file()
        size = path.stat().st_size if is_file else 0
    except (OSError, ValueError):  # a name that is too long or holds a NUL character
        is_dir = is_file = False
    if is_dir:
        raise UserError(f"{path}: a directory. Name its files, e.g. {path}/*.jsonl")
    if not is_file:
        raise UserError(f"{path}: no such file. {remedy}")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: cannot be read, permission denied")
    if (size if num_bytes is None else num_bytes) > MAX_TEXT_BYTES:
        raise UserError(f"{path}: {size / 1e9:.1f} GB, at most {MAX_TEXT_BYTES / 1e9:.1f} GB are read. Split it")


def read_text_file(path: Path, remedy: str, num_bytes: int | None = None) -> TextFile:
    """Read a text file in UTF-8, UTF-16, UTF-32 or GBK (GB18030), with or without a byte order mark.

    Args:
        path: The file.
        remedy: What to do if it is missing.
        num_bytes: How many of its first bytes are read; None: all.

    Raises:
        UserError: The file is missing, too large, a Git LFS pointer, no text, or in none of these encodings.
    """
    check_file(path, remedy, num_bytes)
    with path.open("rb") as file:
        data = file.read(num_bytes)
    if data.startswith(LFS_MAGIC):
        raise UserError(f"{path}:1: a Git LFS pointer, not the file. Run `git lfs pull`")
    for magic, (what, remedy) in BINARIES.items():
        if data.startswith(magic):
            raise UserError(f"{path}: {what}, not text. {remedy}")
    encoding, fault = find_encoding(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{line_at(data, error.start, encoding)}: {fault}") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{path}:{line}: a NUL byte: damaged, or no text. Save it anew as UTF-8, or repair that line")
    if encoding == "utf-8-sig":
        return TextFile(text)
    title = {"gb18030": "GBK (GB18030)"}.get(encoding, encoding.upper())
    beyond = re.search(r"[^\x00-\x7f]", text)
    start = beyond.start() if beyond else 0
    shown = text[start : start + SHOWN_CHARACTERS].split("\n")[0].strip()
    return TextFile(text, f"not UTF-8, read as {title}, e.g. {shown!r}")


def find_encoding(data: bytes) -> tuple[str, str]:
    """Return the encoding of a text, and what is wrong if its bytes do not fit it."""
    for mark, name in ((b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32"), (b"\xff\xfe", "utf-16"),
                       (b"\xfe\xff", "utf-16")):  # fmt: skip
        if data.startswith(mark):
            return name, f"begins as {name.upper()} but is damaged here. Save it anew as UTF-8"
    sample = data[:SAMPLE_BYTES]
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    for one, other, name in ((odd, even, "utf-16-le"), (even, odd, "utf-16-be")):
        if one > 8 * other and one > len(sample) / 20 and len(data) % 2 == 0 and is_decodable(data, name):
            return name, ""
    damaged = (
        "not UTF-8 here, nor is the file in another encoding that is recognized (UTF-16, GBK). Repair that line, or "
        "convert the file: iconv -f ITS_ENCODING -t utf-8 OLD > NEW"
    )
    try:
        data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if looks_like_gbk(data, error.start) and is_decodable(data, "gb18030"):
            return "gb18030", ""
    return "utf-8-sig", damaged


def is_decodable(data: bytes, encoding: str) -> bool:
    """Whether bytes are a text of an encoding."""
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        return False
    return encoding == "gb18030" or not CONTROL.search(text)  # bytes in pairs are almost always some UTF-16


def looks_like_gbk(data: bytes, start: int) -> bool:
    """Whether bytes look like Chinese text in GBK, and not like damaged UTF-8, Big5 or Latin-1.

    Args:
        data: The bytes.
        start: Where the first ones stand that are not UTF-8.
    """
    sample = data[max(0, start - SAMPLE_BYTES) : start + SAMPLE_BYTES]
    num_beyond = len(sample.translate(None, bytes(range(0x80))))
    num_utf8 = 3 * len(UTF8_CHARACTER.findall(sample))
    text = sample.decode("gb18030", "ignore")
    beyond = [character for character in text if character > "\x7f"]
    num_common = len("".join(beyond).encode("gb2312", "ignore")) / 2
    return num_utf8 <= MAX_UTF8 * num_beyond and num_common >= MIN_GB2312 * len(beyond) > 0


def line_at(data: bytes, position: int, encoding: str) -> int:
    """Return the line that a byte stands in."""
    if encoding == "utf-8-sig":
        return data.count(b"\n", 0, position) + 1
    return data[:position].decode(encoding, "ignore").count("\n") + 1


def split_lines(text: str) -> Iterator[str]:
    """Yield the lines of a text with their ends; only newlines end one, and the text is not copied as a whole."""
    start = 0
    while end := text.find("\n", start) + 1:
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]
