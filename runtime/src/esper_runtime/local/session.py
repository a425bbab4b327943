"""One `esper run` as a whole: directories, Redis, keys, reports, signals, the loop, and everything away again."""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import aiohttp
from esper_leyline import env, labels
from esper_leyline.exitcodes import CliExit
from esper_leyline.oona import REPORTS, Oona, OonaConfig, OonaUnavailable
from esper_leyline.paths import PathLayout
from esper_operator import observe
from esper_operator.build.volumes import DATA_PREFIX
from esper_operator.model import Pod, RunKey, Settings
from esper_operator.pull import HttpFetch, Puller
from esper_operator.reports import Intake
from esper_operator.signals import Signals

from esper_runtime.local.api import LocalApi
from esper_runtime.local.errors import LocalError
from esper_runtime.local.guardian import Guardian
from esper_runtime.local.jobs import Jobs
from esper_runtime.local.objects import Objects
from esper_runtime.local.pod import LocalPod, Place
from esper_runtime.local.prepare import Prepared, resume_uid
from esper_runtime.local.probe import port_of
from esper_runtime.local.process import kill_marked, marked
from esper_runtime.local.runner import Hands, Runner
from esper_runtime.local.state import SCRATCH_PREFIX, Resource, StateDir
from esper_runtime.local.volumes import Mount, Mounts

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SETTLE_S = 1.0
"""How long reports on their way are waited for once a pod has ended."""
LEFTOVER_PATIENCE_S = 30.0
_MAX_BASE = 60
"""Of the directory that holds ours: socket paths below it end at 108 bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What a person can choose about `esper run`."""

    redis: bool = True
    stay_halted: bool = False
    say: Callable[[str], None] = field(default=lambda _: None)
    """Hears warnings."""
    on_change: Callable[[Resource], None] = field(default=lambda _: None)
    """Hears of every new status."""


async def drive(state: StateDir, prepared: Prepared, options: Options) -> CliExit:
    """Runs the prepared run until it ends. The caller holds the runner lock."""
    require_linux(sys.platform)
    await _end_leftovers(prepared.resource["metadata"]["uid"], options.say)
    state.forget_scratch()
    loop = asyncio.get_running_loop()
    # One that is ignored already (nohup, a shell's background) stays so.
    heeded = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    async with _session(state, prepared, options) as runner:
        for number in heeded:
            loop.add_signal_handler(number, runner.stop)
        try:
            return await runner.run()
        finally:
            for number in heeded:
                loop.remove_signal_handler(number)


def require_linux(platform: str) -> None:
    """LocalError elsewhere: processes are found by /proc, pages and mounts are watched by inotify."""
    if not platform.startswith("linux"):
        raise LocalError(
            f"`esper run` needs Linux, this is {platform}: use WSL 2, a container or a Linux machine; "
            "all other commands work here, and so do runs on a cluster"
        )


@contextlib.asynccontextmanager
async def _session(state: StateDir, prepared: Prepared, options: Options) -> AsyncIterator[Runner]:
    with _scratch() as (scratch, shm):
        state.remember_scratch([scratch, shm])
        socket = scratch / "redis.sock"
        redis = {"socket": str(socket), "directory": str(scratch / "redis")} if options.redis else None
        guardian = Guardian(
            [scratch, shm],
            redis=redis,
            log=state.logs / "guard.log",
            on_redis=_Announcer(options.say),
        )
        url = f"unix://{socket}" if options.redis else ""
        layout = _layout(scratch, shm, state)
        # One Redis user for all: on a laptop the roles are processes of one user, who can open the socket anyway.
        settings = Settings(
            runtime_image="local",
            sidecar_image="local",
            fault_injection=True,
            key_seed=state.seed(),
            bus_url=url,
            layout=layout,
            http_ports_fixed=False,
            log_format="text",
        )
        async with guardian, contextlib.AsyncExitStack() as stack:
            oona = await stack.enter_async_context(Oona(OonaConfig(url=url))) if url else None
            wiring = _Wiring(state, prepared, options, settings, scratch, guardian, oona)
            try:
                async with wiring.tasks():
                    yield wiring.runner
            except ExceptionGroup as group:
                raise group.exceptions[0] from None  # the others, if any, are what it led to
            finally:
                await wiring.jobs.stop()


