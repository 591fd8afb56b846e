"""Policy generations, the switches between them, the gateways that follow, admin tokens and the audit log.

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

import hashlib

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    generations = op.create_table(
        "policy_generations",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("document", sa.Text, nullable=False),
        sa.Column("normalised", sa.Text, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("author", sa.String(128), nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("note", sa.Text, nullable=False),
        sa.Column("parent", sa.Integer),
    )
    switches = op.create_table(
        "policy_switches",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("active", sa.Integer, nullable=False),
        sa.Column("canary", sa.Integer),
        sa.Column("share", sa.Float, nullable=False),
        sa.Column("action", sa.String(16), nullable=False),
        sa.Column("author", sa.String(128), nullable=False),
        sa.Column("proposed_at", sa.Float, nullable=False),
        sa.Column("expires_at", sa.Float, nullable=False),
        sa.Column("activate_at", sa.Float),
        sa.Column("state", sa.String(16), nullable=False),
    )
    sequence = op.create_table(
        "policy_sequence",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("value", sa.Integer, nullable=False),
    )
    op.create_table(
        "policy_gateways",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("seen_at", sa.Float, nullable=False),
        sa.Column("names", sa.Text, nullable=False),
        sa.Column("prepared", sa.Integer, nullable=False),
        sa.Column("refusal", sa.Text),
        sa.Column("serving", sa.Integer, nullable=False),
        sa.Column("served_at", sa.Float, nullable=False),
    )
    op.create_table(
        "audit_log",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("actor", sa.String(128), nullable=False),
        sa.Column("action", sa.String(32), nullable=False),
        sa.Column("target", sa.String(128), nullable=False),
        sa.Column("diff", sa.Text, nullable=False),
        sa.Column("why", sa.Text, nullable=False),
        sa.Column("outcome", sa.String(16), nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
    )
    op.create_table(
        "admin_tokens",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("hash", sa.LargeBinary(32), nullable=False, unique=True),
        sa.Column("hint", sa.String(16), nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("revoked_at", sa.Float),
    )
    op.bulk_insert(sequence, [{"id": 1, "value": 0}])
    # The document of a gateway that nobody has told anything: every model by its own name.
    empty = {"document": "{}\n", "normalised": "{}", "sha256": hashlib.sha256(b"{}\n").hexdigest()}
    op.bulk_insert(
        generations, [{"number": 0, **empty, "author": "signalbox", "created_at": 0.0, "note": "", "parent": None}]
    )
    first = {"number": 0, "active": 0, "canary": None, "share": 0.0, "action": "publish", "author": "signalbox"}
    times = {"proposed_at": 0.0, "expires_at": 0.0, "activate_at": 0.0}
    op.bulk_insert(switches, [{**first, **times, "state": "committed"}])


def downgrade() -> None:
    for table in ("admin_tokens", "audit_log", "policy_gateways", "policy_sequence", "policy_switches"):
        op.drop_table(table)
    op.drop_table("policy_generations")
