"""The supervisor's probes answer again once a limit of threads no longer keeps them from it."""

import http.client
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from esper_runtime.tolaria.supervisor.probe import MAX_CONNECTIONS, ProbeServer


@pytest.fixture
def probes(tmp_path: Path) -> Iterator[ProbeServer]:
    server = ProbeServer(0, port_file=tmp_path / "port", alive=lambda: True, metrics=str)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def status(server: ProbeServer) -> int:
    """Of /livez; 0 when nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    try:
        connection.request("GET", "/livez")
        return connection.getresponse().status
    except (http.client.HTTPException, OSError):
        return 0
    finally:
        connection.close()


def test_requests_that_got_no_thread_hold_no_place(probes: ProbeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as limited:
        limited.setattr(threading.Thread, "start", refuse)
        assert [status(probes) for _ in range(2 * MAX_CONNECTIONS)] == [0] * 2 * MAX_CONNECTIONS
    assert status(probes) == 200
