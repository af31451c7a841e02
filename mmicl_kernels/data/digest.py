"""What tells contents from others."""

import hashlib
from collections.abc import Iterable


def content_digest(parts: Iterable[bytes], start: bytes = b"") -> bytes:
    """SHA-256 of ``start`` and all parts, each after its length, so that where one ends counts."""
    digest = hashlib.sha256(start)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
