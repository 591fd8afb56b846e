"""Tokens that were made and that nobody pays.

Revision ID: 0006
Revises: 0005
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_TABLES = ("ledger_requests", "ledger_usage")


def upgrade() -> None:
    for table in _TABLES:
        op.add_column(table, sa.Column("unbilled_tokens", sa.BigInteger, nullable=False, server_default="0"))


def downgrade() -> None:
    for table in _TABLES:
        op.drop_column(table, "unbilled_tokens")
