"""P2: the end-of-epoch boundary of a real trainer with real kasmina and tamiyo processes, by part, beside its floor.

.venv/bin/python tests/bench/bench_boundary.py [--rounds 500] [--seconds 40] [--explain]

A perceptron (H=512) trains ten steps an epoch, with validation, so that every boundary finds caches as training leaves
them. "held" is what a boundary takes of training: assembly of the packet, the word of Kasmina and Tamiyo, what follows
from it, and the accounts. In the middle of every epoch the floor of each part is measured by itself, after training
steps too: for a call a bare unary call of as many bytes over a Unix socket, on a channel that is kept, to a server
that does nothing, and the callee's work (decide and sign, verify) done in this process; for the packet its parsing
from bytes; for what has no work of its own an empty call. Threads and channels of the handshake have no floor.

Page faults are those of the boundary alone, after a warm-up: of the training thread, and of all threads of the process.
--explain tells which threads have them (`perf record -e page-faults -g -p PID` where in the code). No durable save runs
beside a boundary here.
"""

import argparse
import asyncio
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from esper_leyline.signing import Verifier, sign_command
from esper_leyline.v1 import command_pb2 as pb
from esper_leyline.v1 import command_pb2_grpc as services
from esper_leyline.v1.telemetry_pb2 import SystemStatePacket
from esper_runtime.kasmina.verifier import CommandVerifier
from esper_runtime.sidecar.rpc import serving
from esper_runtime.tamiyo.command import command_of, facts_of
from esper_runtime.tamiyo.policy import Memory, PolicyConfig, advance
from esper_runtime.tolaria import budget, rpc
from esper_runtime.tolaria.handshake import PACKET_VERSION, Boundary, BoundaryResult

from tests.bench.bench_overhead import CODE
from tests.bench.common import machine, quantile, ratio, row, section
from tests.support.sidecars import Sidecars, wait_until
from tests.support.trainers import PAUSED, Pod, Turns, close

STEPS = 10
WARM_UP = 30
CALLS = ("open", "evaluate", "submit")
PARTS = ("assembly", *CALLS, "apply", "guard")
REST = "threads and channels"


class Bare(services.KasminaAuthorityServiceServicer, services.TamiyoPolicyServiceServicer):
    """Answers at once, with as many bytes as the real ones."""

    def __init__(self, packet_id: str, signed: bytes, verdict: bytes) -> None:
        self._open = pb.OpenBoundaryResponse(packet_id=packet_id)
        self._signed = pb.SignedCommand.FromString(signed)
        self._verdict = pb.CommandVerdict.FromString(verdict)

    async def OpenBoundary(self, request: Any, context: Any) -> pb.OpenBoundaryResponse:
        return self._open

    async def Evaluate(self, request: Any, context: Any) -> pb.SignedCommand:
        return self._signed

    async def SubmitCommand(self, request: Any, context: Any) -> pb.CommandVerdict:
        return self._verdict


def serve(path: Path, answers: list[str]) -> None:
    """The process of the bare server."""

    def register(servicer: Any, server: Any) -> None:
        services.add_KasminaAuthorityServiceServicer_to_server(servicer, server)
        services.add_TamiyoPolicyServiceServicer_to_server(servicer, server)

    async def forever() -> None:
        async with serving(path, register, Bare(answers[0], *map(bytes.fromhex, answers[1:]))):
            await asyncio.Event().wait()

    asyncio.run(forever())


