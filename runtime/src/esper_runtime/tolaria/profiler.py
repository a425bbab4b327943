"""Chrome traces of a few steps, for chrome://tracing or Perfetto. Without `profiler` in run.json nothing here exists.

torch.profiler records a window of steps; a thread turns what it recorded into a file in the run's directory on the
checkpoint volume. Whatever fails, training goes on with the next step: a step is never run for a trace, and never run
again because of one.
"""

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from esper_leyline.reasons import RunReason
from esper_leyline.runconfig import Profiler as Window
from torch import nn
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from esper_runtime.tolaria.metrics import Metrics
from esper_runtime.tolaria.stability import Stability
from esper_runtime.tolaria.state import TrainState
from esper_runtime.tolaria.step import Step, StepResult
from esper_runtime.tolaria.telemetry import Events
from esper_runtime.workload import Batch

DIRECTORY = "profiles"
MAX_TRACES = 32
MAX_BYTES = 256 * 1024 * 1024
"""Of all traces of a run together, compressed; the oldest go first."""
CLOSE_S = 3.0
_FAILURES = (RuntimeError, OSError, ValueError, AssertionError)
log = logging.getLogger(__name__)

Place = tuple[Any, str, str]
"""(object, name of its method, range): what is seen as tolaria/<range> in a trace."""


def is_wanted(window: Window, step: int) -> bool:
    """Whether this step belongs into a trace: `repeat` windows, their beginnings `every_steps` apart."""
    period = max(window.every_steps, window.active_steps)
    cycle, offset = divmod(step - window.first_step, period)
    return 0 <= cycle < window.repeat and offset < window.active_steps


class Recording(Protocol):
    """torch.profiler.profile, as far as it is used."""

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def export_chrome_trace(self, path: str) -> None: ...


