"""Trainers as processes of their own, for faults that have to be there before the first import."""

import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from esper_leyline.exitcodes import ExitCode
from esper_runtime.checkpoint import LoadedGeneration

from tests.support.trainers import Pod

EPOCHS = 150
STEPS = 16 * EPOCHS
END_S = 300.0


def configured(root: Path, **sections: Any) -> Pod:
    """A run of some seconds that saves often and does not write its losses."""
    checkpoint = {"everySteps": 20, "memory": {"everySteps": 5}, "retention": {"keepLatest": 3}}
    config = {"epochs": EPOCHS, "losses": ""}
    return Pod(root).configure(config=config, checkpoint=checkpoint, **sections)


@contextmanager
def spawned(pod: Pod, environment: Mapping[str, str]) -> Iterator["subprocess.Popen[str]"]:
    with mock.patch.dict("os.environ", environment):
        process = pod.spawn()
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def undisturbed(root: Path, **sections: Any) -> LoadedGeneration:
    """What the run ends with when nothing happens to it."""
    pod = configured(root, **sections)
    with spawned(pod, {}) as process:
        _, said = process.communicate(timeout=END_S)
    assert process.returncode == ExitCode.COMPLETE, said[-1500:]
    return pod.newest()
