"""Whether memory holds only finite numbers.

One pass of a dot product tells: it is finite unless an element is not, or the sum overflows; only then is every
element looked at. numpy rather than torch, because it makes no threads and needs no dispatch: a chunk of half a
megabyte takes some 15 us, from the cache. Floating types that numpy lacks are judged by their bits.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esper_runtime.tolaria.arena import Arena

Array = np.ndarray[Any, Any]
Check = Callable[[Array], bool]
"""Whether all of a piece is finite."""
_PIECE = 128 * 1024
"""Elements looked at together, from the cache."""
_WIDE: dict[torch.dtype, type] = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.complex64: np.float32,
    torch.complex128: np.float64,
}
_BITS: dict[torch.dtype, tuple[type, int, int]] = {
    torch.float16: (np.uint16, 0x7FFF, 0x7C00),
    torch.bfloat16: (np.uint16, 0x7FFF, 0x7F80),
    torch.float8_e5m2: (np.uint8, 0x7F, 0x7C),
    torch.float8_e4m3fn: (np.uint8, 0x7F, 0x7F),
}
"""(unsigned type, mask of everything but the sign, least value that is not finite)"""


def finite_check(dtype: torch.dtype) -> tuple[type, Check] | None:
    """(numpy type to view the memory as, check of a piece of it); None for a type that has no infinities.

    Call checks under np.errstate(all="ignore"): an overflow is looked into, and is no error.
    """
    if dtype in _WIDE:
        return _WIDE[dtype], _by_squares
    if dtype in _BITS:
        kind, mask, limit = _BITS[dtype]
        return kind, lambda piece: not piece.size or int(np.bitwise_and(piece, mask).max()) < limit
    return None


def _by_squares(piece: Array) -> bool:
    return math.isfinite(np.dot(piece, piece)) or bool(np.isfinite(piece).all())


def not_finite(tensor: Tensor) -> bool:
    """Exact, of one tensor on any device."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return False
    wide = tensor if tensor.dtype in _WIDE else tensor.float()
    return not bool(torch.isfinite(wide).all())


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Of tensors on the CPU; for a thread that has time, beside one that trains."""
    with np.errstate(all="ignore"):
        return all(_finite(tensor) for tensor in tensors)


def _finite(tensor: Tensor) -> bool:
    found = finite_check(tensor.dtype)
    if found is None:
        return True
    kind, check = found
    flat: Array = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().view(kind)
    return all(check(flat[start : start + _PIECE]) for start in range(0, flat.size, _PIECE))


def culprits(arenas: Iterable[Arena], buffer: Tensor | None = None) -> list[str]:
    """Names of the tensors in arenas, or in `buffer` laid out like their only one, that are not finite."""
    return [
        member.name
        for arena in arenas
        for member in arena.members
        if not_finite(member.view(arena.buffer if buffer is None else buffer))
    ]