def record() -> Recording:
    """A new recording of all devices."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    return profile(activities=activities)


class Profiler(Step):
    """A Step with windows in which it is recorded. Outside of them it costs a comparison."""

    def __init__(
        self,
        step: Step,
        window: Window,
        *,
        places: Sequence[Place],
        model: nn.Module | None,
        writer: "TraceWriter",
        events: Events,
        metrics: Metrics,
        stability: Stability,
        new_recording: Callable[[], Recording] = record,
    ) -> None:
        """`model`: whose calls are the range forward; None where hooks would disturb a compiler."""
        self._step = step
        self._window = window
        self._places = places
        self._model = model
        self._writer = writer
        self._events = events
        self._metrics = metrics
        self._stability = stability
        self._new_recording = new_recording
        self._recording: Recording | None = None
        self._first = self._last = 0
        self._undo: list[Callable[[], None]] = []
        metrics.set("tolaria.profiler.enabled", 0)

    def run(self, batch: Batch, state: TrainState) -> StepResult:
        step = state.step + 1
        wanted = is_wanted(self._window, step) and not self._stability.conservative
        if wanted != (self._recording is not None):
            if wanted:
                self._begin(step)
            else:
                self._end()
        self._last = step
        self._tell()
        return self._step.run(batch, state)

    def close(self) -> None:
        self._end()
        self._writer.close(CLOSE_S)
        self._tell()

    # One window

    def _begin(self, step: int) -> None:
        try:
            recording = self._new_recording()
            recording.start()
        except _FAILURES as error:
            self._failed(f"steps from {step} are not recorded: {error}")
            return
        self._recording, self._first = recording, step
        self._metrics.set("tolaria.profiler.enabled", 1)
        for owner, name, label in self._places:
            self._cover(owner, name, label)
        if self._model is not None:
            self._cover_calls(self._model)

    def _end(self) -> None:
        recording, self._recording = self._recording, None
        last = self._last
        while self._undo:
            self._undo.pop()()
        if recording is None:
            return
        self._metrics.set("tolaria.profiler.enabled", 0)
        try:
            recording.stop()
        except _FAILURES as error:
            self._failed(f"steps {self._first} to {last}: {error}")
            return
        if not self._writer.submit(recording, f"steps-{self._first:08d}-{last:08d}"):
            self._failed(f"steps {self._first} to {last}: earlier traces are still being written")

    def _cover(self, owner: Any, name: str, label: str) -> None:
        own = vars(owner).get(name)
        method = getattr(owner, name)

        def covered(*arguments: Any, **options: Any) -> Any:
            with record_function(f"tolaria/{label}"):
                return method(*arguments, **options)

        setattr(owner, name, covered)
        self._undo.append(lambda: delattr(owner, name) if own is None else setattr(owner, name, own))

    def _cover_calls(self, model: nn.Module) -> None:
        open_ranges: list[Any] = []

        def before(*_: Any) -> None:
            open_ranges.append(record_function("tolaria/forward"))
            open_ranges[-1].__enter__()

        def after(*_: Any) -> None:
            open_ranges.pop().__exit__(None, None, None)

        self._undo.append(model.register_forward_pre_hook(before).remove)
        self._undo.append(model.register_forward_hook(after, always_call=True).remove)

    # Telling

    def _tell(self) -> None:
        for path, error in self._writer.outcomes():
            if error:
                self._failed(f"{path.name}: {error}")
            else:
                self._metrics.add("tolaria.profiler.traces_emitted_total")
                self._events.notice(RunReason.PROFILER_TRACE, f"trace written: {DIRECTORY}/{path.name}")

    def _failed(self, why: str) -> None:
        self._metrics.add("tolaria.profiler.traces_failed_total")
        self._events.notice(RunReason.PROFILER_FAILED, f"no trace, training goes on: {why}", warning=True)
        log.warning("no trace: %s", why)


def profiled(
    step: Step,
    window: Window,
    *,
    directory: Path,
    state: TrainState,
    parts: Sequence[Place],
    hooks: bool,
    events: Events,
    metrics: Metrics,
    stability: Stability,
) -> Profiler:
    """`step` under a profiler; `parts` are ranges outside of it. Without `hooks` the range forward is missing."""
    inside = ((step, "_loss", "loss"), (step, "_backward", "backward"), (state.update, "apply", "optimizer_step"))
    return Profiler(
        step,
        window,
        places=(*inside, *parts),
        model=state.model if hooks else None,
        writer=TraceWriter(directory),
        events=events,
        metrics=metrics,
        stability=stability,
    )


class TraceWriter:
    """Writes traces from a thread of its own, and keeps their number and size within bounds."""

    def __init__(self, directory: Path, *, max_traces: int = MAX_TRACES, max_bytes: int = MAX_BYTES) -> None:
        self._directory = directory
        self._max_traces = max_traces
        self._max_bytes = max_bytes
        self._jobs: queue.Queue[tuple[Recording, Path] | None] = queue.Queue(maxsize=2)
        self._outcomes: queue.Queue[tuple[Path, str]] = queue.Queue(maxsize=8)
        self._thread: threading.Thread | None = None

    def submit(self, recording: Recording, name: str) -> bool:
        """False when two are waiting already. Nothing is waited for."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="esper-profiler", daemon=True)
            self._thread.start()
        try:
            self._jobs.put_nowait((recording, self._directory / f"{name}.json.gz"))
        except queue.Full:
            return False
        return True

    def outcomes(self) -> list[tuple[Path, str]]:
        """(file, error or nothing) of those that were done since the last call."""
        found = []
        while not self._outcomes.empty():
            found.append(self._outcomes.get_nowait())
        return found

    def close(self, timeout_s: float) -> None:
        """Waits for what was submitted, at most so long; what is not written by then is lost."""
        if self._thread is not None:
            try:
                self._jobs.put(None, timeout=timeout_s)
            except queue.Full:
                log.warning("traces are still being written; the last ones are lost")
                return
            self._thread.join(timeout_s)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            recording, path = job
            try:
                self._write(recording, path)
                self._outcomes.put((path, ""))
            except _FAILURES as error:
                self._outcomes.put((path, str(error) or type(error).__name__))

    def _write(self, recording: Recording, path: Path) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}")  # ends in .gz, by which torch knows to compress
        try:
            recording.export_chrome_trace(str(draft))
            size = draft.stat().st_size
            if size > self._max_bytes:
                raise ValueError(f"{size} bytes, and all traces of a run may have {self._max_bytes}: trace fewer steps")
            self._make_room(size)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        held = sorted(self._directory.glob("*.json.gz"), key=lambda path: path.stat().st_mtime_ns)
        held = [path for path in held if not path.name.startswith(".")]
        total = sum(path.stat().st_size for path in held)
        while held and (len(held) >= self._max_traces or total + size > self._max_bytes):
            oldest = held.pop(0)
            total -= oldest.stat().st_size
            oldest.unlink()
