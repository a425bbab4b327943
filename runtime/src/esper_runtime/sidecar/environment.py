"""The environment of a sidecar, read strictly: what is missing or malformed is named, with what would mend it."""

from collections.abc import Mapping
from pathlib import Path

from esper_leyline.exitcodes import SidecarExit


class SettingsError(ValueError):
    """The environment or a mounted file cannot be used, and no restart would help; the message names it and what would
    mend it."""

    exit_code = SidecarExit.CONFIG
    """Of the container."""


class KeyFileError(SettingsError):
    exit_code = SidecarExit.KEY


class VolumeError(SettingsError):
    exit_code = SidecarExit.VOLUME


class Environment:
    """Typed look-ups of environment variables by the names of esper_leyline.env."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = variables

    def text(self, name: str, default: str | None = None) -> str:
        """The value of `name`; `default` when it is unset or empty; SettingsError when there is no default."""
        found = self._variables.get(name, "")
        if found:
            return found
        if default is None:
            raise SettingsError(f"environment variable {name} is not set; the operator sets it on every sidecar")
        return default

    def path(self, name: str) -> Path:
        """An absolute path."""
        found = Path(self.text(name))
        if not found.is_absolute():
            raise SettingsError(f"environment variable {name} is {str(found)!r}; it must be an absolute path")
        return found

    def integer(self, name: str, default: int | None = None, *, at_least: int = 0) -> int:
        text = self.text(name, None if default is None else str(default))
        try:
            number = int(text)
        except ValueError as error:
            raise SettingsError(f"environment variable {name} is {text!r}; it must be an integer") from error
        if number < at_least:
            raise SettingsError(f"environment variable {name} is {number}; it must be at least {at_least}")
        return number
