"""Who a process is, it is told; one that was not told does not guess."""

import ast
import asyncio
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path

import pytest
from esper_leyline import env
from esper_runtime.kasmina import worker as kasmina
from esper_runtime.sidecar.environment import Environment, SettingsError
from esper_runtime.tamiyo import worker as tamiyo
from esper_runtime.tolaria.place import Place
from esper_runtime.tolaria.supervisor.settings import Settings as SupervisorSettings
from esper_runtime.weatherlight.settings import Settings as WeatherlightSettings

from tests.support.sidecars import Sidecars

ROOT = Path(__file__).resolve().parents[4]
Start = Callable[[Mapping[str, str]], object]


def begin_and_end(serve: Callable[[Environment, asyncio.Event], Coroutine[None, None, None]]) -> Start:
    """A sidecar's worker, that is to stop as soon as it is up."""
    stop = asyncio.Event()
    stop.set()
    return lambda variables: asyncio.run(serve(Environment(variables), stop))


STARTS: dict[str, Start] = {
    "kasmina": begin_and_end(kasmina.serve),
    "tamiyo": begin_and_end(tamiyo.serve),
    "weatherlight": lambda variables: WeatherlightSettings.load(Environment(variables)),
    "tolaria's supervisor": SupervisorSettings.read,
    "tolaria": Place.read,
}


@pytest.fixture
def variables(tmp_path: Path) -> dict[str, str]:
    """All that any of them asks for."""
    sidecars = Sidecars(tmp_path)
    for key in (tmp_path / "keys/tamiyo").iterdir():
        key.rename(tmp_path / "keys/kasmina" / key.name)
    config = tmp_path / "run.json"
    config.write_text("{}")
    paths = dict.fromkeys((env.BUS_DIR, env.EMERGENCY_DIR, env.SHM_DIR, env.CHECKPOINT_DIR), str(tmp_path))
    return {
        **{name: value for name, value in sidecars.environ("kasmina").items() if name.startswith("ESPER_")},
        **paths,
        env.RUN: "digits",
        env.NAMESPACE: "team",
        env.CONFIG_FILE: str(config),
    }


@pytest.mark.row("T35")
@pytest.mark.parametrize("missing", [env.RUN_UID, env.ATTEMPT])
@pytest.mark.parametrize("name", STARTS)
def test_a_process_without_its_run_or_attempt_does_not_start(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, name: str, missing: str
) -> None:
    if name == "tolaria's supervisor":
        monkeypatch.setattr("esper_runtime.tolaria.supervisor.settings.parse", lambda text: text)
    with pytest.raises(SettingsError, match=f"environment variable {missing} is not set"):
        STARTS[name]({key: value for key, value in variables.items() if key != missing})


@pytest.mark.row("T35")
def test_no_identity_has_a_default() -> None:
    """In whatever reads the environment."""
    identities = {"RUN", "RUN_UID", "NAMESPACE", "ATTEMPT"}
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path in (ROOT / "runtime/src").rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in ("text", "integer", "get", "getenv")
        and len(call.args) > 1
        and isinstance(call.args[0], ast.Attribute)
        and ast.unparse(call.args[0].value) == "env"
        and call.args[0].attr in identities
    ]
    assert found == []
