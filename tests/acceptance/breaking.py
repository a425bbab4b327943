"""What a break is."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Break:
    """A small bug of the kind that a change may bring."""

    row: str
    path: str
    old: str
    new: str
    test: str
    """Id of one test, or of one case of it."""
    why: str
    """What the bug does, in a few words."""
    hang: bool = False
    """Red is a test that does not end."""
