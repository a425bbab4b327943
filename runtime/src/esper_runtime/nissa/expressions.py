"""Idioms of PromQL that rules and panels share."""


def grew(series: str, window: str) -> str:
    """Whether a counter rose within the window, the first time included: a trainer's counter appears with its first
    event, and increase() sees nothing in a series that begins at 1."""
    return f"increase({series}[{window}]) > 0 or ({series} unless {series} offset {window}) > 0"


def since(series: str, window: str) -> str:
    """How much a counter rose within the window; one that was not there before began at 0."""
    return f"({series} - ({series} offset {window} or 0 * {series}))"


def or_zero(series: str, always: str) -> str:
    """A counter of the trainer, 0 before its first event. `always` is a series of the same target that is there."""
    return f"({series} or 0 * {always})"


def quantile(q: float, histogram: str, by: str, window: str = "$__rate_interval", matchers: str = "") -> str:
    """Of a histogram, by labels."""
    within = f"{{{matchers}}}" if matchers else ""
    return f"histogram_quantile({q:g}, sum by ({by}, le) (rate({histogram}_bucket{within}[{window}])))"
