"""Which replicas each gateway has been connected to, so that its heirs know whose journals they must have read.

Revision ID: 0005
Revises: 0004
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "ledger_links",
        sa.Column("gateway_id", sa.String(64), primary_key=True),
        sa.Column("incarnation", sa.String(64), primary_key=True),
    )


def downgrade() -> None:
    op.drop_table("ledger_links")
