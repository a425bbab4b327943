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

from esper_runtime.checkpoint import tensors as safetensors
from esper_runtime.checkpoint.errors import CheckpointError
from esper_runtime.checkpoint.files import Bytes, aligned_buffer

SLOTS = 2
"""One is written while another is filled."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Image(Mapping[str, Tensor]):
    """A safetensors file in memory. As a mapping: its tensors by name, as views."""

    memory: Bytes
    """Page-aligned, whole pages; what follows `size` bytes is of no meaning."""
    size: int
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

    busy: bool = False
    shapes: dict[str, _Shape] = field(default_factory=dict)
    images: dict[str, Image] = field(default_factory=dict)

    def fill(self, stem: str, tensors: Mapping[str, Tensor], pin: Callable[[Bytes], None]) -> Image:
        shape = tuple((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items())
        if self.shapes.get(stem) != shape:
            layout = safetensors.Layout(tensors, safetensors.METADATA)
            self.images[stem] = _image(layout, self.images.get(stem), pin)
            self.shapes[stem] = shape
        image = self.images[stem]
        for name, tensor in tensors.items():
            _copy(image.views[name], tensor)
        return image

    def holds(self, stem: str, size: int) -> bool:
        image = self.images.get(stem)
        return image is not None and len(image.memory) >= size

    def give_up(self, stem: str) -> Image:
        self.shapes.pop(stem, None)
        return self.images.pop(stem)


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
    return Image(memory=memory, size=layout.size, views=safetensors.parse(memory[: layout.size]))


class HostCopies:
    """The slots of one trainer. `take` is the training thread's, all else anybody's."""

    def __init__(self, *, slots: int = SLOTS) -> None:
        self._lock = threading.Lock()
        self._slots = [_Slot() for _ in range(slots)]
        self._back: deque[tuple[_Slot, str, Image]] = deque()
        """Lent memory that nobody refers to any more."""

    def free(self) -> bool:
        with self._lock:
            return any(not slot.busy for slot in self._slots)

    def take(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> tuple[dict[str, Image], Callable[[], None]]:
        """Copies by file stem, and what gives their memory back. One slot must be free.

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
            images = {stem: slot.fill(stem, part, _pin if cuda else _leave) for stem, part in tensors.items()}
        except (OSError, CheckpointError):
            release()
            raise
        if cuda:
            torch.cuda.current_stream().synchronize()
        return images, release

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
            if not slot.busy and stem not in slot.images:  # else a copy could not wait for it
                slot.images[stem] = image


def _leave(_: Bytes) -> None:
    return


def _pin(memory: Bytes) -> None:
    """Lets the GPU copy into it directly. Where that is refused the copy goes through a buffer of the driver's."""
    address = memory.__array_interface__["data"][0]
    code = torch.cuda.cudart().cudaHostRegister(address, len(memory), 0)  # type: ignore[no-untyped-call]
    if int(code) != 0:
        log.warning("memory for checkpoints cannot be pinned (CUDA error %d); copies from the GPU are slower", code)
