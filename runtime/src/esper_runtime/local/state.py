"""The state directory of one run: everything that must outlive a command.

    resource.json     the EsperTrainingRun; spec changed by any command, status by the runner alone
    lock              held for the moment of a change of resource.json
    runner            held by `esper run` for its whole life; names its process
    seed              seed of the run's keys (0600)
    objects/          ConfigMaps and Secrets that the runner made (0600)
    checkpoints/      the volume of the checkpoints
    logs/<pod>/       one file per container
    events.jsonl      what would be Kubernetes Events, newest last, bounded
    scratch.json      directories elsewhere that are of no use once no runner lives

Nobody else writes here. All files of the run's content are replaced by rename, so a reader sees old or new.
"""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from esper_runtime.local.errors import RunnerActive, StateError

Resource = dict[str, Any]

DEFAULT_ROOT = Path(".esper")
SEED_BYTES = 32
MAX_EVENTS_BYTES = 256 * 1024
LOCK_PATIENCE_S = 0.3
SCRATCH_PREFIX = "esper-"
_WITHOUT_A_RUN = ("runner", "lock", "scratch.json")


def now_text() -> str:
    """The time of the resource's timestamps: UTC, whole seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class StateDir:
    """Reads and changes the state of one run. Cheap to make; touches nothing until asked to."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.resource = self.root / "resource.json"
        self.objects = self.root / "objects"
        self.checkpoints = self.root / "checkpoints"
        self.logs = self.root / "logs"
        self.events = self.root / "events.jsonl"
        self._scratch = self.root / "scratch.json"
        self._lock = self.root / "lock"
        self._runner = self.root / "runner"
        self._seed = self.root / "seed"

    @classmethod
    def of(cls, namespace: str, name: str, *, below: Path = DEFAULT_ROOT) -> "StateDir":
        """The default place: <below>/<namespace>/<name>."""
        return cls(below / namespace / name)

    def exists(self) -> bool:
        return self.resource.is_file()

    def create(self) -> None:
        """Makes the directory; StateError when it holds something else."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            foreign = [entry.name for entry in self.root.iterdir() if not self._needs_no_run(entry)]
        except OSError as error:
            raise StateError(f"{self.root}: {error.strerror}: choose another directory with --state") from error
        if foreign and not self.exists():
            raise StateError(
                f"{self.root}: is not empty and holds no run ({foreign[0]}): choose another directory with --state"
            )
        for directory in (self.objects, self.checkpoints, self.logs):
            directory.mkdir(exist_ok=True)
        self.objects.chmod(0o700)

    def _needs_no_run(self, entry: Path) -> bool:
        """Ours, though there is no run: what a runner leaves that is killed before it has stored its resource."""
        ours = (self.objects, self.checkpoints, self.logs)
        return entry.name in _WITHOUT_A_RUN or (entry in ours and entry.is_dir() and not any(entry.iterdir()))

    def read(self) -> Resource:
        """The resource as it is now. StateError when there is none or it cannot be read."""
        try:
            found = json.loads(self.resource.read_text())
        except FileNotFoundError:
            raise StateError(f"{self.root}: no run lives here") from None
        except (OSError, ValueError) as error:
            raise StateError(f"{self.resource}: cannot be read: {error}") from error
        if not isinstance(found, dict) or not isinstance(found.get("metadata"), dict):
            raise StateError(f"{self.resource}: holds no resource")
        return found

    def modified_ns(self) -> int:
        """Changes whenever the resource does; 0 when there is none."""
        try:
            found = self.resource.stat()
        except FileNotFoundError:
            return 0
        return found.st_mtime_ns ^ found.st_ino

    def write_new(self, resource: Resource) -> None:
        """Stores a run that was not there, or replaces it whole."""
        with self._locked():
            write_json(self.resource, resource, durable=True)

    def clear(self) -> None:
        """Forgets the run: its resource, keys, objects, logs, events and own checkpoints. Needs the runner lock."""
        for path in (self.objects, self.checkpoints, self.logs):
            shutil.rmtree(path, ignore_errors=True)
        for path in (self.resource, self.events, self._seed):
            path.unlink(missing_ok=True)
        self.create()

    def change_spec(self, change: Callable[[Resource], None]) -> Resource:
        """Applies `change` to the spec under the lock; the generation rises when that changed anything."""
        with self._locked():
            resource = self.read()
            before = json.dumps(resource["spec"], sort_keys=True)
            change(resource["spec"])
            if json.dumps(resource["spec"], sort_keys=True) != before:
                metadata = resource["metadata"]
                metadata["generation"] = int(metadata.get("generation", 1)) + 1
                _next_version(resource)
                write_json(self.resource, resource, durable=True)
            return resource

    def write_status(self, status: Resource, *, durable: bool) -> Resource:
        """Stores a status beside the spec as it is now. For the runner alone."""
        with self._locked():
            resource = self.read()
            resource["status"] = status
            _next_version(resource)
            write_json(self.resource, resource, durable=durable)
            return resource

    @contextlib.contextmanager
    def runner_lock(self) -> Iterator[None]:
        """Held by the one process that drives the run; RunnerActive when another one does."""
        descriptor = os.open(self._runner, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if not _lock_soon(descriptor):
                raise RunnerActive(self.root, _pid(descriptor))
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            try:
                yield
            finally:
                os.ftruncate(descriptor, 0)
        finally:
            os.close(descriptor)

    def runner_pid(self) -> int | None:
        """The process that drives the run now; None when none does."""
        try:
            descriptor = os.open(self._runner, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _pid(descriptor)
        else:
            return None
        finally:
            os.close(descriptor)

    def seed(self) -> bytes:
        """The seed of the run's keys, made at the first call."""
        with self._locked():
            try:
                found = self._seed.read_bytes()
            except FileNotFoundError:
                found = os.urandom(SEED_BYTES)
                write_bytes(self._seed, found, mode=0o600, durable=True)
        if len(found) < SEED_BYTES:
            raise StateError(f"{self._seed}: has {len(found)} bytes, {SEED_BYTES} are needed: remove it")
        return found

    def remember_scratch(self, directories: list[Path]) -> None:
        """Notes directories outside for forget_scratch(). For the runner alone."""
        write_json(self._scratch, [str(directory) for directory in directories])

    def scratch(self) -> list[Path]:
        """Directories outside of the runner that is there now, or of the last one."""
        try:
            noted = json.loads(self._scratch.read_text())
        except (FileNotFoundError, ValueError):
            return []
        return [directory for directory in map(Path, noted) if directory.name.startswith(SCRATCH_PREFIX)]

    def forget_scratch(self) -> None:
        """Removes the directories of a runner that could not do it itself. For the next runner, once no process of
        that one lives."""
        for directory in self.scratch():
            shutil.rmtree(directory, ignore_errors=True)
        self._scratch.unlink(missing_ok=True)

    def add_events(self, lines: list[str]) -> None:
        """Appends records; the older half is dropped when the file has grown too long."""
        if not lines:
            return
        if self.events.exists() and self.events.stat().st_size > MAX_EVENTS_BYTES:
            kept = self.events.read_bytes()[-MAX_EVENTS_BYTES // 2 :]
            write_bytes(self.events, kept[kept.find(b"\n") + 1 :])
        with self.events.open("a") as file:
            file.write("".join(f"{line}\n" for line in lines))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StateError(f"{self._lock}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def find_runs(below: Path = DEFAULT_ROOT) -> list[StateDir]:
    """Every run below the default place, by namespace and name."""
    return [StateDir(found.parent) for found in sorted(below.glob("*/*/resource.json"))]


def _next_version(resource: Resource) -> None:
    metadata = resource["metadata"]
    metadata["resourceVersion"] = str(int(metadata.get("resourceVersion", "0")) + 1)


def _lock_soon(descriptor: int) -> bool:
    """False when another process holds the lock and keeps it: runner_pid() holds it too, but only for a moment."""
    give_up = time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > give_up:
                return False
            time.sleep(LOCK_PATIENCE_S / 20)
        else:
            return True


def _pid(descriptor: int) -> int | None:
    text = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
    return int(text) if text.isdigit() else None


def write_json(path: Path, value: Any, *, mode: int = 0o644, durable: bool = False) -> None:
    """Replaces `path` by `value` as JSON in one rename."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(path, text.encode(), mode=mode, durable=durable)


def write_bytes(path: Path, content: bytes, *, mode: int = 0o644, durable: bool = False) -> None:
    """Replaces `path` in one rename; `durable` waits until it is on the disk."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), mode)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
