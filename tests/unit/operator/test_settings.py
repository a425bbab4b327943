"""The operator's environment: every variable has a meaning, a default and a message when it is wrong."""

import asyncio
import re
import socket
from pathlib import Path

import pytest
import yaml
from esper_operator import settings
from esper_operator.http import application, serve
from esper_operator.settings import OperatorSettings, SettingsError
from prometheus_client import CollectorRegistry

ROOT = Path(__file__).resolve().parents[3]
IMAGES = {"ESPER_OPERATOR_RUNTIME_IMAGE": "runtime:1", "ESPER_OPERATOR_SIDECAR_IMAGE": "sidecar:1"}


def read(**more: str) -> OperatorSettings:
    return OperatorSettings.from_environ({**IMAGES, **{f"ESPER_OPERATOR_{k.upper()}": v for k, v in more.items()}})


def test_two_images_are_enough() -> None:
    found = read()
    assert (found.runtime_image, found.sidecar_image) == ("runtime:1", "sidecar:1")
    assert (found.namespace, found.watch_namespaces, found.fault_injection) == ("default", (), False)
    assert found.bus() is None


def test_each_kind_of_value_is_read() -> None:
    found = read(watch_namespaces="a, b,,c", fault_injection="True", http_port="0", image_pull_secrets=" x ")
    assert found.watch_namespaces == ("a", "b", "c")
    assert found.fault_injection is True
    assert found.http_port == 0
    assert found.image_pull_secrets == ("x",)
    assert read(log_level="").log_level == "INFO"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"runtime_imag": "x"}, "ESPER_OPERATOR_RUNTIME_IMAG: no such setting; see docs/reference/settings.md"),
        ({"fault_injection": "yes"}, "ESPER_OPERATOR_FAULT_INJECTION is 'yes'; it must be one of true, false"),
        ({"http_port": "http"}, "ESPER_OPERATOR_HTTP_PORT is 'http'; it must be a number from 0 to 65535"),
        ({"http_port": "70000"}, "ESPER_OPERATOR_HTTP_PORT is '70000'"),
        ({"log_format": "xml"}, "ESPER_OPERATOR_LOG_FORMAT is 'xml'; it must be one of json, text"),
        ({"log_level": "loud"}, "ESPER_OPERATOR_LOG_LEVEL is 'loud'"),
        ({"image_pull_policy": "Sometimes"}, "ESPER_OPERATOR_IMAGE_PULL_POLICY is 'Sometimes'"),
        ({"bus_url": "http://bus"}, "ESPER_OPERATOR_BUS_URL: "),
        ({"bus_url": "redis://bus", "bus_password_file": "/none"}, "ESPER_OPERATOR_BUS_PASSWORD_FILE: /none cannot be"),
    ],
)
def test_a_wrong_value_is_named_with_the_remedy(more: dict[str, str], words: str) -> None:
    with pytest.raises(SettingsError, match="^" + re.escape(words)):
        read(**more)


@pytest.mark.parametrize("missing", sorted(IMAGES))
def test_an_image_that_is_not_set_is_named(missing: str) -> None:
    with pytest.raises(SettingsError, match=f"{missing} is not set: name the image"):
        OperatorSettings.from_environ({name: value for name, value in IMAGES.items() if name != missing})


def test_secrets_come_from_files_and_are_in_no_repr(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("hunter2\n")
    found = read(bus_url="redis://bus:6379", bus_password_file=str(tmp_path / "password"), bus_ca_file="/none")
    core = found.core(b"k" * 32, 2)
    assert (core.bus_password, core.bus_ca) == ("hunter2", "")
    assert core.bus_per_run_users
    assert not read(bus_url="redis://bus:6379", bus_per_run_users="false").core(b"k" * 32, 2).bus_per_run_users
    assert not read().core(b"k" * 32, 2).bus_per_run_users
    assert "hunter2" not in repr(core)
    assert "kkk" not in repr(core)
    assert "hunter2" not in repr(found)


def test_a_port_that_is_taken_is_said() -> None:
    async def main(port: int) -> None:
        app = application(live={}, ready={}, registry=CollectorRegistry())
        with pytest.raises(SettingsError, match=f"ESPER_OPERATOR_HTTP_PORT is {port}: .*choose a free one"):
            await serve(app, port)

    with socket.create_server(("", 0)) as taken:
        asyncio.run(main(taken.getsockname()[1]))


# --- docs and chart ---


def test_the_page_names_every_setting_once_and_says_what_it_means() -> None:
    page = settings.reference()
    for field in OperatorSettings.__dataclass_fields__:
        rows = re.findall(rf"^\| `ESPER_OPERATOR_{field.upper()}` \| [^|]* \| ([^|]+) \|$", page, re.M)
        assert len(rows) == 1, field
        assert rows[0].endswith(".")
    assert (ROOT / "docs/reference/settings.md").read_text() == page


def test_the_chart_sets_only_settings_that_exist() -> None:
    text = "".join(p.read_text() for p in (ROOT / "charts/esper/templates").rglob("*.yaml"))
    used = set(re.findall(r"ESPER_OPERATOR_([A-Z_]+)", text))
    assert used
    assert used <= {name.upper() for name in OperatorSettings.__dataclass_fields__}
    assert yaml.safe_load((ROOT / "charts/esper/values.yaml").read_text())["faultInjection"]["enabled"] is False
