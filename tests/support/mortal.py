"""A process behind tests/support/shim.c that dies at a chosen call: `python -m tests.support.mortal [FILE LIMIT]`.

torch is imported once. Each line on standard input ("<root> <point>") forks a child that starts on the volume, saves
steps 30 and 40, and is killed at that point; 0 never kills. The answer is "killed" or "ended <points passed>".
"""

import ctypes
import os
import sys
from pathlib import Path

import torch
from esper_leyline.runconfig import Retention
from esper_runtime.checkpoint import Store, Wal
from esper_runtime.checkpoint.shards import MAX_FILE_BYTES

from tests.support.checkpoints import training_state

UID = "uid-1"
ELEMENTS = 20_000
"""240 kB: past the page cache, in one chunk."""


def start(root: Path, *, keep_latest: int = 1, limit: int = MAX_FILE_BYTES) -> tuple[Store, Wal]:
    retention = Retention(keep_latest=keep_latest, keep_best=0)
    store = Store(root, run_uid=UID, attempt=1, retention=retention, max_file_bytes=limit)
    store.prepare()
    wal = Wal(store.volume.wal_file)
    wal.replay()
    store.keep_log(wal)
    return store, wal


def live(root: Path, point: int, limit: int) -> int:
    shim = ctypes.CDLL(None)
    shim.shim_arm(ctypes.c_long(point))
    store, wal = start(root, limit=limit)
    for step in (30, 40):
        store.save(training_state(step, elements=ELEMENTS))
    wal.close()
    shim.shim_points.restype = ctypes.c_long
    return int(shim.shim_points())


def main() -> None:
    torch.set_num_threads(1)
    limit = int(sys.argv[1]) if len(sys.argv) > 1 else MAX_FILE_BYTES
    for line in sys.stdin:
        root, point = line.split()
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writer, str(live(Path(root), int(point), limit)).encode())
            os._exit(0)
        os.close(writer)
        _, status = os.waitpid(child, 0)
        passed = os.read(reader, 64).decode()
        os.close(reader)
        answer = "killed" if os.WIFSIGNALED(status) else f"ended {passed}" if passed else f"failed {status}"
        os.write(1, f"{answer}\n".encode())


if __name__ == "__main__":
    main()
