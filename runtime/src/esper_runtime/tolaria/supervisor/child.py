"""How a trainer process starts: dies with its supervisor, then becomes the trainer module.

`python -m esper_runtime.tolaria.supervisor.child <module>`. In a pod the end of PID 1 ends everything; on a laptop an
orphan would train on and write beside its successor.
"""

import ctypes
import os
import runpy
import signal
import sys

PARENT_PID = "ESPER_SUPERVISOR_PID"
_PR_SET_PDEATHSIG = 1


def main() -> None:
    _, module = sys.argv
    parent = int(os.environ.pop(PARENT_PID))
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    if os.getppid() != parent:  # it died before the request above
        os.kill(os.getpid(), signal.SIGKILL)
    sys.argv = [module]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
