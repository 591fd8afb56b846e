"""Which API keys a canary serves: a stable draw by hash, the same on every gateway and for ever."""

from __future__ import annotations

import hashlib
import math

DEFAULT_SALT = "signalbox"


def serves(key_id: str, share: float, salt: str) -> bool:
    """Whether a key is among the first `share` of all keys. A larger share of the same salt only adds keys.

    Stable everywhere and for ever: blake2b-64 of salt and id against the share of its range.
    """
    return serves_below(key_id, salt_bytes(salt), threshold(share))


def threshold(share: float) -> int:
    return math.ceil(share * 2**64)


def salt_bytes(salt: str) -> bytes:
    return salt.encode() + b"\0"


def serves_below(key_id: str, salt: bytes, limit: int) -> bool:
    """`serves` with its constants worked out once: a microsecond."""
    return int.from_bytes(hashlib.blake2b(salt + key_id.encode(), digest_size=8).digest(), "big") < limit
