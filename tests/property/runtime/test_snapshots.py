"""Whatever a run does with its snapshots: none of a poisoned state is ever held, a target is always older than the
first suspect step and bit for bit what was captured, the newest good one is never lost, and the cap is never passed.
"""

import math
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from esper_runtime.tolaria import ring
from esper_runtime.tolaria import slot as slots
from esper_runtime.tolaria.beside import WORTH_BYTES
from esper_runtime.tolaria.snapshot import Snapshots
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

ELEMENTS = 3000
SLOT_BYTES = 32 * 4096
"""Of this machine's state: three tensors, a page for the header and layout, 64 KiB for facts, rounded up."""


class Run(RuleBasedStateMachine):
    """A course of training that takes snapshots, doubts itself, goes back, is killed, and finds rotten memory."""

    @initialize(wanted=st.integers(2, 6), room=st.integers(2, 7), worth=st.sampled_from([0, slots.WORTH_BYTES]))
    def begin(self, wanted: int, room: int, worth: int) -> None:
        slots.WORTH_BYTES = worth  # type: ignore[misc]  # hashed in another thread or not
        self.directory = Path(tempfile.mkdtemp(prefix="snapshots"))
        self.wanted, self.cap = wanted, room * SLOT_BYTES + 100
        self.weights = torch.zeros(ELEMENTS)
        self.moments = torch.zeros(2 * ELEMENTS, dtype=torch.float64)
        self.count = torch.zeros((), dtype=torch.int64)
        self.step = 0
        self.serial = 0
        self.captured: dict[int, int] = {}
        """Step -> serial number of the content of its newest snapshot."""
        self.promoted: set[int] = set()
        """Steps whose snapshot is good, rotten and replaced ones included."""
        self.rotten: set[int] = set()
        self.open()
        self.take(good=True)

    def open(self) -> None:
        self.snapshots = Snapshots(self.directory, identity="run", slots=self.wanted, max_bytes=self.cap)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"weights": self.weights, "moments": self.moments, "count": self.count}

    def take(self, *, good: bool) -> list[str]:
        self.serial += 1
        self.weights.fill_(self.serial)
        self.moments.fill_(-self.serial)
        self.count.fill_(self.serial)
        return self.capture(good=good)

    def capture(self, *, good: bool) -> list[str]:
        bad = self.snapshots.capture(
            step=self.step,
            tensors=self.tensors(),
            blobs={"rng": str(self.serial).encode()},
            meta={"serial": self.serial},
            good=good,
        )
        if not bad:
            self.captured[self.step] = self.serial
            self.rotten.discard(self.step)
            self.promoted.discard(self.step)
            if good:
                self.promoted.add(self.step)
        return bad

    # What happens to a run

    @rule(steps=st.integers(1, 12))
    def train(self, steps: int) -> None:
        """Good steps, then a snapshot at the last of them: its candidate predecessors are promoted."""
        self.step += steps
        self.snapshots.promote(before_step=self.step)
        self.promoted |= {step for step in self.captured if step < self.step}
        assert self.take(good=False) == []

    @rule(
        poison=st.sampled_from([math.nan, math.inf, -math.inf]),
        where=st.integers(0, ELEMENTS - 1),
        moment=st.booleans(),
    )
    def train_to_a_poisoned_state(self, poison: float, where: int, moment: bool) -> None:
        self.step += 1
        self.snapshots.promote(before_step=self.step)
        self.promoted |= {step for step in self.captured if step < self.step}
        poisoned = self.moments if moment else self.weights
        poisoned[where] = poison
        before = {held.step for held in self.snapshots.held() if held.good}
        assert self.capture(good=False) == ["moments" if moment else "weights"]
        poisoned[where] = 0.0
        assert max(before, default=0) in {held.step for held in self.snapshots.held()} | {0}
        self.go_back_before(self.step)

    @rule(back=st.integers(0, 40))
    def go_back(self, back: int) -> None:
        """Steps since `step - back` are suspect."""
        self.go_back_before(max(1, self.step - back + 1))

    @precondition(lambda self: len(self.sound()) > 1)
    @rule(data=st.data())
    def rot(self, data: st.DataObject) -> None:
        """A bit of one snapshot flips: of sizes and digests, of layout and facts, or of the tensors."""
        victim = data.draw(st.sampled_from(self.sound()))
        slot = self.snapshots._slots[victim.slot]
        words = slot._words
        head = words[slots._W_LAYOUT] + words[slots._W_META] + words[slots._W_BLOBS]
        start = words[slots._W_START]
        places = (
            st.integers(32, 95)
            | st.integers(128, 127 + head)
            | st.integers(0, words[slots._W_PAYLOAD] - 1).map(lambda offset: start + offset)
        )
        slot._bytes[data.draw(places)] ^= 1 << data.draw(st.integers(0, 7))
        self.rotten.add(victim.step)

    @rule()
    def be_killed_and_start_again(self) -> None:
        self.snapshots.close()
        self.open()

    @rule(wanted=st.integers(2, 6))
    def be_given_other_limits(self, wanted: int) -> None:
        self.wanted = wanted
        self.snapshots.limit(slots=wanted, max_bytes=self.cap)

    # The model

    def sound(self) -> list[ring.Held]:
        return [held for held in self.snapshots.held() if held.step not in self.rotten]

    def go_back_before(self, first_suspect: int) -> None:
        targets = ring.target(self.snapshots.held(), before_step=first_suspect)
        for held in targets:
            assert held.good
            assert held.step < first_suspect
            content = self.snapshots.restore(held, self.tensors())
            if content is None:
                assert held.step in self.rotten, f"the snapshot of step {held.step} is whole and was refused"
                self.snapshots.discard(held)
                continue
            assert held.step not in self.rotten, f"the snapshot of step {held.step} is rotten and was believed"
            self.is_what_was_captured(held.step, content.meta["serial"], content.blobs["rng"])
            self.snapshots.discard_after(held.step)
            self.captured = {step: serial for step, serial in self.captured.items() if step <= held.step}
            self.promoted &= self.captured.keys()
            self.step = held.step
            return
        self.start_again_from_the_volume()

    def start_again_from_the_volume(self) -> None:
        self.snapshots.discard_after(-1)
        self.captured, self.promoted, self.rotten = {}, set(), set()
        assert self.take(good=True) == []

    def is_what_was_captured(self, step: int, serial: int, rng: bytes) -> None:
        assert serial == self.captured[step]
        assert rng == str(serial).encode()
        assert torch.equal(self.weights, torch.full_like(self.weights, serial))
        assert torch.equal(self.moments, torch.full_like(self.moments, -serial))
        assert int(self.count) == serial

    @invariant()
    def only_what_was_promoted_is_good(self) -> None:
        for held in self.sound():
            assert held.step in self.captured
            assert held.good is (held.step in self.promoted)

    @invariant()
    def no_byte_is_above_the_cap(self) -> None:
        sizes = [file.stat().st_size for file in self.directory.iterdir()]
        assert sum(sizes) <= self.cap
        assert len(sizes) <= 16

    @invariant()
    def the_newest_good_one_is_held(self) -> None:
        """Of those that never rotted, since rot is not the ring's fault."""
        held = {snapshot.step for snapshot in self.snapshots.held()}
        good = self.promoted - self.rotten
        if good and not self.rotten:
            assert max(good) in held

    def teardown(self) -> None:
        slots.WORTH_BYTES = WORTH_BYTES  # type: ignore[misc]
        if hasattr(self, "directory"):
            self.snapshots.close()
            shutil.rmtree(self.directory)


Run.TestCase.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.row("T19", "T23")
class TestRun(Run.TestCase):  # type: ignore[misc]
    pass
