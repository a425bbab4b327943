"""Of a pod's containers, commands and emergency signals."""

from esper_runtime.nissa.expressions import grew, since
from esper_runtime.nissa.model import Alert, Group, Severity

_RUN = "{{ $labels.namespace }}/{{ $labels.run }}"
_REJECTIONS = "esper_kasmina_command_verifier_rejections_total"
_FORGED = "missing_signature|unknown_key_id|invalid_signature|nonce_replayed"
_FULL = "nonce_ledger_full"

_ALERTS = (
    Alert(
        name="KasminaAuthorityLost",
        expr='up{container="kasmina"} == 0',
        wait="1m",
        severity=Severity.CRITICAL,
        summary=f"Kasmina of {_RUN} cannot be asked",
        value="Its scrape has failed for a minute (up is {{ $value | humanize }}).",
        action="Read the log of container kasmina and the Events of the pod.",
        cause="The sidecar that verifies commands is gone. Training goes on, and no command takes effect.",
        panel="run/containers",
    ),
    Alert(
        name="EsperContainerDown",
        expr='up{container=~"tolaria|tamiyo|weatherlight"} == 0',
        wait="2m",
        severity=Severity.WARNING,
        summary=f"Container {{{{ $labels.container }}}} of {_RUN} cannot be asked",
        value="Its scrape has failed for two minutes (up is {{ $value | humanize }}).",
        action="Read its log and the Events of the pod; a NetworkPolicy may keep Prometheus out.",
        cause="The container is gone or hangs, or its port cannot be reached.",
        panel="run/containers",
    ),
    Alert(
        name="KasminaCommandRejected",
        expr=grew(f'{_REJECTIONS}{{reason!~"{_FORGED}|{_FULL}"}}', "5m"),
        severity=Severity.WARNING,
        summary=f"Kasmina of {_RUN} refuses commands: {{{{ $labels.reason }}}}",
        value="{{ $value | humanize }} within five minutes.",
        action="stale_command: Tamiyo is slow. unknown_packet: Kasmina was restarted. malformed: images differ.",
        cause="Commands with a good signature that must not act: too old, of another run, or not understood.",
        panel="run/commands",
    ),
    Alert(
        name="KasminaCommandForged",
        expr=grew(f'{_REJECTIONS}{{reason=~"{_FORGED}"}}', "5m"),
        severity=Severity.CRITICAL,
        summary=f"Somebody sends forged or repeated commands to {_RUN}",
        value="{{ $value | humanize }} with {{ $labels.reason }} within five minutes.",
        action="Find out who else can write to the pod's socket directory; compare the keys of the Secret.",
        cause="A command without a good signature, or one that was used before. It did not act.",
        panel="run/commands",
    ),
    Alert(
        name="KasminaNonceLedgerFull",
        expr=grew(f'{_REJECTIONS}{{reason="{_FULL}"}}', "5m"),
        severity=Severity.CRITICAL,
        summary=f"Kasmina of {_RUN} cannot remember more commands",
        value="{{ $value | humanize }} were refused within five minutes.",
        action="Nothing sends so many by itself: look for a loop, or for somebody else.",
        cause=(
            "More commands came within one freshness window than the ledger of nonces holds. It refuses rather than "
            "forgets, so nothing can be replayed."
        ),
        panel="run/commands",
    ),
    Alert(
        name="TamiyoPacketsRefused",
        expr=grew("esper_tamiyo_refused_packets_total", "10m"),
        severity=Severity.WARNING,
        summary=f"Tamiyo of {_RUN} refuses state packets",
        value="{{ $value | humanize }} within ten minutes.",
        action="Use runtime and sidecar images of the same release.",
        cause="Tolaria sent a packet of another version or another run.",
        panel="run/decisions",
    ),
    Alert(
        name="WeatherlightDegraded",
        expr="esper_weatherlight_degraded == 1",
        wait="2m",
        severity=Severity.WARNING,
        summary=f"{{{{ $labels.component }}}} of {_RUN} does not work",
        value="Degraded is {{ $value | humanize }} for two minutes.",
        action=(
            "oona: is Redis there, is it the primary, and may its user do what it has to? emergency: is the ConfigMap "
            "mounted? tolaria-page, journal: is /run/esper full? weatherlight: a worker of it fails, its log says why."
        ),
        cause="A way of reporting or of being stopped is down, or was within five minutes. The other way still works.",
        panel="run/degraded",
    ),
    Alert(
        name="WeatherlightEmergencyHalt",
        expr="esper_weatherlight_emergency_mode > 0",
        severity=Severity.CRITICAL,
        summary=f"{_RUN} is ordered to stop",
        value="The order is {{ $value | humanize }} (1 freeze, 2 checkpoint, 3 kill).",
        action="Somebody set `emergencyStop` or a broadcast: ask before clearing it.",
        cause="An emergency signal of the operator is in force in this pod.",
        panel="run/halts",
    ),
    Alert(
        name="WeatherlightRestarts",
        expr=f"{since('esper_weatherlight_restarts_total', '15m')} >= 3",
        severity=Severity.WARNING,
        summary=f"Weatherlight of {_RUN} dies again and again",
        value="{{ $value | humanize }} times within fifteen minutes.",
        action="Read the log of container weatherlight.",
        cause="The worker ends with an error and is started again by its PID 1. Nothing it had reported is lost.",
        panel="run/worker-restarts",
    ),
    Alert(
        name="WeatherlightSignalsRejected",
        expr=grew('esper_weatherlight_signals_rejected_total{reason!="wrong_attempt"}', "10m"),
        severity=Severity.CRITICAL,
        summary=f"Somebody sends wrong emergency signals to {_RUN}",
        value="{{ $value | humanize }} with {{ $labels.reason }} within ten minutes.",
        action="Find out who else can write to Redis or to the ConfigMap <run>-emergency; check the seed Secret.",
        cause="A signal that is forged, repeated or of another run. It did not act.",
        panel="run/signals",
    ),
    Alert(
        name="WeatherlightJournalDamaged",
        expr=grew("esper_weatherlight_journal_skipped_bytes_total", "15m"),
        severity=Severity.WARNING,
        summary=f"The journal of {_RUN} has bytes that are no events",
        value="{{ $value | humanize }} bytes were skipped within fifteen minutes.",
        action="/run/esper may be full: raise its size, or look for what fills it.",
        cause="An event was torn while it was written. What is before and behind it is read.",
        panel="run/reports",
    ),
)

SIDECARS = Group(name="esper-sidecars", interval="15s", alerts=_ALERTS)
