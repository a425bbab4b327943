"""Of the message fabric: as weatherlight sees it from a pod, and as the operator keeps it."""

from esper_leyline.metrics.model import Metric, MetricKind, each

_G, _C, _H = MetricKind.GAUGE, MetricKind.COUNTER, MetricKind.HISTOGRAM

PUBLISHED = Metric("oona.publish_total", _C, "1", "Messages that Redis has taken")
PUBLISH_LATENCY = Metric("oona.publish_latency_ms", _G, "ms", "Time of the last publication that Redis answered")
PUBLISH_DURATION = Metric(
    "oona.message_publish_duration_ms",
    _H,
    "ms",
    "Time of the publications that Redis answered",
    buckets=(0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 1000.0),
)

CONSERVATIVE = Metric(
    "oona.conservative_mode",
    _G,
    "bool",
    "1 while ordinary publications are held back: Redis failed several times in a row and did not answer since",
)

BREAKER_STATES = ("closed", "open", "half-open")
BREAKER = Metric(
    "oona.publish_breaker_state", _G, "state", "Of the breaker before Redis: 1 closed, 2 open, 3 half-open"
)
BREAKER_CHANGES = Metric(
    "oona.publish_breaker_changes_total",
    _C,
    "1",
    "Changes of that breaker, by its new state",
    ("to",),
    known=each(BREAKER_STATES),
)

OONA = (PUBLISHED, PUBLISH_LATENCY, PUBLISH_DURATION, CONSERVATIVE, BREAKER, BREAKER_CHANGES)

USER_CHANGES = ("made", "removed")

FABRIC = (
    Metric("oona.queue.depth", _G, "1", "Entries that the slowest group of a stream has still to do", ("stream",)),
    Metric("oona.stream_length", _G, "1", "Entries of a stream, done or not", ("stream",)),
    Metric(
        "oona.oldest_pending_age_s",
        _G,
        "s",
        "Age of the oldest entry that a group has taken and not acknowledged",
        ("stream", "group"),
    ),
    Metric("oona.trimmed_total", _C, "1", "Entries removed for their age, once every group had them", ("stream",)),
    Metric("oona.backpressure.level", _G, "1", "Pressure of a stream: 0, 0.5 (soft) or 1 (high)", ("stream",)),
    Metric("oona.dead_letters", _G, "1", "Messages that no consumer could handle and that wait for a person"),
    Metric("bus.users", _G, "1", "Runs with a user of their own in Redis"),
    Metric(
        "bus.user_changes_total",
        _C,
        "1",
        f"Users of runs by what was done: {', '.join(USER_CHANGES)}",
        ("change",),
        known=each(USER_CHANGES),
    ),
    Metric("bus.users_denied", _G, "bool", "1 while Redis lets the operator make no users: runs do without Redis"),
)
"""Of the operator that leads."""
