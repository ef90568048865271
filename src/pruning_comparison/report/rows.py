"""Rows of tables as plain dictionaries, for sentences, cells of tables and JSON."""

from __future__ import annotations

from typing import Any

import pandas as pd

__all__ = ["rows_of", "rows_with_null"]


def rows_of(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows by column name, as the table holds them: NaN where a value is missing."""
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def rows_with_null(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows by column name, None where a value is missing: what JSON can carry."""
    plain = table.astype(object)
    return rows_of(plain.where(plain.notna(), None))
