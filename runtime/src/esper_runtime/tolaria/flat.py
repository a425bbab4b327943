"""One parameter arena as the optimizer sees it on the flat path: a few pieces instead of many tensors.

Small neighbours make up one piece, so that an elementwise optimizer runs once for all of them; a large tensor is cut
into pieces that fit a cache, so that the many passes such an optimizer makes over a piece do not each go to memory.
The gradients of joined tensors are gathered into one buffer; those of a large one are used where autograd left them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from esper_runtime.tolaria.arena import Arena, Member, aligned_zeros

PIECE_ELEMENTS = 256 * 1024
"""On a CPU. AdamW makes some ten passes over five arrays of a piece. Measured from 16 Ki to 2 Mi elements: below
this the calls cost more than the cache saves, above twice this the cache is too small."""
SCALARS = frozenset({"step", "mu_product", "eta", "mu"})
"""State of the elementwise optimizers that is one number per parameter; everything else is one number per element."""
_NARROW = frozenset({torch.float16, torch.bfloat16})
State = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements [begin, end) of an arena, as a parameter of their own."""

    begin: int
    end: int
    parameter: nn.Parameter


class Joined:
    """Small tensors side by side: one piece with a gradient buffer, whose gaps stay zero."""

    def __init__(self, arena: Arena, first: int, last: int) -> None:
        members = arena.members[first:last]
        begin = members[0].offset
        end = arena.members[last].offset if last < len(arena.members) else arena.buffer.numel()
        self.tensors = arena.tensors[first:last]
        self.gradient = aligned_zeros(end - begin, dtype=arena.buffer.dtype, device=arena.buffer.device)
        self.pieces = (_piece(arena, begin, end),)
        self.pieces[0].parameter.grad = self.gradient
        self._views = [
            self.gradient.as_strided(m.shape, m.stride, self.gradient.storage_offset() + m.offset - begin)
            for m in members
        ]

    def take_gradients(self) -> bool:
        gradients = [tensor.grad for tensor in self.tensors]
        for gradient in gradients:
            if gradient is None or gradient.is_sparse:
                return False
        torch._foreach_copy_(self._views, gradients)  # type: ignore[arg-type]
        return True

    def release(self) -> None:
        """The buffer is kept."""


class Large:
    """One tensor in several pieces."""

    def __init__(self, arena: Arena, index: int, size: int) -> None:
        member = arena.members[index]
        self.tensors = (arena.tensors[index],)
        self._member = member
        self.gradient = torch.empty(0)
        self.pieces = tuple(
            _piece(arena, begin, min(begin + size, member.offset + member.numel))
            for begin in range(member.offset, member.offset + member.numel, size)
        )

    def take_gradients(self) -> bool:
        gradient, start = self.tensors[0].grad, self._member.offset
        if gradient is None or gradient.is_sparse:
            return False
        self.gradient = flat = _in_memory_order(gradient, self._member)
        for piece in self.pieces:
            piece.parameter.grad = flat[piece.begin - start : piece.end - start]
        return True

    def release(self) -> None:
        """Lets go of autograd's memory, so that the next backward can have it again."""
        self.gradient = torch.empty(0)
        for piece in self.pieces:
            piece.parameter.grad = None


class Flat:
    """The pieces of one arena, their gradients, and the optimizer's state over all of them."""

    def __init__(self, arena: Arena, group: int, *, piece_elements: int = PIECE_ELEMENTS) -> None:
        self.arena = arena
        self.group = group
        self._parts: tuple[Joined | Large, ...] = tuple(_parts(arena, piece_elements))
        self.pieces = tuple(piece for part in self._parts for piece in part.pieces)
        self._moments: dict[str, Tensor] = {}
        """Per-element state of the whole arena; that of a piece is a view of it."""
        self._placed: dict[str, tuple[list[Tensor], list[int]]] = {}
        """The views that were seen to be in place, and where: asked for at every snapshot, and hardly ever changed."""

    # Gradients

    def take_gradients(self) -> bool:
        """After backward. False when a tensor got none, or a sparse one: then the flat way is closed."""
        return all([part.take_gradients() for part in self._parts])

    def release_gradients(self) -> None:
        for part in self._parts:
            part.release()
            for tensor in part.tensors:
                tensor.grad = None

    def gradients(self) -> Iterator[Tensor]:
        """Flat, between take_gradients and release_gradients: together every gradient once, and zeros."""
        for part in self._parts:
            yield part.gradient

    # State

    def state(self, states: Mapping[Tensor, State]) -> State:
        """The optimizer's state of this arena: per-element values in the arena's own layout, numbers once."""
        first = states.get(self.pieces[0].parameter)
        if not first:
            self._forget()
            return {}
        return {
            key: self._joined(key, states) if isinstance(value, Tensor) and key not in SCALARS else value
            for key, value in first.items()
        }

    def _joined(self, key: str, states: Mapping[Tensor, State]) -> Tensor:
        """Moves the moments of all pieces into one buffer, unless they are there already."""
        parts = [states[piece.parameter][key] for piece in self.pieces]
        whole = self._moments.get(key)
        placed, where = self._placed.get(key, ([], []))
        if whole is not None and placed and all(map(is_, parts, placed)) and _addresses(parts) == where:
            return whole
        if whole is None or whole.dtype != parts[0].dtype:
            whole = self._moments[key] = self._buffer(parts[0].dtype)
        for index, (piece, part) in enumerate(zip(self.pieces, parts, strict=True)):
            place = whole[piece.begin : piece.end]
            if part.data_ptr() != place.data_ptr():
                states[piece.parameter][key] = parts[index] = place.copy_(part)
        self._placed[key] = parts, _addresses(parts)
        return whole

    def _buffer(self, dtype: torch.dtype) -> Tensor:
        return aligned_zeros(self.arena.buffer.numel(), dtype=dtype, device=self.arena.buffer.device)

    def put_state(self, states: dict[Tensor, State], found: State) -> None:
        """Replaces the optimizer's state by `found`, which `state` gave. What is empty is as if no step was made."""
        if not found:
            self._forget()
            for piece in self.pieces:
                states.pop(piece.parameter, None)
            return
        self.state(states)
        fresh: dict[str, Tensor] = {}
        for key, value in found.items():
            if isinstance(value, Tensor) and key not in SCALARS:
                old = self._moments.get(key)
                fresh[key] = self._buffer(value.dtype) if old is None or old.dtype != value.dtype else old
                if fresh[key] is not value:
                    fresh[key].copy_(value)
        self._moments, self._placed = fresh, {}
        for piece in self.pieces:
            states[piece.parameter] = {
                key: fresh[key][piece.begin : piece.end] if key in fresh else own(value) for key, value in found.items()
            }

    def pop_state(self, states: dict[Tensor, State]) -> State:
        """Takes the state away from the optimizer."""
        found = self.state(states)
        for piece in self.pieces:
            states.pop(piece.parameter, None)
        self._forget()
        return found

    def _forget(self) -> None:
        self._moments, self._placed = {}, {}


