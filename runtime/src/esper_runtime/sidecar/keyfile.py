"""Key files on a mounted Secret, followed while they change: a rotation of keys needs no restart.

A file that has been good and is now gone or makes no sense changes nothing but the log: the last good keys count on,
so that a volume in trouble silences nobody.
"""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Generic, TypeVar

from esper_leyline.signing import SignatureError, SigningKey, Verifier

from esper_runtime.sidecar.environment import KeyFileError, SettingsError

GRACE_S: Final = 60.0
"""The keys before a change count so much longer where the ones after it are not known: the kubelet refreshes the
volumes of one pod one after the other, so a sender may still use the key before."""

T = TypeVar("T")

log = logging.getLogger(__name__)


class KeyFile(Generic[T]):
    """What a key file holds now. Looking costs one stat."""

    def __init__(self, path: Path, parse: Callable[[str], T], what: str) -> None:
        """SettingsError when the file is of no use. `parse` raises ValueError; `what` names its content."""
        self._path, self._parse, self._what = path, parse, what
        self._stamp = _stamp(path)
        self._value = self._read()

    def current(self) -> T:
        stamp = _stamp(self._path)
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._value = self._read()
            except SettingsError as error:
                log.error("%s; the keys from before count on", error)
            else:
                log.info("%s has changed: it is read again", self._path)
        return self._value

    def _read(self) -> T:
        try:
            return self._parse(self._path.read_text(encoding="ascii"))
        except FileNotFoundError as error:
            raise KeyFileError(f"{self._path} is missing; the operator mounts it from the Secret <run>-keys") from error
        except OSError as error:
            raise KeyFileError(f"{self._path} cannot be read: {error.strerror}") from error
        except ValueError:  # its message could quote the key
            raise KeyFileError(f"{self._path} holds no {self._what}") from None


def private_key(path: Path) -> KeyFile[SigningKey]:
    """SettingsError, without a part of the key, when the file holds none."""
    return KeyFile(path, SigningKey.from_text, "private key of 64 hex digits")


class Keyring(Verifier):
    """The public keys in a file; those before its last change count GRACE_S longer."""

    def __init__(self, path: Path, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        """SettingsError when the file is of no use."""
        self._file = KeyFile(path, Verifier.from_text, "public keys, one of 64 hex digits a line")
        self._now = self._file.current()
        self._before: Verifier | None = None
        self._before_until = 0.0
        self._monotonic = monotonic

    def check(self, key_id: str, signature: bytes, message: bytes) -> None:
        found = self._file.current()
        if found is not self._now:
            self._before, self._before_until, self._now = self._now, self._monotonic() + GRACE_S, found
        try:
            found.check(key_id, signature, message)
        except SignatureError as error:
            if error.reason != "unknown_key_id" or self._before is None or self._monotonic() >= self._before_until:
                raise
            self._before.check(key_id, signature, message)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Changes whenever the file does: the kubelet writes new files and moves a link."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
