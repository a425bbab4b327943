"""What can never get well ends the process with a code of its own and words that say what would mend it."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from esper_leyline import env, paths, signing
from esper_leyline.exitcodes import SidecarExit
from esper_runtime.sidecar.environment import Environment, KeyFileError, SettingsError, VolumeError
from esper_runtime.weatherlight import preflight as module
from esper_runtime.weatherlight.preflight import preflight
from esper_runtime.weatherlight.worker import key_problem

from tests.support.weatherlight import PodFiles


@pytest.fixture
def pod(tmp_path: Path) -> PodFiles:
    return PodFiles(tmp_path)


def checked(pod: PodFiles, **changes: str) -> Any:
    return preflight(Environment({**pod.environment, **changes}))


def test_a_pod_as_it_should_be_passes_and_nothing_is_left_behind(pod: PodFiles):
    settings = checked(pod)
    assert settings.state_dir.is_dir()
    assert [path.name for path in pod.run_dir.rglob("*")] == [paths.WEATHERLIGHT_STATE]
    assert key_problem(settings) == ""


@pytest.mark.parametrize("name", [signing.REPORT_PRIVATE, signing.OPERATOR_PUBLIC])
@pytest.mark.parametrize(
    "content", [None, "", "abc\n", "zz" * 32, "11" * 31], ids=["absent", "empty", "short", "no hex", "31 bytes"]
)
def test_a_key_that_is_missing_or_none_is_named(pod: PodFiles, name: str, content: str | None):
    path = pod.root / "keys" / name
    settings = checked(pod)
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(KeyFileError, match=name) as raised:
        checked(pod)
    assert raised.value.exit_code == SidecarExit.KEY
    assert not content or content.strip() not in str(raised.value), "never a part of a key"
    assert name in key_problem(settings), "nor is a pod ready without it"


def test_a_volume_that_is_not_there_is_named(pod: PodFiles, tmp_path: Path):
    with pytest.raises(VolumeError, match="gone cannot be written: No such file") as raised:
        checked(pod, **{env.RUN_DIR: str(tmp_path / "gone")})
    assert raised.value.exit_code == SidecarExit.VOLUME
    assert "memory volume" in str(raised.value)


def test_a_place_that_is_taken_is_named(pod: PodFiles):
    (pod.run_dir / paths.WEATHERLIGHT_STATE).write_text("in the way")
    with pytest.raises(VolumeError, match=paths.WEATHERLIGHT_STATE):
        checked(pod)


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.EROFS, VolumeError), (errno.EACCES, VolumeError), (errno.ENOSPC, OSError), (errno.EDQUOT, OSError)],
)
def test_a_full_volume_may_have_room_later_and_one_that_is_read_only_never(
    pod: PodFiles, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
):
    def refuse(path: Path, content: bytes) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(module, "write_atomically", refuse)
    with pytest.raises(kind) as raised:
        checked(pod)
    assert isinstance(raised.value, SettingsError) == (kind is VolumeError)


def test_an_environment_that_lacks_something_is_another_matter(pod: PodFiles):
    with pytest.raises(SettingsError, match=env.RUN_UID) as raised:
        checked(pod, **{env.RUN_UID: ""})
    assert raised.value.exit_code == SidecarExit.CONFIG
