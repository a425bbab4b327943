"""A directory with a manifest, emptied of processes whatever becomes of the test."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.localruns import Laptop


@pytest.fixture
def laptop(tmp_path: Path) -> Iterator[Callable[..., Laptop]]:
    """Makes a Laptop of the documents of a manifest."""
    made: list[Laptop] = []

    def make(documents: Sequence[dict[str, Any]], **options: Any) -> Laptop:
        made.append(Laptop(tmp_path, documents, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()
