"""P6 to P8: durable save, full restore and the log's commit, against the disk itself and against what others do.

.venv/bin/python tests/bench/bench_checkpoint.py [--sizes 16,256] [--rounds 10] [--seconds 40] [--directory DIR]

Every size in MiB is a model with AdamW's two moments: a third of the bytes each. Per round, one after the other:
the disk's own writing (one file, O_DIRECT, 4 MiB chunks, two at a time, fdatasync), Esper's save without and with the
reading back, torch.save + fsync; then the disk's own cold reading, Esper's load (every digest checked), into memory of
a copy as in a trainer that rolls back and into fresh memory as in one that starts, torch.load, safetensors and
torch.distributed.checkpoint of the same tensors, each with the page cache dropped for its files.
"stall" is what the training thread pays: the copy into host memory, against one memmove of the bytes. The two
tables after the sizes tell what every further MiB costs.
"""

import argparse
import ctypes
import os
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from esper_leyline.runconfig import Retention
from esper_runtime.checkpoint import GenerationData, Store, Wal
from esper_runtime.checkpoint.files import CHUNK, Bytes, aligned_buffer
from esper_runtime.checkpoint.generation import fresh
from esper_runtime.checkpoint.host import HostCopies
from esper_runtime.checkpoint.wal import Kind
from torch import Tensor

from tests.bench.common import machine, ratio, row, section, timed
from tests.bench.sizes import MIB, Point, fits, rounds_within, sizes_of, tell

LOAD_LIMIT_MS = 12_000.0
RIVALS_BYTES = 512 * MIB
"""Above, only those readers are measured that a goal names or that cost no further copy of the state."""
Files = dict[str, dict[str, Tensor]]


def state_of(size: int) -> Files:
    """Layers of 4 MiB and a rest, and the moments of each."""
    count = size // 3 // 4
    shapes = [MIB] * (count // MIB) + ([count % MIB] if count % MIB else [])
    model = {f"layer{number}.weight": torch.randn(length) for number, length in enumerate(shapes)}
    moments = {f"{name}.{kind}": torch.randn_like(t) for name, t in model.items() for kind in ("exp_avg", "exp_avg_sq")}
    return {"model": model, "optimizer": moments}


def raw_write(path: Path, memory: Bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda at: os.pwrite(descriptor, memory[at : at + CHUNK].data, at), range(0, len(memory), CHUNK)))
    os.fdatasync(descriptor)
    os.close(descriptor)


def raw_read(path: Path, memory: Bytes) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    with ThreadPoolExecutor(2) as pool:
        chunks = range(0, len(memory), CHUNK)
        list(pool.map(lambda at: os.preadv(descriptor, [memory[at : at + CHUNK].data], at), chunks))
    os.close(descriptor)


def cold(place: Path) -> None:
    """Drops what the page cache has of these files."""
    for path in [place] if place.is_file() else [entry for entry in place.rglob("*") if entry.is_file()]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def torch_save(path: Path, state: Files) -> None:
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def opened(root: Path, verification: str) -> Store:
    root.mkdir()
    store = Store(root, run_uid="bench", attempt=1, verification=verification, retention=Retention(keep_latest=1))
    store.prepare()
    wal = Wal(store.volume.wal_file)
    wal.replay()
    store.keep_log(wal)
    return store


def others(place: Path, state: Files) -> dict[str, tuple[Path, Callable[[], object]]]:
    """Name -> (files, load) of what else can read these tensors here."""
    found: dict[str, tuple[Path, Callable[[], object]]] = {}
    torch_save(place / "state.pt", state)
    found["torch.load"] = (place / "state.pt", lambda: torch.load(place / "state.pt", weights_only=True))
    flat = {f"{stem}.{name}": tensor for stem, part in state.items() for name, tensor in part.items()}
    try:
        from safetensors.torch import load_file, save_file
    except ImportError:
        print("  safetensors is not installed: left out")
    else:
        save_file(flat, str(place / "flat.safetensors"))
        found["safetensors"] = (place / "flat.safetensors", lambda: load_file(str(place / "flat.safetensors")))
    if sum(tensor.nbytes for tensor in flat.values()) > RIVALS_BYTES:
        return found
    from torch.distributed import checkpoint as dcp

    dcp.save(flat, checkpoint_id=str(place / "dcp"), no_dist=True)
    target = {name: torch.empty_like(tensor) for name, tensor in flat.items()}
    found["torch.distributed.checkpoint"] = (
        place / "dcp",
        lambda: dcp.load(target, checkpoint_id=str(place / "dcp"), no_dist=True),
    )
    return found


