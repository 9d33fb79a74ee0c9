"""Finding and checking the columns of the data."""

from __future__ import annotations

from collections.abc import Iterable

from datasets import Dataset, Value

from lte.errors import DataError


def require_column(rows: Dataset, name: str, setting: str) -> str:
    """``name``, or DataError with the columns there are; ``setting`` is the key that names the column."""
    if name not in rows.column_names:
        raise DataError(
            f"{setting}={name!r} is not a column of the data; it has {_listed(rows.column_names)}; "
            f"set {setting} to one of them"
        )
    return name


def require_text(rows: Dataset, name: str, setting: str) -> str:
    """``name``, or DataError where the column is missing or holds no strings."""
    require_column(rows, name, setting)
    if name not in string_columns(rows):
        kind = getattr(rows.features[name], "dtype", rows.features[name])
        raise DataError(f"{setting}={name!r} holds {kind}, not text; columns of text: {_listed(string_columns(rows))}")
    return name


def string_columns(rows: Dataset) -> list[str]:
    """Names of the columns that hold strings."""
    return [
        name
        for name, feature in rows.features.items()
        if isinstance(feature, Value) and feature.dtype in ("string", "large_string")
    ]


def find_text(rows: Dataset, name: str | None, ignore: tuple[str, ...] = ()) -> str:
    """The text column: the one named, else ``text``, else the only column of strings besides ``ignore``."""
    if name is not None:
        return require_text(rows, name, "text_column")
    candidates = [column for column in string_columns(rows) if column not in ignore]
    if "text" in candidates:
        return "text"
    if len(candidates) != 1:
        raise DataError(
            f"cannot tell which column is the text: the data has {_listed(rows.column_names)}, of which "
            f"text: {_listed(candidates)}; set text_column"
        )
    return candidates[0]


def check_no_nulls(values: Iterable[object], name: str, first_row: int = 0) -> None:
    """DataError that names the first row without a value."""
    for number, value in enumerate(values, first_row):
        if value is None:
            raise DataError(f"row {number} has no value in column {name!r}; remove the row or fill it in")


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"
