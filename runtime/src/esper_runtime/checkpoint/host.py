"""Copies of a training state in host memory, laid out as the files they will become.

A save costs the training thread one pass: live tensors into memory that was made for the first save and is used again
by every later one. The writer then hands this memory to the disk as it is. A load may use it in between.
"""

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from esper_runtime.checkpoint import shards
from esper_runtime.checkpoint import tensors as safetensors
from esper_runtime.checkpoint.errors import CheckpointError
from esper_runtime.checkpoint.files import Bytes, aligned_buffer
from esper_runtime.checkpoint.shards import MAX_FILE_BYTES

SLOTS = 2
"""One is written while another is filled."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Image:
    """A safetensors file in memory."""

    memory: Bytes
    """Page-aligned, whole pages; what follows `size` bytes is of no meaning."""
    size: int
    header: bytes
    views: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Copy(Mapping[str, Tensor]):
    """A group's files in memory, in order. As a mapping: its tensors by name, as views."""

    files: tuple[Image, ...]
    views: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.views)

    def __len__(self) -> int:
        return len(self.views)


_Shape = tuple[tuple[str, torch.dtype, torch.Size], ...]


@dataclass(eq=False)
class _Slot:
    """Memory for one state. It is kept as long as the state keeps its shape."""

    limit: int
    busy: bool = False
    shapes: dict[str, _Shape] = field(default_factory=dict)
    """Of the groups that are laid out: their copies are whole, and all their images are here."""
    copies: dict[str, Copy] = field(default_factory=dict)
    """By group."""
    images: dict[str, Image] = field(default_factory=dict)
    """By file name without suffix."""

    def fill(self, group: str, tensors: Mapping[str, Tensor], pin: Callable[[Bytes], None]) -> Copy:
        shape = tuple((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items())
        if self.shapes.get(group) != shape:
            self._lay_out(group, tensors, pin)
            self.shapes[group] = shape
        copy = self.copies[group]
        for name, tensor in tensors.items():
            _copy(copy.views[name], tensor)
        return copy

    def _lay_out(self, group: str, tensors: Mapping[str, Tensor], pin: Callable[[Bytes], None]) -> None:
        layouts = safetensors.split(tensors, self.limit, safetensors.METADATA)
        stems = tuple(shards.stems(group, len(layouts)))
        self._forget(group)  # its memory gets other headers, one after the other
        for stem in [stem for stem in self.images if shards.group_of(stem) == group and stem not in stems]:
            del self.images[stem]
        for stem, layout in zip(stems, layouts, strict=True):
            self.images[stem] = _image(layout, self.images.get(stem), pin)
        files = tuple(self.images[stem] for stem in stems)
        views = {name: view for file in files for name, view in file.views.items()}
        self.copies[group] = Copy(files=files, views=views)

    def _forget(self, group: str) -> None:
        self.shapes.pop(group, None)
        self.copies.pop(group, None)

    def holds(self, stem: str, size: int) -> bool:
        image = self.images.get(stem)
        return image is not None and len(image.memory) >= size

    def give_up(self, stem: str) -> Image:
        self._forget(shards.group_of(stem))
        return self.images.pop(stem)

    def take_back(self, stem: str, image: Image) -> None:
        """A copy that could not wait for it has other memory by now."""
        if not self.busy and stem not in self.images and shards.group_of(stem) not in self.shapes:
            self.images[stem] = image


def _copy(target: Tensor, source: Tensor) -> None:
    """On the CPU by one thread: several gain nothing where one fills the memory bus, and wait for each other."""
    if source.is_cpu and source.is_contiguous() and source.numel():
        np.copyto(safetensors.as_bytes(target), safetensors.as_bytes(source))
    else:
        target.copy_(source, non_blocking=True)


def _image(layout: safetensors.Layout, old: Image | None, pin: Callable[[Bytes], None]) -> Image:
    memory = None if old is None or len(old.memory) < layout.size else old.memory
    if memory is None:
        memory = aligned_buffer(layout.size)
        pin(memory)
    memory[: len(layout.header)] = np.frombuffer(layout.header, dtype=np.uint8)
    views = safetensors.parse(memory[: layout.size])
    return Image(memory=memory, size=layout.size, header=layout.header, views=views)


class HostCopies:
    """The slots of one trainer. `take` is the training thread's, all else anybody's."""

    def __init__(self, *, slots: int = SLOTS, limit: int = MAX_FILE_BYTES) -> None:
        """Files have at most `limit` bytes, see shards."""
        self._lock = threading.Lock()
        self._slots = [_Slot(limit) for _ in range(slots)]
        self._back: deque[tuple[_Slot, str, Image]] = deque()
        """Lent memory that nobody refers to any more."""

    def free(self) -> bool:
        with self._lock:
            return any(not slot.busy for slot in self._slots)

    def take(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> tuple[dict[str, Copy], Callable[[], None]]:
        """Copies by group, and what gives their memory back. One slot must be free.

        OSError when there is no memory for them; CheckpointError when a tensor has no place in a file.
        """
        with self._lock:
            self._take_back()
            slot = next(slot for slot in self._slots if not slot.busy)
            slot.busy = True
        cuda = any(tensor.is_cuda for part in tensors.values() for tensor in part.values())

        def release() -> None:
            with self._lock:
                slot.busy = False

        try:
            copies = {group: slot.fill(group, part, _pin if cuda else _leave) for group, part in tensors.items()}
        except (OSError, CheckpointError):
            release()
            raise
        if cuda:
            torch.cuda.current_stream().synchronize()
        return copies, release

    def lend(self, stem: str, size: int) -> Bytes:
        """Memory to load `size` bytes into: that of a copy no longer needed, which is given up, else fresh.

        It becomes memory for copies again once nothing refers to it, not even a read that nobody waits for.
        """
        with self._lock:
            self._take_back()
            slot = next((slot for slot in self._slots if not slot.busy and slot.holds(stem, size)), None)
            if slot is None:
                return aligned_buffer(size)
            image = slot.give_up(stem)
        # An array of its own, and no view of the other: whatever is made of it refers to this one.
        loan = np.frombuffer(image.memory.data, dtype=np.uint8)
        weakref.finalize(loan, self._back.append, (slot, stem, image)).atexit = False
        return loan

    def _take_back(self) -> None:
        while self._back:
            slot, stem, image = self._back.popleft()
            slot.take_back(stem, image)


def _leave(_: Bytes) -> None:
    return


def _pin(memory: Bytes) -> None:
    """Lets the GPU copy into it directly. Where that is refused the copy goes through a buffer of the driver's."""
    address = memory.__array_interface__["data"][0]
    code = torch.cuda.cudart().cudaHostRegister(address, len(memory), 0)  # type: ignore[no-untyped-call]
    if int(code) != 0:
        log.warning("memory for checkpoints cannot be pinned (CUDA error %d); copies from the GPU are slower", code)
