"""What a machine must have for `esper run`, said before anything starts."""

import pytest
from esper_runtime.local.errors import LocalError
from esper_runtime.local.session import _Announcer, _scratch, require_linux


def test_other_systems_are_refused_with_a_way_out():
    require_linux("linux")
    with pytest.raises(LocalError, match="needs Linux, this is darwin: use WSL 2, a container"):
        require_linux("darwin")


def test_scratch_directories_are_gone_afterwards():
    with _scratch() as (scratch, shm):
        (scratch / "file").write_text("x")
        (shm / "file").write_text("x")
    assert not scratch.exists()
    assert not shm.exists()


def test_a_long_runtime_directory_is_not_used(tmp_path, monkeypatch):
    long = tmp_path / ("d" * 80)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    with _scratch() as (scratch, _):
        assert len(str(scratch)) < 60


def test_redis_is_spoken_of_when_it_goes_and_when_it_is_back():
    said = []
    announce = _Announcer(said.append)
    for problem in (None, "it does not answer", None, None):
        announce(problem)
    assert [line.split(";")[0] for line in said] == ["Redis: it does not answer", "Redis: answers again"]
