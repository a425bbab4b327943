"""Short digests of content, for annotations."""

import hashlib


def short(text: str) -> str:
    """16 hex digits of SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
