"""How a trainer process starts: dies with its supervisor, then becomes the trainer module.

`python -m esper_runtime.tolaria.supervisor.child <module> [<descriptor>]`. The module has `main() -> int`, and for
spares `warm() -> str`. In a pod the end of PID 1 ends everything; on a laptop an orphan would train on and write beside
its successor.

With a descriptor (of a socket to the supervisor) the process is a spare: it imports what training needs and waits for
the word to begin, which brings the environment that it was not born with. Until then it touches no page, journal,
volume or device, and it is the first to go should memory run out.
"""

import ctypes
import importlib
import json
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType

PARENT_PID = "ESPER_SUPERVISOR_PID"
MAX_WORD_BYTES = 64 * 1024
READY = "ready"
FAILED = "failed"
SPARE_NAME = b"esper-spare"
"""What tools show while a process is a spare."""
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_OOM_SCORE = Path("/proc/self/oom_score_adj")
_FIRST_TO_GO = "1000"


def main() -> None:
    module_name, *descriptor = sys.argv[1:]
    parent = int(os.environ.pop(PARENT_PID))
    _prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:  # it died before the request above
        os.kill(os.getpid(), signal.SIGKILL)
    sys.argv = [module_name]
    if descriptor:
        module = wait_as_spare(module_name, socket.socket(fileno=int(descriptor[0])))
    else:
        module = importlib.import_module(module_name)
    sys.exit(module.main())


def wait_as_spare(module_name: str, supervisor: socket.socket) -> ModuleType:
    """Warms up and comes back when it is time to be the trainer; ends when the supervisor does not want it any more."""
    name = Path("/proc/self/comm").read_bytes().strip()
    score = _become_first_to_go()
    _prctl(_PR_SET_NAME, SPARE_NAME)
    module = importlib.import_module(module_name)
    why = str(module.warm())
    supervisor.send(json.dumps({FAILED: why[-2048:]} if why else {READY: True}).encode())
    word = supervisor.recv(MAX_WORD_BYTES)
    if not word:
        sys.exit(0)
    os.environ.update(json.loads(word))
    supervisor.close()
    _prctl(_PR_SET_NAME, name)
    if score is not None:
        with suppress(OSError):  # it stays the first to go; among processes that matter it is the largest anyway
            _OOM_SCORE.write_text(score)
    return module


def _become_first_to_go() -> str | None:
    with suppress(OSError):
        score = _OOM_SCORE.read_text()
        _OOM_SCORE.write_text(_FIRST_TO_GO)
        return score
    return None


def _prctl(option: int, value: int | bytes) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


if __name__ == "__main__":
    main()