def _addresses(tensors: list[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def split_state(arena: Arena, state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A flat state by parameter: moments as views, everything else copied."""

    def of(member: Member, key: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.clone() if key in SCALARS else member.view(value)

    return [{key: of(member, key, value) for key, value in state.items()} for member in arena.members]


def joinable(parts: list[dict[str, Any]]) -> bool:
    """Whether all parameters have the same keys and the same scalars, so that one flat state says it all."""
    first = parts[0]
    return all(
        part.keys() == first.keys() and all(_agree(key, part[key], first[key]) for key in first) for part in parts[1:]
    )


def _agree(key: str, one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return key not in SCALARS or torch.equal(one, other)
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and bool(one == other)


def joined_state(arena: Arena, parts: list[dict[str, Any]]) -> dict[str, Any]:
    joined: dict[str, Any] = {}
    for key, first in parts[0].items():
        if not isinstance(first, Tensor):
            joined[key] = first
        elif key in SCALARS:
            joined[key] = first.clone()
        else:
            joined[key] = aligned_zeros(arena.buffer.numel(), dtype=first.dtype, device=arena.buffer.device)
            for member, part in zip(arena.members, parts, strict=True):
                member.view(joined[key]).copy_(part[key])
    return joined


def squares_of(tensors: list[Tensor]) -> float:
    """Sum of squares of all elements, in float32 at least: finite unless one is not, or the sum overflows.

    By way of norms, because torch has one call for those of many tensors, which is also faster than dot for large ones.
    """
    if any(tensor.dtype in _NARROW for tensor in tensors):
        tensors = [tensor.float() for tensor in tensors]
    norms = [float(norm.item()) for norm in torch._foreach_norm(tensors)]
    return sum([norm * norm for norm in norms])  # inf where ** would raise


def own(value: Any) -> Any:
    """A value that shares no memory with this one."""
    if isinstance(value, list):
        return [own(element) for element in value]
    return value.clone() if isinstance(value, Tensor) else value


def small_first(tensors: list[tuple[str, Tensor]], piece_elements: int) -> list[tuple[str, Tensor]]:
    """Sorted so that all small ones are neighbours, for an arena with few pieces."""
    return sorted(tensors, key=lambda entry: _is_large(entry[1].numel(), piece_elements))


def _is_large(numel: int, piece_elements: int) -> bool:
    """Too large for the gathering of its gradient to be worth it."""
    return numel >= piece_elements // 2


def _parts(arena: Arena, size: int) -> Iterator[Joined | Large]:
    """Runs of small tensors up to `size` elements, and large ones alone, in the order of the arena."""
    first = 0
    for index, member in enumerate(arena.members):
        if _is_large(member.numel, size):
            if first < index:
                yield Joined(arena, first, index)
            yield Large(arena, index, size)
            first = index + 1
        elif member.offset + member.numel - arena.members[first].offset > size:
            yield Joined(arena, first, index)
            first = index
    if first < len(arena.members):
        yield Joined(arena, first, len(arena.members))


def _piece(arena: Arena, begin: int, end: int) -> Piece:
    return Piece(begin, end, nn.Parameter(arena.buffer[begin:end]))


def _in_memory_order(gradient: Tensor, member: Member) -> Tensor:
    """The gradient's elements in the order in which the parameter's lie. Autograd's own gradients are in it already."""
    if gradient.stride() != member.stride:
        gradient = torch.empty_strided(member.shape, member.stride, dtype=gradient.dtype, device=gradient.device).copy_(
            gradient
        )
    return gradient.as_strided((member.numel,), (1,), gradient.storage_offset())
