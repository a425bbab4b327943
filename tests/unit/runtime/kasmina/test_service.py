"""What Kasmina counts about commands and its ledger, and that a halted run lets none through."""

from typing import Any

import pytest
from esper_leyline.reasons import CommandRejection
from esper_leyline.v1.command_pb2 import CommandVerdict, OpenBoundaryRequest, SignedCommand
from esper_runtime.kasmina.service import KasminaService, Metrics
from esper_runtime.kasmina.verifier import FRESHNESS_WINDOW_NS, MAX_NONCES
from prometheus_client import CollectorRegistry

from tests.unit.runtime.kasmina.test_verifier import RUN, Bench, signed

CONTEXT: Any = None


class Service:
    def __init__(self, **options: int) -> None:
        self.bench, self.registry = Bench(**options), CollectorRegistry()
        self.service = KasminaService(self.bench.verifier, Metrics(self.registry))

    async def open(self) -> str:
        answer = await self.service.OpenBoundary(OpenBoundaryRequest(run_uid=RUN), CONTEXT)
        return answer.packet_id

    async def submit(self, command: SignedCommand) -> CommandVerdict:
        return await self.service.SubmitCommand(command, CONTEXT)

    def value(self, name: str, **labels: str) -> float:
        found = self.registry.get_sample_value(f"esper_kasmina_{name}", labels)
        assert found is not None, name
        return found

    def refusals(self) -> dict[str, float]:
        name = "command_verifier_rejections_total"
        found = {str(reason): self.value(name, reason=str(reason)) for reason in CommandRejection}
        return {reason: count for reason, count in found.items() if count}


@pytest.mark.row("K28")
async def test_every_verdict_is_counted_by_reason_and_timed() -> None:
    service = Service()
    packet = await service.open()
    good, forged = signed(packet), signed(packet, command_id="c-2")
    forged.security.signature = bytes(64)
    answers = [await service.submit(one) for one in (good, good, forged, SignedCommand(), signed("p", command_id="c"))]
    assert [answer.accepted for answer in answers] == [True, False, False, False, False]
    assert service.value("command_verifier_accepted_total") == 1
    assert service.refusals() == {
        "nonce_replayed": 1, "invalid_signature": 1, "missing_signature": 1, "unknown_packet": 1,
    }  # fmt: skip
    assert service.value("command_verifier_validation_seconds_count") == 5
    assert service.value("command_verifier_validation_seconds_sum") > 0
    assert service.value("command_verifier_validation_latency_ms") > 0


@pytest.mark.row("K28")
async def test_a_halted_run_lets_no_command_through_and_counts_them() -> None:
    service = Service()
    packet = await service.open()
    service.service.halt(True)
    assert (await service.submit(signed(packet))).reason == "halted"
    service.service.halt(False)
    assert (await service.submit(signed(packet))).accepted
    assert service.refusals() == {"halted": 1}


@pytest.mark.row("K29")
async def test_the_ledger_is_full_at_its_cap_refuses_the_new_and_forgets_nothing_fresh() -> None:
    service = Service()
    packet = await service.open()
    commands = [signed(packet, command_id=f"c-{n}") for n in range(MAX_NONCES // 2 + 10)]
    reasons = [(await service.submit(one)).reason for one in commands]
    assert reasons == [""] * (MAX_NONCES // 2) + ["nonce_ledger_full"] * 10
    assert service.value("nonce_ledger_size") == MAX_NONCES
    for one in (commands[0], commands[MAX_NONCES // 2 - 1]):
        assert (await service.submit(one)).reason == "nonce_replayed"
    assert service.value("nonce_ledger_evictions_total") == 0
    assert service.refusals() == {"nonce_ledger_full": 10, "nonce_replayed": 2}


@pytest.mark.row("K29")
async def test_an_idle_ledger_empties_when_its_windows_are_over_and_counts_what_went() -> None:
    service = Service()
    packet = await service.open()
    spent = [signed(packet, command_id=f"c-{n}") for n in range(5)]
    for one in spent:
        assert (await service.submit(one)).accepted
    assert (service.value("nonce_ledger_size"), service.value("nonce_ledger_evictions_total")) == (10, 0)
    assert service.value("nonce_ledger_ttl_seconds") == FRESHNESS_WINDOW_NS / 1e9
    service.bench.clock.now_ns += FRESHNESS_WINDOW_NS + 1
    await service.open()  # no command, and the ledger is kept all the same
    assert (service.value("nonce_ledger_size"), service.value("nonce_ledger_evictions_total")) == (0, 10)
    for one in spent:  # forgotten, and of use to nobody
        assert (await service.submit(one)).reason == "stale_command"
