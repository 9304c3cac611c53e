"""Local files to records: which files a name means, and what they hold.

A record is a text, or a dict of columns as a line, row or object of the file has them.
"""

import bz2
import codecs
import csv
import glob
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from trainer.data.documents import INPUT_IDS

_SECTION = 8_000  # characters of a plain text that count as one document
_LONGEST_LINE = 1_000_000  # characters; a longer line is cut like a text that is one line
_BLANK = re.compile(r"\s*")


def find(dataset: str) -> list[Path] | None:
    """The files of a file, folder or glob, in a fixed order; None where the name means something else.

    A folder means something else where it describes itself to `datasets`, or has no file that is read here.

    Raises:
        ValueError: there is no such file, or it is of a kind that is not read.
    """
    path = Path(dataset).expanduser()
    if path.is_dir():
        return None if _describes_itself(path) else sorted(_of_folder(path)) or None
    if not path.is_file() and glob.has_magic(dataset):
        matches = (Path(match) for match in glob.glob(str(path), recursive=True))
        if found := sorted(match for match in matches if match.is_file() and _is_read(match)):
            return found
        raise ValueError(f"no file matches {dataset} that is read: {_kinds()}")
    if path.is_file() and not _is_read(path):
        raise ValueError(f"text file {dataset} is of a kind that is not read; these are: {_kinds()}")
    if _is_read(path) and not path.is_file():
        raise ValueError(f"text file {dataset} does not exist")
    if not path.is_file() and (path.is_absolute() or dataset.startswith(".")):
        raise ValueError(f"there is no text file or folder {dataset}")
    return [path] if path.is_file() else None


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote it."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def read(path: Path, column: str, separators: set[str]) -> Iterator[Any]:
    """The records of one file.

    Args:
        column: that holds the text; a .parquet file is asked for no other.
        separators: lines of a plain text that end a document.

    Raises:
        ValueError: it cannot be read; the message says where.
    """
    kind, compression = _suffixes(path)
    try:
        with _OPEN[compression](path) as file:
            if kind == ".parquet":
                yield from _parquet(io.BytesIO(file.read()) if compression else path, column)
                return
            utf_16 = file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
            text = io.TextIOWrapper(file, encoding="utf-16" if utf_16 else "utf-8-sig")
            try:
                if kind in (".txt", ".md"):
                    yield from _plain(text.read(), separators)
                elif kind == ".json":
                    yield from _json(text.read(), column)
                elif kind in (".csv", ".tsv"):
                    yield from _table(text, "," if kind == ".csv" else "\t")
                else:
                    yield from _json_lines(text)
            except UnicodeDecodeError as error:
                position = file.tell() - len(error.object) + error.start
                raise ValueError(f"byte {position:,} is not {error.encoding}: convert it to UTF-8") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError, RecursionError) as error:
        raise ValueError(f"text file {path} could not be read: {error}") from error


def _open_zst(path: Path) -> io.BufferedReader:
    import pyarrow as pa

    with pa.OSFile(str(path)) as file, pa.CompressedInputStream(file, "zstd") as stream:
        return io.BufferedReader(io.BytesIO(stream.read()))


_OPEN: dict[str, Callable[[Path], Any]] = {
    "": lambda path: path.open("rb"),
    ".gz": gzip.open,
    ".zst": _open_zst,
    ".bz2": bz2.open,
    ".xz": lzma.open,
}
_KINDS = (".txt", ".md", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


def _suffixes(path: Path) -> tuple[str, str]:
    """Kind and compression of a file, as its name says: .jsonl and .gz, or .jsonl and nothing."""
    suffix = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), suffix) if suffix and suffix in _OPEN else (suffix, "")


def _is_read(path: Path) -> bool:
    return _suffixes(path)[0] in _KINDS


def _kinds() -> str:
    return f"{' '.join(_KINDS)}, each also with {' '.join(filter(None, _OPEN))}"


def _describes_itself(folder: Path) -> bool:
    """Whether `datasets` is told what it holds: it was saved from there, or its README.md names configurations."""
    readme = folder / "README.md"
    head = re.match(r"---\s*\n(.*?)\n---", readme.read_text("utf-8", "replace"), re.S) if readme.is_file() else None
    return is_saved(folder) or (head is not None and re.search(r"^configs:", head[1], re.M) is not None)


def _of_folder(folder: Path) -> Iterator[Path]:
    """Its files and those of its folders, without hidden ones and without a README."""
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and _is_read(path) and not hidden and path.stem.lower() != "readme":
            yield path


def _plain(text: str, separators: set[str]) -> Iterator[str]:
    """Documents between separators, cut into sections, so that a part of a single file can be held out."""
    ends = "|".join(map(re.escape, sorted(separators)))
    whole = re.split(rf"(?m)^[ \t]*(?:{ends})[ \t]*(?:\n|\Z)", text)
    sections = list(_sections(whole, _LONGEST_LINE))
    yield from sections if len(sections) > 1 else _sections(whole, _SECTION)


def _sections(texts: list[str], longest_line: int) -> Iterator[str]:
    """Texts cut at line ends, and lines that are too long at spaces; none is blank."""
    for text in texts:
        lines, size = [], 0
        pieces = (_at_spaces(line, longest_line) for line in text.splitlines(keepends=True))
        for piece in chain(chain.from_iterable(pieces), [""]):
            lines.append(piece)
            size += len(piece)
            if size >= _SECTION or not piece:
                section = "".join(lines)
                if section.strip():
                    yield section
                lines, size = [], 0


def _at_spaces(line: str, longest: int) -> list[str]:
    if len(line) <= longest:
        return [line]
    return re.findall(rf"(?s).{{1,{_SECTION}}}(?=\s|\Z)|.{{1,{_SECTION}}}", line)


def _json_lines(lines: Iterable[str]) -> Iterator[Any]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number:,} is not JSON: {error}") from error


def _json(text: str, column: str) -> list[Any]:
    """Records of an array, of one object of columns, or of values one after another, as on lines."""
    values, end = [], _BLANK.match(text).end()  # type: ignore[union-attr]
    while end < len(text):
        value, end = json.JSONDecoder().raw_decode(text, end)
        values.append(value)
        end = _BLANK.match(text, end).end()  # type: ignore[union-attr]
    if len(values) == 1 and isinstance(values[0], list):
        return values[0]
    if len(values) == 1 and isinstance(values[0], dict):
        name = column if column in values[0] else INPUT_IDS
        cells = values[0].get(name)
        cells = list(cells.values()) if isinstance(cells, dict) else cells  # pandas writes a column by index
        return [{name: cell} for cell in cells] if isinstance(cells, list) else values
    return values


def _table(lines: Iterable[str], delimiter: str) -> Iterator[dict[str, str]]:
    csv.field_size_limit(2**31 - 1)
    rows = csv.DictReader(lines, delimiter=delimiter, strict=True)
    try:
        for row in rows:
            if None in row:
                raise ValueError(
                    f"line {rows.line_num:,} has more fields than the first: quote fields with {delimiter!r}"
                )
            yield row
    except csv.Error as error:
        raise ValueError(f"line {rows.line_num:,} is not a row: {error}") from error


def _parquet(file: Any, column: str) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as table:
        schema = table.schema_arrow
        name = next((name for name in (column, INPUT_IDS) if name in schema.names), None)
        for batch in table.iter_batches(columns=name and [name]):
            if name and pa.types.is_binary(schema.field(name).type):  # how some programs write text
                batch = pa.record_batch([batch.column(0).cast(pa.string())], [name])
            yield from batch.to_pylist()
