"""Tensors as views of one contiguous buffer, so that all of them are copied, checked or updated in one pass.

Every view starts at a multiple of 64 bytes and keeps its tensor's strides (channels_last too). The gaps hold zeros.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT_BYTES = 64


@dataclass(frozen=True, slots=True)
class Member:
    """Where one tensor lies in its arena; offset and numel in elements."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    numel: int

    def view(self, buffer: Tensor) -> Tensor:
        """This member's part of `buffer`, which may be the arena's own or any other of its length."""
        return buffer.as_strided(self.shape, self.stride, buffer.storage_offset() + self.offset)


class Arena:
    """A buffer and the named tensors bound to it. All of one dtype and device."""

    def __init__(self, name: str, tensors: Sequence[tuple[str, Tensor]]) -> None:
        first = tensors[0][1]
        per_line = max(1, ALIGNMENT_BYTES // first.element_size())
        members: list[Member] = []
        end = 0
        for member_name, tensor in tensors:
            stride = dense_stride(tensor)
            members.append(Member(member_name, tuple(tensor.shape), stride, end, tensor.numel()))
            end += -(-tensor.numel() // per_line) * per_line
        self.name = name
        self.members = tuple(members)
        self.buffer = aligned_zeros(end, dtype=first.dtype, device=first.device)
        self.tensors = tuple(tensor for _, tensor in tensors)
        self._bind()

    @torch.no_grad()
    def _bind(self) -> None:
        for member, tensor in zip(self.members, self.tensors, strict=True):
            view = member.view(self.buffer)
            view.copy_(tensor)
            tensor.data = view

    def is_bound(self) -> bool:
        """Whether every tensor still is a view of the buffer (user code may have swapped its memory)."""
        start, size = self.buffer.data_ptr(), self.buffer.element_size()
        return all(
            tensor.data_ptr() == start + member.offset * size or not member.numel
            for member, tensor in zip(self.members, self.tensors, strict=True)
        )


def arenas_of(name: str, tensors: Iterable[tuple[str, Tensor]]) -> tuple[Arena, ...]:
    """One arena per dtype and device, in the order of first appearance."""
    sorted_out: dict[tuple[torch.dtype, torch.device], list[tuple[str, Tensor]]] = {}
    for entry in tensors:
        sorted_out.setdefault((entry[1].dtype, entry[1].device), []).append(entry)
    return tuple(Arena(f"{name}.{index}", entries) for index, entries in enumerate(sorted_out.values()))


def aligned_zeros(numel: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros whose first element lies at a multiple of 64 bytes."""
    itemsize = dtype.itemsize
    spare = ALIGNMENT_BYTES // itemsize if itemsize < ALIGNMENT_BYTES else 0
    raw = torch.zeros(numel + spare, dtype=dtype, device=device)
    shift = (-raw.data_ptr() % ALIGNMENT_BYTES) // itemsize
    return raw[shift : shift + numel]


def dense_stride(tensor: Tensor) -> tuple[int, ...]:
    """The tensor's own strides when it fills its memory without gaps or overlap, else those of a contiguous one."""
    expected = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length == 1:
            continue
        if stride != expected:
            return torch.empty(tensor.shape, device="meta").stride()
        expected *= length
    return tuple(tensor.stride())
