"""Why a change of policy does not happen. Always the caller's to resolve; nothing has changed.

RequestError
├── PolicyConflict       somebody else is changing, or has changed, what serves
├── UnknownGeneration    no generation of that number
└── PublishRefused       a gateway cannot serve it, or lives and did not answer
"""

from __future__ import annotations

from replicas.protocol import RequestError


class PolicyConflict(RequestError):
    pass


class UnknownGeneration(RequestError):
    pass


class PublishRefused(RequestError):
    pass
