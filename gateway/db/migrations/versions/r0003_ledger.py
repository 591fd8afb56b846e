"""The ledger: accounts, requests, usage, rate limits, leases of gateways and alerts.

Revision ID: 0003
Revises: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "ledger_accounts",
        sa.Column("id", sa.String(1100), primary_key=True),
        sa.Column("account", sa.String(1024), nullable=False),
        sa.Column("starts", sa.BigInteger, nullable=False),
        sa.Column("ends", sa.BigInteger),
        sa.Column("spent_usd", sa.BigInteger, nullable=False),
        sa.Column("spent_tokens", sa.BigInteger, nullable=False),
        sa.Column("reserved_usd", sa.BigInteger, nullable=False),
        sa.Column("reserved_tokens", sa.BigInteger, nullable=False),
        sa.Column("overrun_usd", sa.BigInteger, nullable=False),
        sa.Column("overrun_tokens", sa.BigInteger, nullable=False),
        sa.Column("cap_usd", sa.BigInteger),
        sa.Column("cap_tokens", sa.BigInteger),
        sa.Column("alerts", sa.String(256), nullable=False),
        sa.Column("webhook", sa.Text),
        sa.Column("alerted", sa.Integer, nullable=False),
    )
    op.create_index("ix_ledger_accounts_ends", "ledger_accounts", ["ends"])
    op.create_table(
        "ledger_requests",
        sa.Column("id", sa.String(192), primary_key=True),
        sa.Column("gateway_id", sa.String(64), nullable=False),
        sa.Column("state", sa.String(8), nullable=False),
        sa.Column("key", sa.String(256), nullable=False),
        sa.Column("team", sa.String(256), nullable=False),
        sa.Column("model", sa.String(256), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("max_tokens", sa.BigInteger, nullable=False),
        sa.Column("price_input", sa.BigInteger, nullable=False),
        sa.Column("price_cached", sa.BigInteger, nullable=False),
        sa.Column("price_output", sa.BigInteger, nullable=False),
        sa.Column("price_request", sa.BigInteger, nullable=False),
        sa.Column("reserved_usd", sa.BigInteger, nullable=False),
        sa.Column("reserved_tokens", sa.BigInteger, nullable=False),
        sa.Column("holds", sa.Text, nullable=False),
        sa.Column("began_at", sa.Float, nullable=False),
        sa.Column("ended_at", sa.Float),
        sa.Column("cached_tokens", sa.BigInteger, nullable=False),
        sa.Column("completion_tokens", sa.BigInteger, nullable=False),
        sa.Column("cost_usd", sa.BigInteger, nullable=False),
        sa.Column("overrun_usd", sa.BigInteger, nullable=False),
        sa.Column("estimated", sa.Integer, nullable=False),
        sa.Column("source", sa.String(16), nullable=False),
    )
    op.create_index("ix_ledger_requests_ended_at", "ledger_requests", ["ended_at"])
    still_open = sa.text("state = 'open'")
    op.create_index(
        "ix_ledger_requests_open",
        "ledger_requests",
        ["gateway_id"],
        sqlite_where=still_open,
        postgresql_where=still_open,
    )
    op.create_table(
        "ledger_usage",
        sa.Column("period", sa.String(10), primary_key=True),
        sa.Column("key", sa.String(256), primary_key=True),
        sa.Column("team", sa.String(256), primary_key=True),
        sa.Column("model", sa.String(256), primary_key=True),
        sa.Column("requests", sa.BigInteger, nullable=False),
        sa.Column("estimated", sa.BigInteger, nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("cached_tokens", sa.BigInteger, nullable=False),
        sa.Column("completion_tokens", sa.BigInteger, nullable=False),
        sa.Column("cost_usd", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "ledger_gates",
        sa.Column("id", sa.String(1024), primary_key=True),
        sa.Column("at_us", sa.BigInteger, nullable=False),
        sa.Column("requests", sa.BigInteger),
        sa.Column("tokens", sa.BigInteger),
        sa.Column("in_flight", sa.Integer, nullable=False),
        sa.Column("promises", sa.Text, nullable=False),
    )
    op.create_table(
        "ledger_gateways",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("lease_until", sa.Float, nullable=False),
    )
    op.create_table(
        "ledger_events",
        sa.Column("id", sa.String(1200), primary_key=True),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("payload", sa.Text, nullable=False),
        sa.Column("webhook", sa.Text),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("next_at", sa.Float),
        sa.Column("delivered_at", sa.Float),
    )
    op.create_index("ix_ledger_events_next_at", "ledger_events", ["next_at"])


def downgrade() -> None:
    for table in (
        "ledger_events",
        "ledger_gateways",
        "ledger_gates",
        "ledger_usage",
        "ledger_requests",
        "ledger_accounts",
    ):
        op.drop_table(table)