class Floors:
    """Each part by itself. `packet` is one that a boundary has sent."""

    def __init__(self, sidecars: Sidecars, packet: SystemStatePacket) -> None:
        self._uid, self._key = sidecars.run_uid, sidecars.key
        self._raw = packet.SerializeToString()
        self._memory = Memory()
        self._verifier = CommandVerifier(
            run_uid=self._uid, keys=Verifier.from_text(self._key.public_text()), clock_ns=time.monotonic_ns
        )
        self._packet = SystemStatePacket()
        self._packet.CopyFrom(packet)
        self._packet.version, self._packet.training_run_id = PACKET_VERSION, self._uid
        self._packet.packet_id = self._verifier.open_boundary()
        self._signed = self._decide()
        self._opening = pb.OpenBoundaryRequest(run_uid=self._uid, attempt=1, epoch=1, step=1)
        self._server = self._start(sidecars.directory / "bare.sock")
        channel = rpc.channel(sidecars.directory / "bare.sock")
        self._kasmina, self._tamiyo = rpc.kasmina(channel), rpc.tamiyo(channel)

    def _start(self, socket: Path) -> "subprocess.Popen[bytes]":
        verdict = pb.CommandVerdict(accepted=True, command_id="0" * 36)
        answers = [self._packet.packet_id, self._signed.SerializeToString().hex(), verdict.SerializeToString().hex()]
        server = subprocess.Popen([sys.executable, __file__, "--bare", str(socket), *answers])
        wait_until(socket.exists, "the bare server listens")
        return server

    def close(self) -> None:
        self._server.terminate()
        self._server.wait()

    def measure(self) -> dict[str, float]:
        """Milliseconds by part."""
        self._packet.packet_id = self._verifier.open_boundary()
        work = {
            "assembly": lambda: SystemStatePacket.FromString(self._raw),
            "open": lambda: self._kasmina.OpenBoundary(self._opening, timeout=2.0),
            "evaluate": lambda: self._tamiyo.Evaluate(self._packet, timeout=2.0),
            "evaluate, work": self._decide,
            "submit": lambda: self._kasmina.SubmitCommand(self._signed, timeout=2.0),
            "submit, work": lambda: self._verifier.submit(self._signed),
            "apply": lambda: None,
            "guard": lambda: None,
        }
        took: dict[str, float] = defaultdict(float)
        for name, call in work.items():
            began = time.perf_counter()
            found = call()
            took[name.removesuffix(", work")] += (time.perf_counter() - began) * 1e3
            if name == "evaluate, work":
                self._signed = found
        return took

    def _decide(self) -> pb.SignedCommand:
        self._memory, decision = advance(self._memory, facts_of(self._packet), PolicyConfig())
        command = command_of(decision, self._packet, command_id=f"{time.monotonic_ns():036}")
        return sign_command(command, run_uid=self._uid, key=self._key)


@dataclass(frozen=True, kw_only=True)
class Round:
    """One boundary at which the sidecars were asked, and the floors of the same epoch."""

    times: budget.BoundaryTimes
    result: BoundaryResult
    faults: dict[str, int]
    """Of the training thread and of the process."""
    threads: Counter[str]
    floors: dict[str, float]


class Watch:
    """Sees the boundaries of one trainer; put in place before it trains."""

    def __init__(self, epoch_end: Any, *, explain: bool) -> None:
        self._explain = explain
        self._found: dict[str, Any] = {}
        self.packet: SystemStatePacket | None = None
        """Sent at the last boundary at which anybody was asked."""
        self._boundary, self._passed, self._exchange = (
            epoch_end._boundary,
            epoch_end._passed,
            epoch_end.handshake.exchange,
        )
        epoch_end._boundary, epoch_end._passed, epoch_end.handshake.exchange = self._begins, self._ends, self._asks
        # Breakers stay closed, so that a slow machine is measured too.
        epoch_end.standing.failed = lambda part, why: None

    def take(self, floors: dict[str, float]) -> Round | None:
        """The boundary since the last call; None when nobody was asked, since an answer was still out."""
        found, self._found = self._found, {}
        return Round(**found, floors=floors) if found.pop("asked", False) else None

    def _begins(self, *arguments: Any) -> Any:
        self._threads = _faults_by_thread() if self._explain else Counter()
        self._before = _faults()
        return self._boundary(*arguments)

    def _asks(self, packet: SystemStatePacket) -> BoundaryResult:
        self.packet, self._found["asked"] = packet, True
        return self._exchange(packet)

    def _ends(self, times: budget.BoundaryTimes, result: BoundaryResult) -> budget.BoundaryTimes:
        after = _faults()
        threads = _faults_by_thread() - self._threads if self._explain else Counter()
        faults = {name: count - self._before[name] for name, count in after.items()}
        self._found |= {"times": times, "result": result, "faults": faults, "threads": threads}
        return self._passed(times, result)


def _faults() -> dict[str, int]:
    thread, process = resource.getrusage(resource.RUSAGE_THREAD), resource.getrusage(resource.RUSAGE_SELF)
    return {
        "training thread": thread.ru_minflt + thread.ru_majflt,
        "process": process.ru_minflt + process.ru_majflt,
    }


def _faults_by_thread() -> Counter[str]:
    """Of the living threads, by name; all threads of Python itself have one name."""
    found: Counter[str] = Counter()
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it has ended
            _, _, rest = (task / "stat").read_text().partition("(")
            name, _, numbers = rest.rpartition(") ")
            minor, major = numbers.split()[7:10:2]
            found[name] += int(minor) + int(major)
    return found


