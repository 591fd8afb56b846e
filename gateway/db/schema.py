"""Tables as the code uses them. The migrations build them; tests/gateway/test_database.py holds the two together."""

from __future__ import annotations

from sqlalchemy import Column, Float, Integer, LargeBinary, MetaData, String, Table, Text

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

# Immutable. 0 is the empty document. `normalised` is what the author states as JSON with sorted keys; `parent` is the
# generation that was active when it was proposed.
policy_generations = Table(
    "policy_generations",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("document", Text, nullable=False),
    Column("normalised", Text, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("author", String(128), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("note", Text, nullable=False),
    Column("parent", Integer),
)

# Who serves what from when on: generation `active`, and `canary` for `share` of the keys. state: "proposed" until every
# live gateway is prepared, then "committed" with `activate_at`, or "refused". What serves at a moment is the newest
# committed row whose `activate_at` has passed. A proposal still open at `expires_at` was left by a dead process.
policy_switches = Table(
    "policy_switches",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("active", Integer, nullable=False),
    Column("canary", Integer),
    Column("share", Float, nullable=False),
    Column("action", String(16), nullable=False),
    Column("author", String(128), nullable=False),
    Column("proposed_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("activate_at", Float),
    Column("state", String(16), nullable=False),
)

# One row, changed by every transaction that touches policy_switches, first of all: it serialises them, and gateways
# poll it.
policy_sequence = Table(
    "policy_sequence",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("value", Integer, nullable=False),
)

# One row per gateway process. `names` is JSON: the models and aliases of its fleet. `prepared` is the last switch it
# has looked at and, unless `refusal` says why not, could serve; `serving` the one it serves by, since `served_at`.
policy_gateways = Table(
    "policy_gateways",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("seen_at", Float, nullable=False),
    Column("names", Text, nullable=False),
    Column("prepared", Integer, nullable=False),
    Column("refusal", Text),
    Column("serving", Integer, nullable=False),
    Column("served_at", Float, nullable=False),
)

# Every change that was made or tried: outcome is "done", "refused" or "failed", `detail` the reason.
audit_log = Table(
    "audit_log",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", Float, nullable=False),
    Column("actor", String(128), nullable=False),
    Column("action", String(32), nullable=False),
    Column("target", String(128), nullable=False),
    Column("diff", Text, nullable=False),
    Column("why", Text, nullable=False),
    Column("outcome", String(16), nullable=False),
    Column("detail", Text, nullable=False),
)

# Not among api_keys, so that neither kind can ever be taken for the other. Hashed as those are.
admin_tokens = Table(
    "admin_tokens",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("name", String(128), nullable=False),
    Column("hash", LargeBinary(32), nullable=False, unique=True),
    Column("hint", String(16), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("revoked_at", Float),
)
