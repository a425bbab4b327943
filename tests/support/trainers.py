"""Runs the real trainer on a tiny workload, in this process or in one of its own."""

import dataclasses
import json
import os
import subprocess
import sys
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esper_leyline import env, paths
from esper_leyline.exitcodes import ExitCode
from esper_leyline.journal import JournalReader
from esper_leyline.pages import EmergencyPage, EmergencyRecord, Heartbeat, Page, PageError
from esper_leyline.reasons import RunReason
from esper_leyline.runconfig import parse
from esper_leyline.v1 import report_pb2 as pb
from esper_leyline.v1.emergency_pb2 import EMERGENCY_SOURCE_SPEC
from esper_runtime.checkpoint import LoadedGeneration, Store
from esper_runtime.tolaria.assemble import assemble, build, lay_out
from esper_runtime.tolaria.loop import Parts, train
from esper_runtime.tolaria.outcome import Outcome
from esper_runtime.tolaria.place import Place
from esper_runtime.tolaria.state import TrainState

from tests.support.waiting import PATIENT_S

CODE = Path(__file__).with_name("tinycode")
UID = "0f0e0d0c-run"
PAUSED = Outcome(exit_code=ExitCode.DRAINED, reason=RunReason.DRAINED)
EVENTS = tuple(field.name for field in pb.RuntimeEvent.DESCRIPTOR.oneofs_by_name["event"].fields)


@dataclass
class Pod:
    """Directories and run.json of one pod, as the trainer sees them."""

    root: Path
    attempt: int = 1
    trainer_start: int = 1
    incarnation: int = 1
    uid: str = UID
    document: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("run", "shm", "checkpoints"):
            (self.root / name).mkdir(parents=True, exist_ok=True)

    @property
    def run_dir(self) -> Path:
        return self.root / "run"

    @property
    def losses_file(self) -> Path:
        return self.root / "losses"

    def configure(self, *, entrypoint: str = "tiny:build", config: dict[str, Any] | None = None, **parts: Any) -> "Pod":
        """run.json; `parts` are sections such as checkpoint={"everySteps": 5}."""
        self.document = {
            "version": 1,
            "name": "tiny",
            "namespace": "tests",
            "uid": self.uid,
            "entrypoint": entrypoint,
            "config": {"losses": str(self.losses_file), **(config or {})},
            "checkpoint": {"memory": {"everySteps": 5}},
            **parts,
        }
        self.write_config()
        return self

    def write_config(self) -> None:
        (self.root / "run.json").write_text(json.dumps(self.document))

    def environment(self) -> dict[str, str]:
        return {
            env.CONFIG_FILE: str(self.root / "run.json"),
            env.RUN_UID: self.uid,
            env.ATTEMPT: str(self.attempt),
            env.RUN_DIR: str(self.run_dir),
            env.SHM_DIR: str(self.root / "shm"),
            env.CHECKPOINT_DIR: str(self.root / "checkpoints"),
            env.CODE_DIR: str(CODE),
            env.TRAINER_START: str(self.trainer_start),
            env.INCARNATION: str(self.incarnation),
        }

    def assemble(self) -> tuple[Parts, TrainState]:
        bench = lay_out(Place.read(self.environment()), parse((self.root / "run.json").read_text()))
        built = build(bench)
        # A trainer's files are closed by the end of its process, which is not that of a test.
        weakref.finalize(built.state, bench.facts._wal.close)
        weakref.finalize(built.state, bench.events._journal.close)
        return assemble(bench, built), built.state

    def train(self) -> Outcome:
        """To its end, in this process."""
        parts, state = self.assemble()
        return _to_the_end(parts, state)

    def skipping(self, *numbers: int) -> Outcome:
        """`train`, with the batches of these numbers left out by construction."""
        parts, state = self.assemble()
        state.loader.skipped.update(state.loader.position_of(number) for number in numbers)
        return _to_the_end(parts, state)

    def spawn(self) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "esper_runtime.tolaria.trainer"],
            env={**os.environ, "OMP_NUM_THREADS": "1", **self.environment()},
            stderr=subprocess.PIPE,
            text=True,
        )

    # What it left

    def newest(self) -> LoadedGeneration:
        """Its newest verified checkpoint."""
        return newest(self.root / "checkpoints", uid=self.uid)

    def saved_step(self) -> int:
        """Of its newest checkpoint whose manifest is on the volume; 0 without one."""
        run_dir = self.root / "checkpoints" / self.uid
        return max(
            (json.loads(found.read_text())["step"] for found in run_dir.glob("*/gen-*/manifest.json")), default=0
        )

    # What it said

    def losses(self) -> list[str]:
        return self.losses_file.read_text().split() if self.losses_file.exists() else []

    def events(self, kind: str | None = None) -> list[Any]:
        """Journal events, or the messages of one kind."""
        events = list(JournalReader(self.run_dir / paths.JOURNAL).events())
        return events if kind is None else [getattr(e, kind) for e in events if e.WhichOneof("event") == kind]

    def moves(self) -> list[tuple[str, str, str]]:
        """Transitions as (from, to, reason)."""

        def name(phase: int) -> str:
            return pb.RuntimePhase.Name(phase).removeprefix("RUNTIME_PHASE_")

        return [(name(t.from_phase), name(t.to_phase), t.reason) for t in self.events("transition")]

    def counters(self) -> pb.Counters:
        return self.events()[-1].counters

    def heartbeat(self) -> Heartbeat | None:
        """None while there is no page, or not yet all of it."""
        try:
            return Heartbeat.of(Page.open(self.run_dir / paths.TRAINER_PAGE).read())
        except PageError:
            return None

    # What it hears

    def signal(self, mode: int, *, seq: int, signal_id: str = "ab" * 16, clear: bool = False, attempt: int = 0) -> None:
        record = EmergencyRecord(
            term=1,
            seq=seq,
            mode=mode,
            clear=clear,
            attempt=attempt,
            signal_id=signal_id,
            arrived_ns=1,
            source=EMERGENCY_SOURCE_SPEC,
        )
        EmergencyPage.create(self.run_dir / paths.EMERGENCY_PAGE).publish(record)