class _Announcer:
    """Says when Redis goes and when it is back; that it is there at first goes without saying."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._down = False

    def __call__(self, problem: str | None) -> None:
        if problem is not None:
            self._say(f"Redis: {problem}; training goes on, reports and halts take their other way")
        elif self._down:
            self._say("Redis: answers again")
        self._down = problem is not None


class _Wiring:
    """Connects the parts; `tasks()` keeps their background work alive."""

    def __init__(
        self,
        state: StateDir,
        prepared: Prepared,
        options: Options,
        settings: Settings,
        scratch: Path,
        guardian: Guardian,
        oona: Oona | None,
    ) -> None:
        metadata = prepared.resource["metadata"]
        self._uid: str = metadata["uid"]
        self._oona = oona
        self._guardian = guardian
        self._run_dir = Path(settings.layout.run)
        self._seen_entry = "0-0"
        self._entry_came = asyncio.Event()
        self.jobs = Jobs(
            Place(
                namespace=metadata["namespace"],
                layout=settings.layout,
                scratch=scratch,
                logs=state.logs,
                working_directory=Path.cwd(),
                objects=prepared.objects,
                own_claim=labels.claim_name(metadata["name"]),
            ),
            changed=self._pods_changed,
            on_pod=self._on_pod,
        )
        self._intake = Intake(
            seed=settings.key_seed,
            generation=settings.key_generation,
            monotonic=time.monotonic,
            on_report=lambda _key, _urgent: self.runner.wake(),
        )
        self._intake.observe(self._uid, RunKey(metadata["namespace"], metadata["name"]), (0, 0))
        signals = Signals(
            LocalApi(prepared.objects, changed=lambda: self.runner.refresh_pods()),  # type: ignore[arg-type]
            seed=settings.key_seed,
            generation=settings.key_generation,
            term=lambda: 0,
            now=lambda: datetime.now(UTC),
            monotonic=time.monotonic,
            publish=None if oona is None else oona.publish_signals,
            answered=self._intake.answered,
        )
        self.runner = Runner(
            Hands(
                state=state,
                objects=prepared.objects,
                jobs=self.jobs,
                intake=self._intake,
                signals=signals,
                settle=self._settle,
            ),
            settings,
            translate=_translator(prepared.objects, scratch),
            on_change=options.on_change,
            resume_uid=resume_uid(prepared.resource, state),
            stay_halted=options.stay_halted,
            say=options.say,
        )

    @contextlib.asynccontextmanager
    async def tasks(self) -> AsyncIterator[None]:
        async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
            puller = Puller(
                intake=self._intake,
                pods=self._pods,
                bus_connected=lambda: self._oona is not None and self._oona.connected,
                fetch=lambda ip, after, wait_s: self._fetch(session, ip, after, wait_s),
            )
            running = [group.create_task(puller.run())]
            if self._oona is not None:
                running.append(group.create_task(self._read(self._oona)))
            try:
                yield
            finally:
                for task in running:
                    task.cancel()

    def _pods(self) -> list[Pod]:
        return [pod for p in self.jobs.pods() if (pod := observe.pod(p.manifest())) is not None]

    async def _fetch(self, session: aiohttp.ClientSession, ip: str, after: int, wait_s: int) -> bytes:
        port = port_of(self._run_dir, labels.WEATHERLIGHT)
        if port is None:
            raise ConnectionRefusedError("weatherlight has no port yet")
        return await HttpFetch(session, port)(ip, after, wait_s)

    async def _read(self, oona: Oona) -> None:
        async for entry in oona.reports():
            self._seen_entry = entry.id
            self._entry_came.set()
            envelope = entry.envelope()
            if envelope is not None:
                self._intake.accept(envelope, way="bus")

    async def _settle(self) -> None:
        """Waits until everything that Redis has was taken in."""
        if self._oona is None or not self._oona.connected:
            return
        with contextlib.suppress(OonaUnavailable, TimeoutError):
            async with asyncio.timeout(SETTLE_S):
                newest = await self._oona.last(REPORTS)
                while newest is not None and _order(self._seen_entry) < _order(newest.id):
                    self._entry_came.clear()
                    await self._entry_came.wait()

    def _pods_changed(self) -> None:
        for pod in self.jobs.pods():
            self._guardian.follow(pod)
        self.runner.wake()

    def _on_pod(self, pod: LocalPod, begins: bool) -> None:
        if not begins:
            self._guardian.forget(pod)


def _order(entry_id: str) -> tuple[int, int]:
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number or 0)


@contextlib.contextmanager
def _scratch() -> Iterator[tuple[Path, Path]]:
    """Two directories that end with this process: one with a short path, one in memory where there is such a place."""
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    usable = 0 < len(base) <= _MAX_BASE and os.access(base, os.W_OK)
    try:
        scratch = Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX, dir=base if usable else "/tmp"))
    except OSError as error:
        raise LocalError(
            f"{error.filename}: {error.strerror}: sockets need a short path; set XDG_RUNTIME_DIR to a directory of "
            f"yours of at most {_MAX_BASE} characters"
        ) from error
    memory = Path("/dev/shm")
    shm = Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX, dir=memory)) if os.access(memory, os.W_OK) else scratch / "shm"
    try:
        yield scratch, shm
    finally:
        shutil.rmtree(shm, ignore_errors=True)
        shutil.rmtree(scratch, ignore_errors=True)


def _layout(scratch: Path, shm: Path, state: StateDir) -> PathLayout:
    return PathLayout(
        run=str(scratch / "run"),
        shm=str(shm),
        checkpoints=str(state.checkpoints),
        config=str(scratch / "config"),
        code=str(scratch / "code"),
        keys=str(scratch / "keys"),
        bus=str(scratch / "bus"),
        emergency=str(scratch / "emergency"),
        tmp=str(scratch / "tmp"),
        termination_log=str(scratch / "termination-log"),
    )


def _translator(objects: Objects, scratch: Path) -> Callable[[Resource], Resource]:
    """Replaces mount paths of the user's volumes in runtime.config by the directories that stand for them."""

    def translate(resource: Resource) -> Resource:
        spec = resource["spec"]
        volumes = spec.get("workers", {}).get("pod", {}).get("volumes", ())
        config = spec["runtime"].get("config")
        if not volumes or not config:
            return resource
        mounts = Mounts(tuple(Mount(v["mountPath"], _directory(v, objects, scratch)) for v in volumes))
        runtime = {**spec["runtime"], "config": mounts.translate_all(config)}
        return {**resource, "spec": {**spec, "runtime": runtime}}

    return translate


def _directory(volume: Resource, objects: Objects, scratch: Path) -> Path:
    if claim := volume.get("claimName"):
        return objects.claim(claim, own="") / str(volume.get("subPath", ""))
    return scratch / "volumes" / f"{DATA_PREFIX}{volume['name']}" / str(volume.get("subPath", ""))


async def _end_leftovers(run_uid: str, say: Callable[[str], None]) -> None:
    """Processes of a runner that was killed may still be saving; were its guard killed too, nobody has asked them to
    yet. Asks, waits for them, then kills."""
    living = marked(env.RUN_UID, run_uid)
    if not living:
        return
    say("processes of an earlier `esper run` are still ending; waiting for them")
    for pid in living:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    give_up = time.monotonic() + LEFTOVER_PATIENCE_S
    while marked(env.RUN_UID, run_uid):
        if time.monotonic() > give_up:
            kill_marked(env.RUN_UID, run_uid)
            return
        await asyncio.sleep(0.05)
