"""When a silent trainer counts as hung. Pure: told the time, never asking for it.

Three limits. Beats without a new step: health.progressTimeoutSeconds. Silence: health.heartbeatTimeoutSeconds, and
while steps are made, long before that, three times as long as a step takes (p99) and a second, or twice the longest
silence that was survived. The last one needs evidence: a trainer that works, waits for a disk or for a processor gets
ten times as long, because a slow step is no hang. Every hang found by it doubles it for the rest of the container's
life, so that a workload that it misjudges is not killed again and again.

Time counts only while the supervisor itself was watching. Should the whole container have been frozen, the trainer
gets its full limit again afterwards.
"""

import math
from collections import deque
from dataclasses import dataclass, field

from esper_leyline.pages import Heartbeat
from esper_leyline.v1 import report_pb2 as pb

MAX_STRIDE_S = 2.5
"""The most that one look can add: a longer gap means that the watcher was not running either."""
LOOK_S = 0.25
"""How often a trainer that makes steps is looked at."""
LEARNING_LOOK_S = 0.05
"""And how often before it is known how long a step takes: of short epochs many looks fall into validation."""
LEAST_LOOK_S = 0.01
MAX_ALERT_STRIDE_S = 2 * LOOK_S
"""The same as MAX_STRIDE_S for the short limit, under which a starved watcher must not kill a starved trainer."""
LEAST_STEPS = 50
"""Steps of this very trainer, warm-up and compilation among them, before their times say anything."""
LEAST_SAMPLES = 8
SAMPLES = 512
P99_FACTOR = 3.0
SLACK_S = 0.9
"""Of the second above three p99; the rest is for waking up and for looking at /proc."""
LONGEST_FACTOR = 2.0
WORKING_FACTOR = 10.0
"""How much longer a trainer may be silent that shows signs of work."""
WORKING_SHARE = 0.05
"""Of one processor: less is what idle threads use."""
WORKING_BYTES = 4096
DOUBT_SHARE = 0.25
"""Of the short limit: after this silence evidence is gathered."""
SPAN_SHARE = 0.15
"""Of the short limit: how long a time evidence must cover."""
MAX_PATIENCE = 1024.0
_NOT_JUDGED = frozenset(
    {
        pb.RUNTIME_PHASE_UNSPECIFIED,
        pb.RUNTIME_PHASE_STARTING,
        pb.RUNTIME_PHASE_FROZEN,
        pb.RUNTIME_PHASE_HALTING,
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class HangLimits:
    heartbeat_s: float
    progress_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Pulse:
    """What the kernel tells about a trainer and all it started."""

    cpu_s: float
    io_bytes: int
    wants: bool
    """A thread runs, waits for a processor or a disk, or is held by a debugger."""


class StepTimes:
    """How long steps take, by looks at the heartbeat page: at most SAMPLES numbers, whatever is seen.

    A look that finds several new steps knows their mean alone; what that hides is shorter than the look's own stride.
    """

    def __init__(self) -> None:
        self._samples: deque[float] = deque(maxlen=SAMPLES)
        self.longest_s = 0.0
        """Longest time without a step that was followed by one. Never forgotten."""

    def __len__(self) -> int:
        return len(self._samples)

    def add(self, steps: int, seconds: float, *, stalled: bool) -> None:
        """`stalled`: a look in between found no new step, so all the time may have been one step's."""
        longest_s = seconds if stalled or steps == 1 else seconds / steps
        self._samples.append(longest_s)
        self.longest_s = max(self.longest_s, longest_s)

    @property
    def p99_s(self) -> float:
        ordered = sorted(self._samples)
        return ordered[math.ceil(0.99 * len(ordered)) - 1]


@dataclass(slots=True)
class _Seen:
    """The newest step that was looked at while training ran."""

    step: int
    beat_ns: int
    stalled: bool = False


@dataclass(slots=True)
class _Doubt:
    """A silence that may be a hang: the first sample of it, to which the next ones are compared."""

    pulse: Pulse | None = None
    at_s: float = 0.0
    """In watched seconds of the silence."""


@dataclass(kw_only=True)
class HangWatch:
    """Watches the heartbeats of one trainer process, from its start to its end."""

    limits: HangLimits
    now_s: float
    times: StepTimes = field(default_factory=StepTimes)
    """Of this container's trainers so far: the next one does the same work."""
    patience: float = 1.0
    silent_s: float = 0.0
    """Watched seconds since the newest beat."""

    def __post_init__(self) -> None:
        self._looked_s = self.now_s
        self._beat_ns: int | None = None
        self._step: int | None = None
        self._stuck_s = 0.0
        self._alert_s = 0.0
        self._steps = 0
        self._seen: _Seen | None = None
        self._doubt: _Doubt | None = None
        self._found_early = False
        self._training = False
        """At the last look; validation is part of it."""

    def successor(self, *, now_s: float) -> "HangWatch":
        """For the next trainer of this container."""
        patience = min(self.patience * 2, MAX_PATIENCE) if self._found_early else self.patience
        return HangWatch(limits=self.limits, now_s=now_s, times=self.times, patience=patience)

    @property
    def limit_s(self) -> float:
        """The short limit on silence; infinite while step times say nothing."""
        if self._steps < LEAST_STEPS or len(self.times) < LEAST_SAMPLES:
            return math.inf
        least_s = max(P99_FACTOR * self.times.p99_s + SLACK_S, LONGEST_FACTOR * self.times.longest_s)
        return least_s * self.patience

    @property
    def doubts(self) -> bool:
        """The next look wants a Pulse."""
        return self._doubt is not None

    @property
    def look_at_s(self) -> float:
        """When to look again at the latest, for the sake of the short limit; infinite while nothing trains."""
        if not self._training:
            return math.inf
        due_s = self.limit_s - self._alert_s
        if due_s == math.inf:
            return self._looked_s + LEARNING_LOOK_S
        return self._looked_s + (min(LOOK_S, max(due_s, LEAST_LOOK_S)) if due_s > 0 else LOOK_S)

    def look(self, beat: Heartbeat | None, *, now_s: float, pulse: Pulse | None = None) -> str:
        """Why the trainer counts as hung, or nothing. `beat` is its newest; None before its first."""
        passed_s = max(0.0, now_s - self._looked_s)
        stride_s = min(passed_s, MAX_STRIDE_S)
        self._looked_s = now_s
        if beat is None:
            return ""
        fresh = beat.beat_ns != self._beat_ns
        self._beat_ns = beat.beat_ns
        self._training = beat.phase == pb.RUNTIME_PHASE_RUNNING
        if beat.phase in _NOT_JUDGED:
            self.silent_s = self._stuck_s = self._alert_s = 0.0
            self._step = self._seen = self._doubt = None
            return ""
        self.silent_s = 0.0 if fresh else self.silent_s + stride_s
        moving = beat.step != self._step or beat.phase != pb.RUNTIME_PHASE_RUNNING or beat.validating
        self._stuck_s = 0.0 if moving else self._stuck_s + stride_s
        self._step = beat.step
        if self.silent_s > self.limits.heartbeat_s:
            limit_s = self.limits.heartbeat_s
            return f"no heartbeat for {limit_s:g} s (health.heartbeatTimeoutSeconds) at step {beat.step}"
        if self._stuck_s > self.limits.progress_s:
            limit_s = self.limits.progress_s
            return f"no new step for {limit_s:g} s (health.progressTimeoutSeconds) after step {beat.step}"
        return self._early(beat, fresh=fresh, passed_s=passed_s, pulse=pulse)

    def _early(self, beat: Heartbeat, *, fresh: bool, passed_s: float, pulse: Pulse | None) -> str:
        """The short limit: only while steps are made, and only with evidence."""
        if beat.phase != pb.RUNTIME_PHASE_RUNNING or beat.validating:
            self._seen = self._doubt = None
            self._alert_s = 0.0
            return ""
        self._learn(beat)
        if fresh:
            since_beat_s = max(0.0, self._looked_s - beat.beat_ns / 1e9)
            self._alert_s = min(since_beat_s, passed_s, MAX_ALERT_STRIDE_S)
            self._doubt = None
            return ""
        self._alert_s += min(passed_s, MAX_ALERT_STRIDE_S)
        limit_s = self.limit_s
        if self._doubt is None:
            if self._alert_s >= limit_s * DOUBT_SHARE:
                self._doubt = _Doubt()
            return ""
        return self._decide(self._doubt, pulse, limit_s, beat.step)

    def _learn(self, beat: Heartbeat) -> None:
        seen = self._seen
        if seen is not None and beat.step == seen.step:
            seen.stalled = True
            return
        if seen is not None and beat.step > seen.step and beat.beat_ns > seen.beat_ns:
            steps = beat.step - seen.step
            self._steps += steps
            self.times.add(steps, (beat.beat_ns - seen.beat_ns) / 1e9, stalled=seen.stalled)
        self._seen = _Seen(beat.step, beat.beat_ns)

    def _decide(self, doubt: _Doubt, pulse: Pulse | None, limit_s: float, step: int) -> str:
        if doubt.pulse is None:
            doubt.pulse, doubt.at_s = pulse, self._alert_s
            return ""
        span_s = self._alert_s - doubt.at_s
        if self._alert_s < limit_s or span_s < limit_s * SPAN_SHARE:
            return ""
        working = pulse is None or _worked(doubt.pulse, pulse, span_s)
        if working and self._alert_s < WORKING_FACTOR * limit_s:
            doubt.pulse, doubt.at_s = pulse, self._alert_s
            return ""
        self._found_early = True
        how = "though it works" if working else "and no sign of work"
        p99_s = self.times.p99_s
        return f"no new step for {self._alert_s:.2f} s {how} after step {step}; a step takes {p99_s:.3f} s (p99)"


def _worked(before: Pulse, after: Pulse, seconds: float) -> bool:
    used = after.cpu_s - before.cpu_s
    moved = after.io_bytes - before.io_bytes
    # A child that ended takes its share along: less than before is no proof of idleness.
    return after.wants or not 0.0 <= used <= WORKING_SHARE * seconds or not 0 <= moved <= WORKING_BYTES
