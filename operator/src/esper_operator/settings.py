"""The operator's configuration: environment variables, each with its meaning, default and risk.

`docs/reference/settings.md` is generated from here.
"""

import ast
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from esper_leyline.labels import EMERGENCY_CONFIG_MAP
from esper_leyline.oona import OonaConfig
from esper_leyline.oona.config import OonaConfigError
from esper_leyline.ports import OPERATOR_HTTP

from esper_operator.model import Settings

PREFIX = "ESPER_OPERATOR_"
SERVICE_ACCOUNT_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
FORMATS = ("json", "text")
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
PULL_POLICIES = ("Always", "IfNotPresent", "Never")


class SettingsError(ValueError):
    """A variable that cannot be used; the message names it and the remedy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OperatorSettings:
    namespace: str = ""
    """Namespace of the operator itself: its Lease, its seed Secret and ConfigMap `esper-emergency` live there.
    Default: that of the service account; `default` outside a cluster."""
    watch_namespaces: tuple[str, ...] = ()
    """Namespaces whose runs are served, separated by commas. Empty: all, which needs a ClusterRole."""
    runtime_image: str
    """Image of the trainer for runs that do not set `spec.runtime.image`. Required."""
    sidecar_image: str
    """Image of the sidecars. Required."""
    image_pull_policy: str = "IfNotPresent"
    """Pull policy of the sidecar image: Always, IfNotPresent or Never."""
    image_pull_secrets: tuple[str, ...] = ()
    """Names of pull secrets for every pod, separated by commas; they must exist in the runs' namespaces."""
    fault_injection: bool = False
    """`true` admits `spec.faultInjection`, which breaks runs on purpose. Never in production."""
    seed_secret: str = "esper-operator-seed"
    """Secret with the seed of all run keys (key `seed`, at least 32 bytes); made when absent.
    Losing or replacing it cuts off the pods of runs that are alive."""
    key_generation: int = 1
    """Generation of all run keys and of the passwords of runs in Redis. One more than before rotates them while runs
    train: pods know the next keys already and drop the old ones when the kubelet has refreshed their Secret, within
    two minutes. Wait as long before the next rotation. It never falls: a lower number than the one in force changes
    nothing, and one that leaves one out stops the start."""
    lease_name: str = "esper-operator"
    """Lease by which one of several replicas leads. Two installations in one namespace need two names."""
    emergency_config_map: str = EMERGENCY_CONFIG_MAP
    """ConfigMap in the operator's namespace with emergency broadcasts to many runs."""
    bus_url: str = ""
    """Redis for the operator and all pods: redis:// or rediss://. Empty: none; reports are then pulled from the
    pods, and emergency signals go by ConfigMap alone."""
    bus_username: str = ""
    """Redis user; empty with a password means the default user."""
    bus_password_file: str = ""
    """File that holds the Redis password."""
    bus_ca_file: str = ""
    """PEM file of the authority that signed the certificate of a rediss:// server.
    Empty, or no such file: the system's."""
    bus_per_run_users: bool = True
    """`true` makes a Redis user for each run, who may do what the run needs and nothing else; the operator's own user
    needs the rights of `esper_leyline.oona.acl.operator_rules`, and Redis 7 or Valkey. Without these rights runs do
    without Redis. `false` lets all runs use the operator's user, so that each can read and forge what others send;
    signatures still protect reports and emergency signals."""
    http_port: int = OPERATOR_HTTP
    """Port of /livez, /readyz and /metrics; 0 turns them off."""
    log_format: str = "json"
    """json or text; handed on to the pods."""
    log_level: str = "INFO"
    """DEBUG, INFO, WARNING or ERROR."""

    def __post_init__(self) -> None:
        if self.key_generation < 1:
            raise SettingsError(f"{PREFIX}KEY_GENERATION is {self.key_generation}; it must be a number from 1")
        _one_of("IMAGE_PULL_POLICY", self.image_pull_policy, PULL_POLICIES)
        _one_of("LOG_FORMAT", self.log_format, FORMATS)
        _one_of("LOG_LEVEL", self.log_level, LEVELS)
        for name in ("runtime_image", "sidecar_image"):
            if not getattr(self, name):
                raise SettingsError(f"{PREFIX}{name.upper()} is not set: name the image")
        if self.bus_url:
            self.bus()

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> "OperatorSettings":
        """SettingsError for a variable that is missing, unknown or malformed."""
        known = {f"{PREFIX}{field.name.upper()}": field for field in fields(cls)}
        unknown = sorted(name for name in environ if name.startswith(PREFIX) and name not in known)
        if unknown:
            raise SettingsError(f"{', '.join(unknown)}: no such setting; see docs/reference/settings.md")
        values: dict[str, Any] = {"runtime_image": "", "sidecar_image": "", "namespace": _default_namespace()}
        for variable, field in known.items():
            text = environ.get(variable, "").strip()
            if text:
                values[field.name] = _parse(variable, text, field.type)
        return cls(**values)

    def bus(self) -> OonaConfig | None:
        """How the operator itself reaches Redis; None without it."""
        if not self.bus_url:
            return None
        try:
            return OonaConfig(
                url=self.bus_url,
                username=self.bus_username,
                password=_file(self.bus_password_file, "BUS_PASSWORD_FILE"),
                ca=self._ca(),
                timeout_s=0.5,
            )
        except OonaConfigError as error:
            raise SettingsError(f"{PREFIX}BUS_URL: {error}") from error

    def _ca(self) -> str:
        """The chart names the file before it knows whether the Secret has it."""
        return _file(self.bus_ca_file, "BUS_CA_FILE") if Path(self.bus_ca_file).is_file() else ""

    def core(self, seed: bytes, generation: int) -> Settings:
        """What the pure core needs to know. `generation` is that of the keys in force."""
        return Settings(
            runtime_image=self.runtime_image,
            sidecar_image=self.sidecar_image,
            image_pull_policy=self.image_pull_policy,
            image_pull_secrets=self.image_pull_secrets,
            fault_injection=self.fault_injection,
            key_seed=seed,
            key_generation=generation,
            bus_url=self.bus_url,
            bus_username=self.bus_username,
            bus_password=_file(self.bus_password_file, "BUS_PASSWORD_FILE"),
            bus_ca=self._ca(),
            bus_per_run_users=bool(self.bus_url) and self.bus_per_run_users,
            log_format=self.log_format,
        )


