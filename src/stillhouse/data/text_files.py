"""Text files as spreadsheets and other tools write them: byte-order marks, long fields, quotes, and lines that were cut
off."""

from __future__ import annotations

import codecs
import csv
import io
import json
from pathlib import Path
from typing import Any

from stillhouse.errors import UserError

MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
DELIMITERS = {".csv": (",", ";", "\t"), ".tsv": ("\t",)}


def read_text(path: Path, encoding: str | None = None, newline: str | None = None) -> str:
    """The text of a file, without its byte-order mark.

    Args:
        encoding: default: that of the file's byte-order mark, else UTF-8.
        newline: None: every end of a line becomes a line feed; "": ends of lines are left as they are.

    Raises:
        UserError: bytes that are not of the encoding, with their place; an encoding that does not exist.
    """
    raw = path.read_bytes()
    chosen = encoding or next((name for mark, name in MARKS.items() if raw.startswith(mark)), "utf-8")
    try:
        text = raw.decode(chosen)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        named = "UTF-8" if chosen.startswith("utf-8") else chosen
        raise UserError(
            f"'{path}' is not {named} text (byte {error.start}, line {line}); "
            "name its encoding in data.options.encoding, such as latin-1 or cp1252 for a spreadsheet's."
        ) from None
    except LookupError:
        raise UserError(
            f"data.options.encoding: there is no encoding '{encoding}'; such are utf-8, latin-1, cp1252, utf-16."
        ) from None
    text = text.removeprefix("\ufeff")
    return text if newline == "" else text.replace("\r\n", "\n").replace("\r", "\n")


def read_json_lines(path: Path, encoding: str | None = None) -> list[Any]:
    """One JSON value a line; only line feeds end a line, not the other separators of Unicode. Raises `UserError` with
    the line's number."""
    lines = enumerate(read_text(path, encoding).split("\n"), 1)
    return [_json(line, f"'{path}', line {number},") for number, line in lines if line.strip()]


def read_json(path: Path, encoding: str | None = None) -> list[Any]:
    """A file that is one list. Raises `UserError` for another value, or where it is no JSON."""
    rows = _json(read_text(path, encoding), f"'{path}'")
    if not isinstance(rows, list):
        raise UserError(f"'{path}' must hold a list of records, but holds a {type(rows).__name__}.")
    return rows


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f" at line {error.lineno}" if error.lineno > 1 else ""
        raise UserError(f"{where} is not JSON{place}: {error.msg}; was it cut off?") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a depth of thousands
        raise UserError(f"{where} is JSON that cannot be read: {error}.") from None


def read_csv(path: Path, encoding: str | None = None) -> list[dict[str, str]]:
    """Records of a file whose first line names the columns.

    A `.csv` is separated by the first of comma, semicolon and tab that its first line holds. Quotes are those of RFC
    4180; in a `.tsv` that does not follow it, a quote is a character like any other.

    Raises:
        UserError: a line with more or fewer fields than there are columns, or a quote without its end; the message has
            the line's number.
    """
    text = read_text(path, encoding, newline="")
    head = text.splitlines()[0] if text else ""
    delimiter = next((d for d in DELIMITERS[path.suffix] if d in head), DELIMITERS[path.suffix][0])
    try:
        return _rows(text, path, delimiter, csv.QUOTE_MINIMAL)
    except UserError:
        if path.suffix == ".csv":
            raise
        return _rows(text, path, delimiter, csv.QUOTE_NONE)


def _rows(text: str, path: Path, delimiter: str, quoting: Any) -> list[dict[str, str]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    limit = csv.field_size_limit(2**31 - 1)
    try:
        columns = [name.strip() for name in next(reader, [])]
        rows = []
        for row in reader:
            if row and len(row) != len(columns):
                more = (
                    "put a field that holds a separator into quotes."
                    if len(row) > len(columns)
                    else "was the file cut off?"
                )
                raise UserError(
                    f"'{path}', line {reader.line_num}, has {len(row)} fields for {len(columns)} columns; {more}"
                )
            rows += [dict(zip(columns, row))] if row else []
        return rows
    except csv.Error as error:
        raise UserError(f"'{path}', line {reader.line_num}, is not CSV: {error}.") from None
    finally:
        csv.field_size_limit(limit)
