"""Tables as the code uses them. The migrations build them; tests/gateway/test_database.py holds the two together."""

from __future__ import annotations

from sqlalchemy import Column, Float, Integer, LargeBinary, MetaData, String, Table

metadata = MetaData()

# `hash` is HMAC-SHA256(secret, key); the key itself is stored nowhere. `version` is the value of key_sequence in the
# transaction that last changed the row, so "what is new since version v" is one indexed range.
api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("name", String(128), nullable=False, index=True),
    Column("tenant", String(128), nullable=False),
    Column("hash", LargeBinary(32), nullable=False, unique=True),
    Column("hint", String(16), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("revoked_at", Float),
    Column("version", Integer, nullable=False, index=True),
)

# One row. Updating it first serialises writers of api_keys on every database, so versions become visible in order.
key_sequence = Table(
    "key_sequence",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("value", Integer, nullable=False),
)