def _parse(variable: str, text: str, kind: Any) -> Any:
    if kind is bool:
        _one_of(variable.removeprefix(PREFIX), text.lower(), ("true", "false"))
        return text.lower() == "true"
    if kind is int:
        if not text.isdigit() or int(text) > 65535:
            raise SettingsError(f"{variable} is {text!r}; it must be a number from 0 to 65535")
        return int(text)
    if kind is str:
        return text
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SettingsError(f"{PREFIX}{name} is {value!r}; it must be one of {', '.join(allowed)}")


def _file(path: str, name: str) -> str:
    if not path:
        return ""
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{PREFIX}{name}: {path} cannot be read: {error}") from error


def _default_namespace() -> str:
    try:
        return SERVICE_ACCOUNT_NAMESPACE.read_text(encoding="utf-8").strip()
    except OSError:
        return "default"  # outside a cluster


def reference() -> str:
    """docs/reference/settings.md."""
    lines = [
        "# Settings of the operator",
        "",
        "Environment variables; the Helm chart sets them from its values. A variable with the prefix `ESPER_OPERATOR_`",
        "that is not listed here stops the start. Generated from `esper_operator.settings`; do not edit.",
        "",
        "| Variable | Default | Meaning |",
        "|---|---|---|",
    ]
    docs = _field_docs()
    for field in fields(OperatorSettings):
        lines += [f"| `{PREFIX}{field.name.upper()}` | {_default(field.default)} | {docs[field.name]} |"]
    lines += [
        "| `POD_NAME` | host name | Identity in the Lease and in Events. |",
        "| `KUBECONFIG` | | Outside a cluster: how to reach one. Inside, the service account is used. |",
    ]
    return "\n".join(lines) + "\n"


def _default(value: Any) -> str:
    if not isinstance(value, str | int | tuple) or value in ("", ()):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _field_docs() -> dict[str, str]:
    """The string below each field."""
    tree = ast.parse(inspect.getsource(OperatorSettings))
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    docs: dict[str, str] = {}
    for field, doc in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(doc, ast.Expr):
            docs[field.target.id] = " ".join(str(ast.literal_eval(doc.value)).split())
    return docs