def measure(place: Path, size: int, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Milliseconds by name."""
    state = state_of(size)
    memory, again = aligned_buffer(size), aligned_buffer(size)
    memory[:] = 7
    again[:] = 0
    stores = {name: opened(place / name, name) for name in ("None", "Checksum")}
    copies = HostCopies(slots=1)
    copies.take(state)[1]()
    rivals = others(place, state)
    times: dict[str, list[float]] = defaultdict(list)

    def note(name: str, call: Callable[[], object]) -> None:
        times[name].append(timed(call) * 1e3)

    for number in rounds_within(seconds, most=rounds):
        note("memmove", lambda: ctypes.memmove(again.ctypes.data, memory.ctypes.data, size))
        held: list[tuple[Files, Callable[[], None]]] = []
        note("stall", lambda held=held: held.append(copies.take(state)))  # type: ignore[misc]
        images, release = held[0]
        data = GenerationData(epoch=0, step=number + 1, tensors=images)
        note("raw write", lambda: raw_write(place / "raw", memory))
        for name, store in stores.items():
            note(f"save, verification {name}", lambda store=store, data=data: store.save(data))  # type: ignore[misc]
        release()
        note("torch.save + fsync", lambda: torch_save(place / "rival.pt", state))
        cold(place / "raw")
        note("raw read", lambda: raw_read(place / "raw", memory))
        for name, room in (("load", copies.lend), ("load, first of a process", fresh)):
            cold(place / "None")
            stores["None"].room = room
            note(name, stores["None"].load_newest)
        for name, (files, load) in rivals.items():
            cold(files)
            note(name, load)
    report(size, times, list(rivals))
    return times


def report(size: int, times: dict[str, list[float]], rivals: list[str]) -> None:
    section(f"{size / MIB:g} MiB")
    for name, values in times.items():
        goal, limit = ("P6", LOAD_LIMIT_MS) if name == "load" else ("", None)
        print(row(name, values, goal=goal, limit=limit))
    print(ratio("stall / memmove", times["stall"], times["memmove"], goal="P3"))
    print(ratio("save / raw write", times["save, verification None"], times["raw write"], goal="P7", limit=1.2))
    print(ratio("save and read back / raw write", times["save, verification Checksum"], times["raw write"]))
    print(ratio("torch.save + fsync / raw write", times["torch.save + fsync"], times["raw write"]))
    print(ratio("load / raw read", times["load"], times["raw read"], goal="P6", limit=1.25))
    print(ratio("first load / raw read", times["load, first of a process"], times["raw read"]))
    print(ratio("load / torch.load", times["load"], times["torch.load"], goal="P6", limit=0.2))
    for name in rivals:
        print(ratio(f"{name} / raw read", times[name], times["raw read"]))


def commits(place: Path, rounds: int) -> None:
    """P8: one append is one fdatasync; its time against a bare write and fdatasync of as many bytes."""
    section("commit of the log")
    calls = 0
    real = os.fdatasync

    def counted(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        real(descriptor)

    wal = Wal(place / "wal.log")
    wal.replay()
    descriptor = os.open(place / "bare", os.O_WRONLY | os.O_CREAT)
    bare, ours = [], []
    os.fdatasync = counted
    try:
        for number in range(rounds):
            bare.append(timed(lambda number=number: _bare(descriptor, number, real)) * 1e3)  # type: ignore[misc]
            ours.append(timed(lambda: wal.append(Kind.RESTART)) * 1e3)
    finally:
        os.fdatasync = real
        os.close(descriptor)
        wal.close()
    print(row("write and fdatasync", bare))
    print(row("append", ours))
    print(row("fdatasync per append", [calls / rounds], unit="calls", goal="P8", limit=1.0))
    print(ratio("append / write and fdatasync", ours, bare))


def _bare(descriptor: int, number: int, sync: Callable[[int], None]) -> None:
    os.pwrite(descriptor, bytes(258), number * 258)
    sync(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1,16,256,1024,2048", help="MiB of state, separated by commas")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=40.0, help="per size; three rounds at least")
    parser.add_argument("--directory", type=Path, default=None, help="on the disk to measure")
    arguments = parser.parse_args()
    print(f"{machine()}, torch {torch.__version__}")
    found: dict[float, dict[str, list[float]]] = {}
    for size in sizes_of(arguments.sizes):
        place = Path(tempfile.mkdtemp(dir=arguments.directory))
        try:
            # Live: state, the floor's two buffers, the copy, what a load gives; on the disk: 7 files, 2 of them twice.
            if fits(size, memory=6, disk=(place, 9)):
                found[size] = measure(place, size * MIB, arguments.rounds, arguments.seconds)
        finally:
            shutil.rmtree(place)
    for goal, name, floor in (("P7", "save, verification None", "raw write"), ("P6", "load", "raw read")):
        points = [Point(size, times[name], times[floor]) for size, times in found.items()]
        tell(f"{name} against {floor}", points, goal=goal)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        commits(Path(directory), 20 * arguments.rounds)


if __name__ == "__main__":
    main()
