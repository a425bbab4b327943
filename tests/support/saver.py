"""Processes that save checkpoints until they are killed: `python -m tests.support.saver ROOT FILE_LIMIT`.

torch is imported once. Each line on standard input ("<elements>") forks a child that restores, says "restored <step>
<pid>", then saves without end and says "saved <step>" after each commit.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from esper_leyline.runconfig import Retention
from esper_runtime.checkpoint import Store

from tests.support.checkpoints import same_tensors, training_state


def save_forever(root: Path, limit: int, elements: int) -> None:
    store = Store(root, run_uid="uid-1", attempt=1, retention=Retention(keep_latest=2), max_file_bytes=limit)
    store.prepare()
    loaded = store.load_newest()
    step = 0
    if loaded is not None:
        step = loaded.step
        assert not loaded.corrupt, loaded.corrupt
        assert same_tensors(loaded.tensors, training_state(step, elements=elements).tensors)
    say(f"restored {step} {os.getpid()}")
    while True:
        step += 1
        store.save(training_state(step, elements=elements))
        say(f"saved {step}")


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def main() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    for line in sys.stdin:
        if os.fork() == 0:
            save_forever(Path(sys.argv[1]), int(sys.argv[2]), int(line))


if __name__ == "__main__":
    main()