def _to_the_end(parts: Parts, state: TrainState) -> Outcome:
    try:
        return train(parts, state)
    finally:
        close(parts)


def close(parts: Parts) -> None:
    """Ends the threads of a trainer that was assembled in this process."""
    parts.step.close()
    parts.checkpoints.close(PATIENT_S)
    if parts.epoch_end.handshake is not None:
        parts.epoch_end.handshake.close()
    parts.publisher.close(PATIENT_S)


class Turns:
    """A trainer that pauses after so many new steps: `run(20)` trains on and gives PAUSED, or its end."""

    def __init__(self, parts: Parts, state: TrainState) -> None:
        self._control: Any = parts.control
        self._parts = dataclasses.replace(parts, control=self)  # type: ignore[arg-type]
        self._state = state
        self._pause_at = 0

    def run(self, steps: int) -> Outcome:
        self._pause_at = self._state.step + steps
        return train(self._parts, self._state)

    def poll(self) -> Outcome | None:
        """In the place of Control's, which is asked first."""
        outcome: Outcome | None = self._control.poll()
        return PAUSED if outcome is None and self._state.step >= self._pause_at else outcome


def newest(checkpoints: Path, *, uid: str = UID) -> LoadedGeneration:
    loaded = Store(checkpoints, run_uid=uid, attempt=1).load_newest()
    assert loaded is not None
    return loaded


def same_bits(one: LoadedGeneration, other: LoadedGeneration) -> None:
    """Model, optimizer, random states and judge bit for bit, and every fact but the time it took.

    How well a run stood (breakers, conservative mode) is its own story and changes no bit of training.
    """
    for stem in ("model", "optimizer", "aux"):
        ours, theirs = one.tensors[stem], other.tensors[stem]
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert tensor.numpy().tobytes() == theirs[name].numpy().tobytes(), f"{stem}: {name}"
    for key in one.state.keys() - {"seconds", "run", "extras"}:
        assert one.state[key] == other.state[key], key
    assert _extras(one) == _extras(other)


def _extras(generation: LoadedGeneration) -> dict[str, Any]:
    return {name: saved for name, saved in generation.state["extras"].items() if name != "stability"}
