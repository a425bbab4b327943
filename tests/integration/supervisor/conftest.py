from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.supervised import Supervised


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Supervised]:
    supervised = Supervised(tmp_path)
    yield supervised
    supervised.close()
