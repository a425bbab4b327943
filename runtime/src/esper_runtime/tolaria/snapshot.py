"""Memory snapshots: a ring of slots in the memory volume, of which whole and sound ones exist at every instant.

They survive the death of the trainer, not of the pod. A new snapshot is a candidate; it becomes good, and so a target
of rollback, when a later step has shown that its weights are sound. ring.py says which slot a new one replaces.

All slots together stay within a strict cap: as many as fit, at least two, or none at all. Their memory is allocated
and touched as soon as the state's size is known, and again only when the state grows.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from esper_leyline import paths
from torch import Tensor

from esper_runtime.tolaria import ring
from esper_runtime.tolaria.beside import Beside
from esper_runtime.tolaria.ring import Held
from esper_runtime.tolaria.slot import Content, Plan, Ranges, Slot, SnapshotError, encoded, plan_of

MAX_SLOTS: Final = 16
RESERVE_SHARE: Final = 16
"""One part in so many of the memory volume is left to others (worker processes of a data loader), or RESERVE_BYTES."""
RESERVE_BYTES: Final = 64 * 1024 * 1024
MAX_HEAD_BYTES: Final = 16 * 1024 * 1024
log = logging.getLogger(__name__)

__all__ = ["Content", "Held", "SnapshotError", "Snapshots"]


class Snapshots:
    """The slots of one trainer process. `identity` tells whose state it is; others' slots are not restored.

    `max_bytes` 0: what the memory volume offers. Opening changes nothing on the volume.
    """

    def __init__(self, directory: Path, *, identity: str, rank: int = 0, slots: int = 3, max_bytes: int = 0) -> None:
        self._directory = directory
        self._prefix = f"{paths.SNAPSHOT_PREFIX}.{rank}"
        self._identity = identity
        self._limits = (slots, max_bytes)
        self._beside = Beside()
        found = (Slot(self._path(number), number, self._beside) for number in range(MAX_SLOTS))
        self._slots = {slot.number: slot for slot in found if slot.size}
        self._generation = max((slot.generation for slot in self._slots.values()), default=0)
        self._plan: Plan | None = None
        self._key: tuple[Any, ...] = ()

    def _path(self, number: int) -> Path:
        return self._directory / f"{self._prefix}.{number}"

    @property
    def size_bytes(self) -> int:
        """Of all slots together."""
        return sum(slot.size for slot in self._slots.values())

    @property
    def count(self) -> int:
        """Slots that have memory."""
        return len(self._slots)

    def limit(self, *, slots: int, max_bytes: int) -> None:
        """New limits, from the next capture on."""
        if (slots, max_bytes) != self._limits:
            self._limits = (slots, max_bytes)
            self._key = ()

    def held(self) -> list[Held]:
        """Sealed slots, newest first. Nothing is verified here."""
        found = [held for slot in self._slots.values() if (held := slot.held()) is not None]
        return sorted(found, key=lambda held: -held.generation)

    # Taking

    def capture(
        self,
        *,
        step: int,
        tensors: Mapping[str, Tensor],
        blobs: Mapping[str, bytes],
        meta: Mapping[str, Any],
        good: bool,
        exempt: Mapping[str, Ranges] | None = None,
    ) -> list[str]:
        """Copies a state into the slot that matters least, and seals it if all of it is finite.

        Gives the names of tensors that are not finite: nothing was published then. `exempt` are elements by tensor
        that may be anything. SnapshotError when the volume cannot hold two such states: then no slot is left.
        """
        head = encoded(meta, blobs)
        plan = self._planned(tensors, sum(map(len, head)), exempt)
        slot = self._free_slot(step)
        self._generation += 1
        return slot.write(plan, head, generation=self._generation, step=step, good=good)

    def _free_slot(self, step: int) -> Slot:
        held = self.held()
        if len(held) == len(self._slots):
            return self._slots[ring.victim(held, step=step).slot]
        sealed = {snapshot.slot for snapshot in held}
        return next(slot for number, slot in self._slots.items() if number not in sealed)

    def _planned(self, tensors: Mapping[str, Tensor], head_bytes: int, exempt: Mapping[str, Ranges] | None) -> Plan:
        """Costs something only when the set of tensors has changed."""
        where = tuple((name, tensor.data_ptr(), tensor.nbytes) for name, tensor in tensors.items())
        key = (where, exempt or {})
        plan = self._plan
        if plan is not None and key == self._key and head_bytes <= plan.head_bytes:
            return plan
        if head_bytes > MAX_HEAD_BYTES:
            raise SnapshotError(f"the state's description has {head_bytes} bytes; at most {MAX_HEAD_BYTES}")
        plan = plan_of(self._identity, tensors, head_bytes=head_bytes, exempt=exempt)
        self._fit(plan.slot_bytes)
        self._plan, self._key = plan, key
        return plan

    # The cap

    def _fit(self, slot_bytes: int) -> None:
        """Makes slots of this size: as many as limits and volume allow. Keeps what matters most of what is held."""
        wanted, _ = self._limits
        slot_bytes = max([slot_bytes, *(slot.size for slot in self._slots.values())])
        cap = self._cap()
        count = ring.slots_within(cap, slot_bytes=slot_bytes, wanted=wanted)
        while len(self._slots) > count:
            self._drop_least()
        spare = (number for number in range(MAX_SLOTS) if number not in self._slots)
        for number in list(spare)[: count - len(self._slots)]:
            self._slots[number] = Slot(self._path(number), number, self._beside)
        refusal = self._reserve(slot_bytes)
        if len(self._slots) < 2:
            self.release()
            raise SnapshotError(
                f"two snapshots of {_mib(slot_bytes)} do not fit into {self._directory}, which offers {_mib(cap)}"
                f"{refusal and f' ({refusal})'}; raise spec.workers.sharedMemorySize, or checkpoint.memory.maxBytes "
                "where it is set"
            )
        if len(self._slots) < wanted:
            log.warning(
                "%d snapshots of %s instead of %d: %s", len(self._slots), _mib(slot_bytes), wanted, refusal or "cap"
            )

    def _cap(self) -> int:
        """Bytes for all slots together."""
        volume = os.statvfs(self._directory)
        reserve = min(RESERVE_BYTES, volume.f_blocks * volume.f_frsize // RESERVE_SHARE)
        offered = max(0, volume.f_bavail * volume.f_frsize + self.size_bytes - reserve)
        _, max_bytes = self._limits
        return min(max_bytes, offered) if max_bytes else offered

    def _reserve(self, slot_bytes: int) -> str:
        """Gives every slot its memory, or drops slots until it can. Why some were dropped."""
        refusal = ""
        while waiting := [slot for slot in self._slots.values() if slot.size < slot_bytes]:
            # What is held first: a slot that cannot grow makes an empty one give way.
            slot = max(waiting, key=lambda slot: slot.size)
            try:
                slot.reserve(slot_bytes)
            except OSError as error:
                refusal = error.strerror or str(error)
                self._drop_least()
        return refusal

    def _drop_least(self) -> None:
        """An empty slot, or that of the snapshot that matters least."""
        held = self.held()
        sealed = {snapshot.slot for snapshot in held}
        empty = [number for number in self._slots if number not in sealed]
        number = empty[-1] if empty else ring.victim(held, step=held[0].step).slot
        self._slots.pop(number).remove()

    def release(self) -> None:
        """Gives all memory back; nothing is held any more."""
        for slot in self._slots.values():
            slot.remove()
        self._slots.clear()
        self._plan, self._key = None, ()

    # Judging

    def promote(self, *, before_step: int) -> None:
        """Candidates taken at a step below `before_step` are good from now on."""
        for slot in self._slots.values():
            slot.promote(before_step)

    def discard(self, held: Held) -> None:
        """Forgets one snapshot."""
        self._slots[held.slot].unseal()

    def discard_after(self, step: int) -> None:
        """Forgets all snapshots of a step above `step`."""
        for held in self.held():
            if held.step > step:
                self.discard(held)

    # Going back

    def restore(self, held: Held, into: Mapping[str, Tensor], *, verify_first: bool = False) -> Content | None:
        """Copies the slot's tensors into live ones of the same name and size; None if it does not verify.

        Verifies on the way, which is one pass less over memory: when None comes back, live tensors may be half
        overwritten, and must come from another source. With `verify_first` they are untouched then. Tensors without a
        live counterpart are given out as views.
        """
        return self._slots[held.slot].read(self._identity, into, verify_first=verify_first)

    def close(self) -> None:
        """Lets go of the memory; what it holds stays for the next process."""
        self._beside.close()
        for slot in self._slots.values():
            slot.close()
        self._slots.clear()
        self._plan, self._key = None, ()


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
