"""Nissa's way out: events of runs, from the message bus to a receiver of OpenTelemetry logs, at least once.

Optional, beside everything else: nothing waits for it, and without it nothing is missing but the receiver's copy. It
needs the extra `otel` and runs as `esper nissa export` or `python -m esper_runtime.otlp`.
"""
