"""The rows of a file: JSON lines, JSON, CSV, Parquet, plain lines. What can't be read ends in a sentence."""

import csv
import json
from itertools import zip_longest
from pathlib import Path

from .files import TutorialError, file_problem, relative

MAX_BYTES = 20_000_000  # of a line: what has no line ends is not read into memory whole


def text_lines(path):
    """Yield (number from 1, line with its end) of a UTF-8 file, without its byte order mark."""
    name, place = relative(path), 0
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_BYTES + 1), b""), 1):
            if len(line) > MAX_BYTES:
                raise TutorialError(
                    f"{name}, row {number}: longer than {MAX_BYTES:,} bytes. Write one row a line, "
                    "and cut long texts into passages."
                )
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                at = f"row {number}: not UTF-8 (byte {place + error.start})"
                raise TutorialError(f"{name}, {at}. Save it as UTF-8 (in Excel: CSV UTF-8).") from None
            place += len(line)


def parse(text, place):
    """A JSON value; TutorialError for anything that Python can't make one of."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}" if place.endswith("line") else ""
        place = place.removesuffix("line") + line
        raise TutorialError(f"{place}: no valid JSON ({error.msg}). Correct or remove it.") from None
    except RecursionError:
        raise TutorialError(
            f"{place.removesuffix(', line')}: JSON that is nested too deep. Correct or remove it."
        ) from None
    except ValueError as error:  # a number of more than 4,300 digits
        raise TutorialError(
            f"{place.removesuffix(', line')}: no valid JSON ({error}). Correct or remove it."
        ) from None


def json_lines(path):
    name = relative(path)
    for number, line in text_lines(path):
        if line.strip():
            yield number, parse(line, f"{name}, row {number}")


def json_list(path):
    """Rows of a JSON list; a file of JSON lines by this name is read as well."""
    name, text = relative(path), "".join(line for _, line in text_lines(path))
    if text.lstrip().startswith("{") and sum(bool(line.strip()) for line in text.split("\n")) > 1:
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            if error.msg == "Extra data":
                yield from json_lines(path)
                return
        except (RecursionError, ValueError):
            pass  # said below
    rows = parse(text, f"{name}, line")
    if not isinstance(rows, list):
        raise TutorialError(
            f"{name}: not a list of rows but {type(rows).__name__}. Put the data there again."
        )
    yield from enumerate(rows, 1)


def table_rows(path):
    """Rows of a CSV file with a header; commas, semicolons (Excel) or tabs; numbered as Excel does."""
    name, number = relative(path), 1
    lines = (line for _, line in text_lines(path))
    first = next(lines, "")
    if first.strip().lower().startswith("sep="):
        first, number = next(lines, ""), 2
    try:
        headers = {mark: next(csv.reader([first], delimiter=mark), []) for mark in ",;\t"}
        mark = max(headers, key=lambda mark: len(headers[mark]))
        header = [column.strip() for column in headers[mark]]
        if twice := {column for column in header if header.count(column) > 1}:
            raise TutorialError(f"{name}: column {min(twice)!r} stands twice. Rename one of the two.")
        for fields in csv.reader(lines, delimiter=mark, strict=True):
            number += 1
            if len(fields) > len(header):
                raise TutorialError(
                    f"{name}, row {number}: {len(fields)} fields under {len(header)} columns. "
                    f"Put texts that hold {mark!r} between quotation marks."
                )
            if any(fields):
                yield number, dict(zip_longest(header, fields, fillvalue=""))
    except csv.Error as error:
        raise TutorialError(
            f"{name}, row {number + 1}: no valid CSV ({error}). Put texts between quotation marks, "
            "and write a quotation mark inside them twice."
        ) from None


def parquet_rows(path):
    import pyarrow
    from pyarrow.parquet import ParquetFile

    name, number = relative(path), 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(1000):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        problem = file_problem(Path(path), name) or f"{name}, row {number + 1}: no valid Parquet ({error})"
        raise TutorialError(f"{problem}. Write the file again.") from None


def plain_lines(path):
    for number, line in text_lines(path):
        if line.strip():
            yield number, {"text": line.strip()}


READERS = {
    ".jsonl": json_lines, ".ndjson": json_lines, ".json": json_list, ".csv": table_rows,
    ".tsv": table_rows, ".parquet": parquet_rows, ".txt": plain_lines,
}  # fmt: skip


def read_rows(path):
    """Yield (row number from 1, dict) of a file of JSON lines, JSON, CSV, Parquet or plain lines.

    TutorialError for a file that is missing, a folder, of another kind or damaged, with the row where one is.
    """
    path, name = Path(path), relative(path)
    if path.is_dir():
        raise TutorialError(f"{name} is a folder. Name the file in it.")
    if not path.exists():
        raise TutorialError(f"{name} does not exist. Put the file there, or run the cell that writes it.")
    if (reader := READERS.get(path.suffix.lower())) is None:
        known = ", ".join(READERS)
        raise TutorialError(f"{name}: files are known by their ending, {known}. Save or rename it as one.")
    try:
        for number, row in reader(path):
            if not isinstance(row, dict):
                raise TutorialError(
                    f"{name}, row {number}: not an object but {type(row).__name__}. "
                    "Correct or remove the row."
                )
            yield number, row
    except OSError as error:
        raise TutorialError(
            f"{name} can't be read ({error.strerror or error}). Free or copy the file."
        ) from error
