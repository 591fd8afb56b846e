"""Run by alembic. The connection comes from gateway.db.database, already inside the transaction that holds the lock."""

from __future__ import annotations

from alembic import context

from gateway.db.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
