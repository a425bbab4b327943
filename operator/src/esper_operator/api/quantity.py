"""Kubernetes quantities as exact numbers: 500m, 2Gi, 1e3, .5."""

import re
from fractions import Fraction

from esper_operator.api.base import QUANTITY_PATTERN

_PATTERN = re.compile(QUANTITY_PATTERN)
_SUFFIXES = {
    "n": Fraction(1, 10**9),
    "u": Fraction(1, 10**6),
    "m": Fraction(1, 1000),
    "": Fraction(1),
    **{letter: Fraction(1000**power) for power, letter in enumerate("kMGTPE", start=1)},
    **{f"{letter}i": Fraction(1024**power) for power, letter in enumerate("KMGTPE", start=1)},
}
_MAX_EXPONENT = 30


def parse(text: str) -> Fraction:
    """The number that `text` stands for. ValueError when it is no quantity or its exponent is absurd."""
    found = _PATTERN.match(text)
    if found is None or len(text) > 64 or text.endswith("\n"):
        raise ValueError(f"{text[:64]!r} is no quantity; write one such as 500m, 2 or 4Gi")
    sign = -1 if found[1] == "-" else 1
    suffix = found[6] or ""
    if suffix[:1] in ("e", "E") and len(suffix) > 1:
        exponent = Fraction(suffix[1:])
        if exponent.denominator != 1 or abs(exponent) > _MAX_EXPONENT:
            raise ValueError(f"{text!r} has an exponent that is no whole number up to {_MAX_EXPONENT}")
        return sign * Fraction(found[2]) * Fraction(10) ** int(exponent)
    return sign * Fraction(found[2]) * _SUFFIXES[suffix]


def binary(number: Fraction) -> str:
    """Bytes for people and manifests: whole Gi or Mi where it comes out even, else bytes, rounded up."""
    size = -(-number.numerator // number.denominator)
    for suffix, unit in (("Gi", 1 << 30), ("Mi", 1 << 20), ("Ki", 1 << 10)):
        if size and size % unit == 0:
            return f"{size // unit}{suffix}"
    return str(size)
