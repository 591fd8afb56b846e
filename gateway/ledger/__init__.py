"""Budgets that do not leak: reserve before, settle after, each exactly once, in every gateway and through its death.

`Ledger` (ledger.py) is what a gateway calls. It groups what arrives together into one transaction (transaction.py over
rows.py), keeps the gateway's lease, and takes over what dead gateways left open (recovery.py). docs/ledger.md has the
whole story.
"""
