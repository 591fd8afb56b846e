"""The ledger's statements, written once for SQLite and PostgreSQL and handed to the driver as they are.

SQLAlchemy keeps the connections and the transactions; its compiler and result types would cost more than the database.

Rows are locked in the order gateway, requests, accounts, gates, usage, and by id within each: PostgreSQL then has no
cycle to wait in, save where rows that are missing are made, and there a deadlock is retried. SQLite locks as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import InterfaceError, OperationalError

Row = tuple[Any, ...]

# Parameters in one statement stay far below both databases' bounds (32,766 and 65,535).
_MOST_ROWS = 500


class Statements:
    """One connection inside a transaction. "?" stands for a parameter.

    Raises SQLAlchemy's OperationalError and InterfaceError for the driver's; others come as they are.
    """

    def __init__(self, connection: Connection) -> None:
        self._postgres = connection.dialect.name == "postgresql"
        self._errors: Any = connection.dialect.loaded_dbapi
        self._cursor = connection.connection.cursor()

    def run(self, statement: str, *values: Any) -> list[Row]:
        self._do(self._cursor.execute, statement, values)
        return list(self._cursor.fetchall()) if self._cursor.description else []

    def many(self, statement: str, rows: Sequence[Row]) -> None:
        if len(rows) == 1:
            self._do(self._cursor.execute, statement, rows[0])
        elif rows:
            self._do(self._cursor.executemany, statement, rows)

    def locked(self, columns: str, table: str, ids: Iterable[str], more: str = "") -> list[Row]:
        """Rows by id, in the order of ids, locked until the end of the transaction."""
        wanted = sorted(ids)
        found: list[Row] = []
        for at in range(0, len(wanted), _MOST_ROWS):
            part = wanted[at : at + _MOST_ROWS]
            marks = ",".join("?" * len(part))
            found += self.for_update(f"SELECT {columns} FROM {table} WHERE id IN ({marks}) {more} ORDER BY id", *part)
        return found

    def for_update(self, statement: str, *values: Any) -> list[Row]:
        return self.run(statement + (" FOR UPDATE" if self._postgres else ""), *values)

    def inserted(self, table: str, columns: str, rows: Sequence[Row]) -> set[str]:
        """Insert what is not there yet, `id` being the first column; the ids of the rows that were new."""
        new: set[str] = set()
        ordered = sorted(rows, key=lambda row: str(row[0]))
        for at in range(0, len(ordered), _MOST_ROWS):
            part = ordered[at : at + _MOST_ROWS]
            marks = ",".join("?" * len(part[0]))
            values = ",".join([f"({marks})"] * len(part))
            statement = f"INSERT INTO {table} ({columns}) VALUES {values} ON CONFLICT (id) DO NOTHING RETURNING id"
            new.update(row[0] for row in self.run(statement, *(value for row in part for value in row)))
        return new

    def _do(self, act: Any, statement: str, values: Any) -> None:
        try:
            act(statement.replace("?", "%s") if self._postgres else statement, values)
        except self._errors.OperationalError as error:
            raise OperationalError(statement, None, error) from error
        except self._errors.InterfaceError as error:
            raise InterfaceError(statement, None, error) from error
