"""Runs pytest again and again, each time in a fork of this process, which has torch loaded already.

    python -m tests.acceptance.preloaded

A line of JSON in, {"arguments", "output", "timeout_s"}, gives a line of JSON out: pytest's exit code, or null when it
took too long. What is printed goes to the file `output`. Nothing of the code under test is loaded before the fork.
"""

import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence

MODULES = ("numpy", "torch", "torch.optim", "torch._dynamo", "grpc", "google.protobuf.message")
"""What takes long to load. Nothing that pytest wants to load itself."""
POLL_S = 0.01


def run(arguments: Sequence[str], output: str, timeout_s: float) -> int | None:
    """The exit code. Leaves no process behind."""
    child = os.fork()
    if child == 0:
        _pytest(arguments, output)
    ends = time.monotonic() + timeout_s
    found = 0
    while not found and time.monotonic() < ends:
        time.sleep(POLL_S)
        found, status = os.waitpid(child, os.WNOHANG)
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        """All of them have ended."""
    if not found:
        os.waitpid(child, 0)
        return None
    return os.waitstatus_to_exitcode(status)


def _pytest(arguments: Sequence[str], output: str) -> None:
    """In the fork; does not return. What else runs in it ends with it."""
    code = 3  # pytest's own word for an error within it
    try:
        os.setsid()
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for descriptor, target in ((nothing, 0), (file, 1), (file, 2)):
            os.dup2(descriptor, target)
        sys.argv = ["pytest", *arguments]
        import pytest

        code = pytest.main(list(arguments))
        sys.stdout.flush()
    finally:
        os._exit(code)


def main() -> None:
    for name in MODULES:
        importlib.import_module(name)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(run(job["arguments"], job["output"], job["timeout_s"])), flush=True)


if __name__ == "__main__":
    main()
