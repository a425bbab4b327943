"""Real sidecar processes below a short directory: a Unix socket's path has 107 bytes at most."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.sidecars import Sidecars


@pytest.fixture
def sidecars() -> Iterator[Sidecars]:
    with tempfile.TemporaryDirectory(prefix="esper-") as directory:
        made = Sidecars(Path(directory))
        try:
            yield made
        finally:
            made.stop()
