"""TCP ports of the containers."""

WEATHERLIGHT_HTTP = 9401
"""/livez, /readyz, /metrics and /v1/reports."""
KASMINA_HTTP = 9402
TAMIYO_HTTP = 9403
TOLARIA_HTTP = 9404
"""/livez and /metrics of the supervisor."""
NISSA_HTTP = 9405
"""Of the export of run events."""
RENDEZVOUS = 29500
OPERATOR_HTTP = 8080
REDIS = 6379

REPORTS_PATH = "/v1/reports"
"""GET ?after=<seq>&wait=<seconds, at most 30> -> ReportBatch (application/x-protobuf)."""
