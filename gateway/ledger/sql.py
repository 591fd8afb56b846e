"""The ledger's statements, written once for SQLite and PostgreSQL, and run without SQLAlchemy's compiler in between.

Rows are locked in the order gateway, requests, accounts, gates, usage, and by id within each: PostgreSQL then has no
cycle to wait in, save where rows that are missing are made, and there a deadlock is retried. SQLite locks as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, Row

Values = Sequence[Any]

# Parameters in one statement stay far below both databases' bounds (32,766 and 65,535).
_MOST_ROWS = 500


class Statements:
    """One connection inside a transaction. "?" stands for a parameter."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._postgres = connection.dialect.name == "postgresql"

    def run(self, statement: str, *values: Any) -> Sequence[Row[Any]]:
        result = self._connection.exec_driver_sql(self._spelt(statement), values)
        return result.all() if result.returns_rows else ()

    def changed(self, statement: str, *values: Any) -> int:
        """How many rows it changed."""
        return self._connection.exec_driver_sql(self._spelt(statement), values).rowcount

    def many(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
        if len(rows) == 1:
            self._connection.exec_driver_sql(self._spelt(statement), rows[0])
        elif rows:
            self._connection.exec_driver_sql(self._spelt(statement), list(rows))

    def locked(self, columns: str, table: str, ids: Iterable[str], more: str = "") -> list[Row[Any]]:
        """Rows by id, in the order of ids, locked until the end of the transaction."""
        wanted = sorted(ids)
        lock = " FOR UPDATE" if self._postgres else ""
        found: list[Row[Any]] = []
        for at in range(0, len(wanted), _MOST_ROWS):
            part = wanted[at : at + _MOST_ROWS]
            marks = ",".join("?" * len(part))
            found += self.run(f"SELECT {columns} FROM {table} WHERE id IN ({marks}) {more} ORDER BY id{lock}", *part)
        return found

    def inserted(self, table: str, columns: str, rows: Sequence[tuple[Any, ...]]) -> set[str]:
        """Insert what is not there yet; the ids of the rows that were new."""
        new: set[str] = set()
        ordered = sorted(rows)
        for at in range(0, len(ordered), _MOST_ROWS):
            part = ordered[at : at + _MOST_ROWS]
            marks = ",".join("?" * len(part[0]))
            values = ",".join(f"({marks})" for _ in part)
            statement = f"INSERT INTO {table} ({columns}) VALUES {values} ON CONFLICT (id) DO NOTHING RETURNING id"
            new.update(row.id for row in self.run(statement, *(value for row in part for value in row)))
        return new

    def for_update(self, statement: str, *values: Any) -> Sequence[Row[Any]]:
        return self.run(statement + (" FOR UPDATE" if self._postgres else ""), *values)

    def _spelt(self, statement: str) -> str:
        return statement.replace("?", "%s") if self._postgres else statement
