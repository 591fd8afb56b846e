"""Tables as the code uses them. The migrations build them; tests/gateway/test_database.py holds the two together."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Float, Index, Integer, LargeBinary, MetaData, String, Table, Text, text

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

# ---------------------------------------------------------------- ledger (gateway/ledger): usd columns are pico-dollars

# One row per account (a budget's scope and window, see policies.budget) and window; id is "account@starts". It carries
# the caps and alerts that the last reservation brought, for those who settle without knowing the policy. `alerted` is
# the highest alert, in basis points, that was raised in this window.
ledger_accounts = Table(
    "ledger_accounts",
    metadata,
    Column("id", String(1100), primary_key=True),
    Column("account", String(1024), nullable=False),
    Column("starts", BigInteger, nullable=False),
    Column("ends", BigInteger, index=True),
    Column("spent_usd", BigInteger, nullable=False),
    Column("spent_tokens", BigInteger, nullable=False),
    Column("reserved_usd", BigInteger, nullable=False),
    Column("reserved_tokens", BigInteger, nullable=False),
    Column("overrun_usd", BigInteger, nullable=False),
    Column("overrun_tokens", BigInteger, nullable=False),
    Column("cap_usd", BigInteger),
    Column("cap_tokens", BigInteger),
    Column("alerts", String(256), nullable=False),
    Column("webhook", Text),
    Column("alerted", Integer, nullable=False),
)

# One row per attempt of a request. `state` is open, settled or released and leaves "open" once. `holds` is JSON: the
# accounts and gates that an open row has something reserved in. `source` says where the usage came from, see
# gateway.ledger.entries; `unbilled_tokens` were made beyond completion_tokens, and nobody pays them.
ledger_requests = Table(
    "ledger_requests",
    metadata,
    Column("id", String(192), primary_key=True),
    Column("gateway_id", String(64), nullable=False),
    Column("state", String(8), nullable=False),
    Column("key", String(256), nullable=False),
    Column("team", String(256), nullable=False),
    Column("model", String(256), nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("max_tokens", BigInteger, nullable=False),
    Column("price_input", BigInteger, nullable=False),
    Column("price_cached", BigInteger, nullable=False),
    Column("price_output", BigInteger, nullable=False),
    Column("price_request", BigInteger, nullable=False),
    Column("reserved_usd", BigInteger, nullable=False),
    Column("reserved_tokens", BigInteger, nullable=False),
    Column("holds", Text, nullable=False),
    Column("began_at", Float, nullable=False),
    Column("ended_at", Float, index=True),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("cost_usd", BigInteger, nullable=False),
    Column("overrun_usd", BigInteger, nullable=False),
    Column("estimated", Integer, nullable=False),
    Column("source", String(16), nullable=False),
    Column("unbilled_tokens", BigInteger, nullable=False, server_default="0"),
    Index(
        "ix_ledger_requests_open",
        "gateway_id",
        sqlite_where=text("state = 'open'"),
        postgresql_where=text("state = 'open'"),
    ),
)

# Totals by day ("2026-11-24"), and by month ("2026-11") for days long past.
ledger_usage = Table(
    "ledger_usage",
    metadata,
    Column("period", String(10), primary_key=True),
    Column("key", String(256), primary_key=True),
    Column("team", String(256), primary_key=True),
    Column("model", String(256), primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("estimated", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("cost_usd", BigInteger, nullable=False),
    Column("unbilled_tokens", BigInteger, nullable=False, server_default="0"),
)

# The state behind a rate limit (policies.limits.Gate); id is the scope. `promises` is JSON.
ledger_gates = Table(
    "ledger_gates",
    metadata,
    Column("id", String(1024), primary_key=True),
    Column("at_us", BigInteger, nullable=False),
    Column("requests", BigInteger),
    Column("tokens", BigInteger),
    Column("in_flight", Integer, nullable=False),
    Column("promises", Text, nullable=False),
)

# Who may hold reservations, and until when unless renewed.
ledger_gateways = Table(
    "ledger_gateways",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("lease_until", Float, nullable=False),
)

# Incarnations of replicas that a gateway has been connected to: who may have worked for it.
ledger_links = Table(
    "ledger_links",
    metadata,
    Column("gateway_id", String(64), primary_key=True),
    Column("incarnation", String(64), primary_key=True),
)

# Alerts that were raised. `next_at` is when to try the webhook (again); None when there is nothing left to do.
ledger_events = Table(
    "ledger_events",
    metadata,
    Column("id", String(1200), primary_key=True),
    Column("created_at", Float, nullable=False),
    Column("payload", Text, nullable=False),
    Column("webhook", Text),
    Column("attempts", Integer, nullable=False),
    Column("next_at", Float, index=True),
    Column("delivered_at", Float),
)

# Which model a conversation began with (gateway/sessions.py), until `expires_at`. `id` is a keyed hash.
conversations = Table(
    "conversations",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("model", String(256), nullable=False),
    Column("expires_at", Float, nullable=False, index=True),
)

# What one process asks all gateways, and what each answered. Rows live for seconds.
mailbox_questions = Table(
    "mailbox_questions",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("kind", String(32), nullable=False),
    Column("body", Text, nullable=False),
    Column("asked_at", Float, nullable=False),
    sqlite_autoincrement=True,
)

mailbox_answers = Table(
    "mailbox_answers",
    metadata,
    Column("question", Integer, primary_key=True, autoincrement=False),
    Column("gateway", String(64), primary_key=True),
    Column("body", Text, nullable=False),
)
