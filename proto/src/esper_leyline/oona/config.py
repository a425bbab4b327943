"""Where Redis is, how to log in, and how long to wait for it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from redis.credentials import CredentialProvider

from esper_leyline import paths

SCHEMES: Final = ("redis://", "rediss://", "unix://")


class OonaConfigError(ValueError):
    """A URL or file that cannot be used; the message names it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OonaConfig:
    """Addresses, credentials and limits of one client. Times are seconds."""

    url: str
    """redis://, rediss:// (TLS) or unix://."""
    username: str = ""
    password: str = field(repr=False, default="")
    ca: str = field(repr=False, default="")
    """PEM text of the authority that signed the server's certificate; empty: the system's."""
    directory: Path | None = None
    """When set, username and password are read from here at every connection, so that rotation needs no restart."""
    timeout_s: float = 1.0
    """The most that one call takes, connecting included."""
    block_s: float = 1.0
    """How long a read waits in Redis before it asks again; with timeout_s the time to notice a frozen server."""
    backoff_first_s: float = 0.05
    backoff_max_s: float = 2.0
    breaker_failures: int = 3

    def __post_init__(self) -> None:
        if not self.url.startswith(SCHEMES):
            raise OonaConfigError(
                f"the URL of the message bus is {self.url!r}; it must begin with {', '.join(SCHEMES)}"
            )

    @classmethod
    def from_directory(cls, directory: Path) -> "OonaConfig | None":
        """From the mounted Secret <run>-bus. None when it names no Redis: the run does without."""
        url = _text(directory / paths.BUS_URL)
        if not url:
            return None
        return cls(url=url, ca=_text(directory / paths.BUS_CA), directory=directory)

    def connection_options(self) -> dict[str, Any]:
        """Keyword arguments for redis.asyncio that say who we are."""
        options: dict[str, Any] = {}
        if self.directory is not None and self._read_credentials() != ("", ""):
            options["credential_provider"] = _Credentials(self._read_credentials)
        elif self.password:
            options["credential_provider"] = _Credentials(lambda: (self.username, self.password))
        if self.url.startswith("rediss://") and self.ca:
            options["ssl_ca_data"] = self.ca
        return options

    def _read_credentials(self) -> tuple[str, str]:
        assert self.directory is not None
        return _text(self.directory / paths.BUS_USERNAME), _text(self.directory / paths.BUS_PASSWORD)


class _Credentials(CredentialProvider):
    """Asked by redis-py at every connection."""

    def __init__(self, read: Callable[[], tuple[str, str]]) -> None:
        self._read = read

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        username, password = self._read()
        return (username, password) if username else (password,)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        return self.get_credentials()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise OonaConfigError(f"{path} cannot be read: {error}") from error