def measure(directory: Path, sidecars: Sidecars, rounds: int, seconds: float, explain: bool) -> list[Round]:
    pod = Pod(directory, uid=sidecars.run_uid)
    # A metric that there is not: no epoch is the best one, so that no save is written beside a boundary.
    pod.configure(entrypoint="benchload:build", checkpoint={"retention": {"metric": "none"}})
    pod.document["config"] = {"model": "512", "optimizer": "adamw-still", "steps": STEPS, "validation": True}
    pod.write_config()
    parts, state = pod.assemble()
    watch, turns = Watch(parts.epoch_end, explain=explain), Turns(parts, state)
    assert turns.run(STEPS + STEPS // 2) is PAUSED
    assert watch.packet is not None
    floors = Floors(sidecars, watch.packet)
    found: list[Round] = []
    try:
        for _ in range(WARM_UP):
            assert turns.run(STEPS) is PAUSED
            watch.take(floors.measure())
        end = time.monotonic() + seconds
        while len(found) < rounds and time.monotonic() < end:
            assert turns.run(STEPS) is PAUSED
            taken = watch.take(floors.measure())
            found += [] if taken is None else [taken]
    finally:
        floors.close()
        close(parts)
    return found


def parts_of(one: Round) -> dict[str, float]:
    """Of a boundary whose calls have all been answered."""
    parts = {part: one.times.parts[part] for part in ("assembly", "apply", "guard")}
    calls = {call: getattr(one.result.timings, f"{call}_ms") for call in CALLS}
    return {**parts, **calls, REST: one.times.total - sum(parts.values()) - sum(calls.values())}


def tell(rounds: list[Round]) -> None:
    held, sums = [one.times.total for one in rounds], [sum(one.floors.values()) for one in rounds]
    section("boundary, no seeds")
    print(row("held", held, goal="P2", limit=budget.TOTAL_MS))
    print(f"  p99 {quantile(held, 0.99):.2f} ms, greatest {max(held):.2f} ms")
    answered = [one for one in rounds if one.result.answered]
    if answered:
        print(f"    {'part':22} {'boundary':>9} {'floor':>9} {'x':>7}  ms, medians")
        taken = [parts_of(one) for one in answered]
        for name in (*PARTS, REST):
            ours = quantile([parts[name] for parts in taken], 0.5)
            floor = quantile([one.floors.get(name, 0.0) for one in answered], 0.5)
            print(f"    {name:22} {ours:9.3f} {floor:9.3f} {f'{ours / floor:7.1f}' if floor else ''}")
    print(row("sum of the floors", sums))
    print(ratio("held / sum of the floors", held, sums, goal="P2", limit=3.0))
    for name in rounds[0].faults:
        counts = [float(one.faults[name]) for one in rounds]
        print(row(f"page faults, {name}", counts, unit="faults"))
        print(row(f"all faults, {name}", [sum(counts)], unit="faults", goal="P2", limit=0.0))
    commands = [one.result.command for one in rounds if one.result.command is not None]
    kinds = Counter(pb.CommandType.Name(command.command_type) for command in commands)
    print(f"  answered within the soft deadline: {len(answered)} of {len(rounds)}; {dict(kinds)}")


def explained(rounds: list[Round]) -> str:
    threads = sum((one.threads for one in rounds), Counter[str]())
    ended = sum(one.faults["process"] for one in rounds) - sum(threads.values())
    return f"  page faults by thread: {dict(threads.most_common())}; of threads that had ended: {ended}"


def absent(directory: Path, uid: str, rounds: int) -> list[float]:
    """What a boundary is held where no sidecar listens."""
    directory.mkdir()
    boundary = Boundary(directory, run_uid=uid, attempt=1)
    found = []
    for epoch in range(rounds):
        found.append(boundary.exchange(SystemStatePacket(current_epoch=epoch)).timings.total_ms)
        wait_until(lambda: boundary.idle, "the call has ended")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=40.0, help="at most so long, after the warm-up")
    parser.add_argument("--explain", action="store_true", help="where page faults come from; disturbs the times")
    parser.add_argument("--bare", nargs=4, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare is not None:
        serve(Path(arguments.bare[0]), arguments.bare[1:])
        return
    sys.path.insert(0, str(CODE))
    print(machine())
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        sidecars = Sidecars(Path(memory))
        try:
            for name in ("kasmina", "tamiyo"):
                sidecars.start(name)
            rounds = measure(Path(memory), sidecars, arguments.rounds, arguments.seconds, arguments.explain)
            tell(rounds)
            if arguments.explain:
                print(explained(rounds))
            print(row("held, no sidecar there", absent(Path(memory) / "nobody", sidecars.run_uid, 100)))
        finally:
            sidecars.stop()


if __name__ == "__main__":
    main()
