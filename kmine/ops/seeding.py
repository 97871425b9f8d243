"""Seeds derived from what they are for, so that order and workers do not matter."""

from __future__ import annotations

import hashlib


def derive_seed(*keys: int | str) -> int:
    """A 63-bit seed from keys such as (seed, round, sample id): the same everywhere, whatever the order of work."""
    text = "\x1f".join(f"{type(k).__name__}:{k}" for k in keys)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
