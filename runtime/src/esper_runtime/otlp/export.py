"""From the bus to the receiver: one consumer per stream of telemetry, in the group `nissa`, each message once by its
nonce.

Nothing here has keys of runs, so signatures are not checked: what the receiver gets is as good as the bus. Whoever can
write to Redis can make it say anything, and nothing acts upon it.
"""

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Final

import aiohttp
from esper_leyline import contracts, env
from esper_leyline.oona import (
    EMERGENCY,
    TELEMETRY,
    Consumer,
    ConsumerOptions,
    Delivery,
    Oona,
    OonaConfig,
    Rejected,
)
from esper_leyline.oona.acl import NISSA
from esper_leyline.v1.bus_pb2 import BusEnvelope, DeadLetterReason
from esper_leyline.v1.common_pb2 import BUS_MESSAGE_TYPE_TELEMETRY
from esper_leyline.v1.telemetry_pb2 import TelemetryPacket
from google.protobuf.message import DecodeError
from prometheus_client import CollectorRegistry

from esper_runtime.otlp.message import Item
from esper_runtime.otlp.metrics import Metrics
from esper_runtime.otlp.sender import Refused, Sender
from esper_runtime.sidecar.environment import Environment
from esper_runtime.sidecar.http import ProbeServer
from esper_runtime.sidecar.worker import until_stopped

STREAMS: Final = (EMERGENCY, TELEMETRY)
CONSUMING: Final = ConsumerOptions(
    once=True,
    concurrency=256,
    # Longer than a request to the receiver and its turn may take; then another process claims it.
    handler_timeout_s=60.0,
    claim_idle_s=120.0,
    # A receiver that is away is waited for. What it refuses is given up at once, and otherwise nothing is.
    max_attempts=100_000,
    remember_s=3600.0,
)
_LOOK_S: Final = 0.5

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Where from, where to, and as whom."""

    bus: OonaConfig
    otlp: str
    """Address of the receiver's logs."""
    name: str
    """Of this process among those that share the work; the same after its restart."""
    port: int
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    """For the receiver, such as a token."""


async def serve(options: Options, stop: asyncio.Event) -> None:
    """Until `stop`. What is in hand then stays pending in Redis, for the next start."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    async with (
        Oona(options.bus) as oona,
        aiohttp.ClientSession(headers=options.headers, trust_env=True) as session,
        ProbeServer(
            NISSA,
            Environment({env.HTTP_PORT: str(options.port)}),
            ready=lambda: "" if oona.connected else "Redis does not answer",
            registry=registry,
        ),
    ):
        sender = Sender(session, options.otlp, metrics)
        desk = Desk(sender, metrics)
        consumers = [
            Consumer(oona, stream, group=NISSA, name=options.name, handler=desk.handle, judge=judge, options=CONSUMING)
            for stream in STREAMS
        ]
        log.info("events are sent to %s as they come", options.otlp)
        await until_stopped(stop, sender.run(), _watch(oona, metrics), *(consumer.run() for consumer in consumers))


class Desk:
    """What is done with one delivery."""

    def __init__(self, sender: Sender, metrics: Metrics) -> None:
        self._sender = sender
        self._metrics = metrics

    async def handle(self, delivery: Delivery) -> None:
        """RetryLater and Rejected are the consumer's to deal with."""
        if delivery.envelope.message_type != BUS_MESSAGE_TYPE_TELEMETRY:
            return  # an emergency signal; its acknowledgements are events of the run
        item = Item(delivery.envelope, TelemetryPacket.FromString(delivery.envelope.payload))
        if delivery.attempt == 1:
            self._metrics.read(item)
        if not item.packet.events:
            return
        try:
            await self._sender.send(item)
        except Refused as refusal:
            self._metrics.became("refused")
            raise Rejected(DeadLetterReason.DEAD_LETTER_REASON_HANDLER_FAILED, str(refusal)) from refusal
        self._metrics.became("exported")


def judge(envelope: BusEnvelope) -> None:
    """Rejected for telemetry that does not keep its contract."""
    if envelope.message_type != BUS_MESSAGE_TYPE_TELEMETRY:
        return
    try:
        packet = TelemetryPacket.FromString(envelope.payload)
    except DecodeError as error:
        raise Rejected(DeadLetterReason.DEAD_LETTER_REASON_UNDECODABLE, "no TelemetryPacket") from error
    try:
        contracts.check(packet)
    except contracts.ContractError as error:
        raise Rejected(DeadLetterReason.DEAD_LETTER_REASON_INVALID, str(error)) from error


async def _watch(oona: Oona, metrics: Metrics) -> None:
    while True:
        metrics.redis.set(int(oona.connected))
        await asyncio.sleep(_LOOK_S)
