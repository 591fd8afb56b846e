"""Questions that gateways ask each other, and their answers.

Revision ID: 0004
Revises: 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "mailbox_questions",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("asked_at", sa.Float, nullable=False),
        sqlite_autoincrement=True,  # an id is never used again, so "newer than" is never wrong
    )
    op.create_table(
        "mailbox_answers",
        sa.Column("question", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("gateway", sa.String(64), primary_key=True),
        sa.Column("body", sa.Text, nullable=False),
    )


def downgrade() -> None:
    op.drop_table("mailbox_answers")
    op.drop_table("mailbox_questions")
