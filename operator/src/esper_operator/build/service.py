"""The headless Service of a run: stable names of its pods, also before they are ready."""

from esper_leyline import labels, ports

from esper_operator.build import names
from esper_operator.model import Child, Run


def service(run: Run) -> Child:
    spec = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": {labels.RUN_UID: run.uid},
        "ports": [
            {"name": "rendezvous", "port": ports.RENDEZVOUS, "targetPort": ports.RENDEZVOUS, "protocol": "TCP"},
            {
                "name": labels.WEATHERLIGHT,
                "port": ports.WEATHERLIGHT_HTTP,
                "targetPort": ports.WEATHERLIGHT_HTTP,
                "protocol": "TCP",
            },
        ],
    }
    return Child(manifest=names.child(run, "v1", "Service", labels.service_name(run.key.name), spec=spec))
