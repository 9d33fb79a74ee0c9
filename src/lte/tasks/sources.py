"""Rows from a file, a folder or the Hugging Face hub, as a ``datasets.Dataset``."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import datasets
from datasets import Dataset, DatasetBuilder
from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.exceptions import DatasetsError

from lte.errors import DataError

logger = logging.getLogger(__name__)

Source: TypeAlias = str | Path | Dataset

SEPARATOR = "<|endoftext|>"
"""A line of a .txt file that is exactly this separates two documents (TinyStories' convention)."""

PIECE_CHARS = 64 * 1024
"""Longest piece, in characters, that a .txt file is read in; a longer document becomes several rows."""

CONTINUES_COLUMN = "continues_in_next_row"
"""Of rows from .txt: true where the next row is more of the same document."""

_FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_TEXT_FEATURES = datasets.Features({"text": datasets.Value("string"), CONTINUES_COLUMN: datasets.Value("bool")})
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?")
_FILE_LIKE = re.compile(r"\.(txt|jsonl?|csv|tsv|parquet|arrow|ya?ml|xml|html?|md|log|gz|zst|xz|bz2|zip|tar)$", re.I)


def load_rows(source: Source, split: str | None = None, limit: int | None = None) -> Dataset:
    """Load rows; DataError where there are none.

    Args:
        source: a .txt, .jsonl, .json, .csv or .parquet file; a folder of such files or one written by
            ``save_to_disk``; a hub name, ``name`` or ``name:config``; or a loaded Dataset (split is ignored).
            What exists on disk is never looked for on the hub, and neither is a name that reads like a path:
            one that starts with ``.``, ``/`` or ``~``, has two slashes, or ends like a data file.
        split: of a folder or hub dataset; not needed where there is only one.
        limit: rows to keep, from the first.
    """
    if isinstance(source, Dataset):
        rows = source
    else:
        with quiet():
            rows = _load(str(source), split, limit)
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    if len(rows) == 0:
        raise _no_rows(source)
    return rows


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of the datasets library inside the block."""
    were_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            datasets.enable_progress_bars()


def _load(source: str, split: str | None, limit: int | None) -> Dataset:
    path = Path(source).expanduser()
    if path.is_dir():
        return _load_folder(path, split, limit)
    if path.is_file():
        if split is not None:
            raise DataError(f"split={split!r}: {path} is one file and has no splits; leave split out")
        return _load_file(path, limit)
    if _HUB_NAME.fullmatch(source) is None or _FILE_LIKE.search(source):
        raise DataError(f"{source}: no such file or folder")
    return _load_hub(source, split)


def _load_file(path: Path, limit: int | None) -> Dataset:
    kind = _FORMATS.get(path.suffix.lower())
    if kind is None:
        raise DataError(f"{path}: unsupported extension {path.suffix!r}; supported: {', '.join(_FORMATS)}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    if kind == "text":
        return _load_text([path], str(path), limit)
    if kind == "json":
        _refuse_deep_json(path)
    with _error_logs_off():
        try:
            builder = datasets.load_dataset_builder(kind, data_files=str(path))
            builder.download_and_prepare()
        except (DatasetsError, OSError, ValueError, RecursionError) as error:
            raise DataError(f"{path}: {_why_unreadable(path, error)}") from error
    return _as_dataset(builder, None, str(path))


def _refuse_deep_json(path: Path) -> None:
    """DataError for values in values in values, thousands deep, over which the library's parser brings Python down."""
    with path.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            if line.count(b"[") + line.count(b"{") > sys.getrecursionlimit() // 2:
                try:
                    with suppress(ValueError):  # of several lines, or said by the library
                        json.loads(line)
                except RecursionError:
                    raise DataError(f"{path}: line {number} is nested too deep; mend or remove it") from None


def _load_folder(folder: Path, split: str | None, limit: int | None) -> Dataset:
    if (folder / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(str(folder))
        return saved[_choose_split(list(saved), split, str(folder))]
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return datasets.load_from_disk(str(folder))
    kinds = {path.suffix.lower() for path in folder.rglob("*") if path.suffix.lower() in _FORMATS}
    if kinds == {".txt"}:
        # the same rule by which load_dataset finds the splits of a folder of .jsonl files
        patterns = get_data_patterns(str(folder))
        files = DataFilesDict.from_patterns(patterns, base_path=str(folder), allowed_extensions=[".txt"])
        chosen = files[_choose_split(list(files), split, str(folder))]
        return _load_text([Path(name) for name in chosen], str(folder), limit)
    with _error_logs_off():
        try:
            builder = datasets.load_dataset_builder(str(folder))
            builder.download_and_prepare()
        except (DatasetsError, OSError, ValueError, RecursionError) as error:
            raise DataError(f"{folder}: no readable data files: {_reason(error)}") from error
    return _as_dataset(builder, split, str(folder))


def _load_hub(source: str, split: str | None) -> Dataset:
    name, _, config = source.partition(":")
    logger.info("%s is no file or folder here; loading it from the Hugging Face hub", source)
    try:
        builder = datasets.load_dataset_builder(name, config or None)
        builder.download_and_prepare()
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{source!r} is no file or folder here, and the Hugging Face hub gave no dataset of that name: "
            f"{_reason(error)}; check the spelling (name or name:config), or the network"
        ) from error
    return _as_dataset(builder, split, source)


def _as_dataset(builder: DatasetBuilder, split: str | None, what: str) -> Dataset:
    sizes = {name: info.num_examples for name, info in builder.info.splits.items()}
    chosen = _choose_split(list(sizes), split, what)
    if sum(sizes.values()) == 0 or sizes.get(chosen) == 0:
        raise _no_rows(what)
    return builder.as_dataset(split=chosen)


def _choose_split(splits: list[str], split: str | None, what: str) -> str:
    names = ", ".join(str(name) for name in splits)
    if split is None:
        if len(splits) > 1:
            raise DataError(f"{what} has the splits {names}; set split to one of them")
        return str(splits[0])
    # "train[:10%]" and "train+test" are the datasets library's own notation
    for part in split.split("+"):
        if part.partition("[")[0].strip() not in splits:
            raise DataError(f"split={split!r} is not in {what}; it has {names}")
    return split


def _load_text(paths: list[Path], what: str, limit: int | None) -> Dataset:
    # size and time are there for the library's cache: an edited file must not be served from it
    files = tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
    try:
        return Dataset.from_generator(
            _text_rows,
            features=_TEXT_FEATURES,
            gen_kwargs={"files": files, "what": what, "piece_chars": PIECE_CHARS, "limit": limit},
        )
    except DatasetsError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        raise DataError(f"{what}: cannot be read as text: {_reason(error)}") from error


def _text_rows(
    files: tuple[tuple[str, int, int], ...], what: str, piece_chars: int, limit: int | None
) -> Iterator[dict[str, object]]:
    rows = (row for name, _, _ in files for row in read_documents(Path(name), piece_chars))
    empty = True
    for text, continues in islice(rows, limit):
        empty = False
        yield {"text": text, CONTINUES_COLUMN: continues}
    if empty:
        raise _no_rows(what)


def read_documents(path: Path, piece_chars: int = PIECE_CHARS) -> Iterator[tuple[str, bool]]:
    """The documents of a .txt file in pieces: (text, whether the next piece is more of the same document).

    A piece ends at a line end, unless one line alone is longer. Line breaks at the two ends of a document do
    not belong to it, and blank documents are left out.
    """
    lines: list[str] = []
    size = 0
    inside = False
    try:
        with path.open(encoding="utf-8-sig") as handle:
            while line := handle.readline(piece_chars):
                if line.rstrip("\n") == SEPARATOR:
                    yield from _last_piece(lines, inside)
                    lines, size, inside = [], 0, False
                    continue
                if lines and size + len(line) > piece_chars:
                    yield "".join(lines), True
                    lines, size, inside = [], 0, True
                if inside or lines or line != "\n":
                    lines.append(line)
                    size += len(line)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text ({error.reason}); convert it to UTF-8") from None
    yield from _last_piece(lines, inside)


def _last_piece(lines: list[str], inside: bool) -> Iterator[tuple[str, bool]]:
    text = "".join(lines).rstrip("\n")
    # an empty rest still has to say that the document ends here
    if inside or text.strip():
        yield text, False


@contextmanager
def _error_logs_off() -> Iterator[None]:
    """The library logs a reading error before it raises it; one message is enough."""
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)


def _why_unreadable(path: Path, error: BaseException) -> str:
    if path.suffix.lower() == ".jsonl":
        with path.open("rb") as handle:
            for number, line in enumerate(handle, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as bad:
                    return f"line {number} is not valid JSON ({_reason(bad)}); mend or remove it"
                if not isinstance(row, dict):
                    return f"line {number} is not a JSON object; write one {{column: value, ...}} per line"
    return f"cannot be read as {path.suffix.lower()[1:]}: {_reason(error)}"


def _reason(error: BaseException) -> str:
    """The innermost message, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


def _no_rows(source: object) -> DataError:
    return DataError(f"{source}: there are no rows in it")
