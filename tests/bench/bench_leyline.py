"""T33: what messages cost: bytes, and microseconds to serialize, parse and check, against the budgets of the design.

.venv/bin/python tests/bench/bench_leyline.py [--rounds 200]

Every round times a hundred calls; a value is microseconds per call.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from esper_leyline import contracts
from esper_leyline.signing import Role, SigningKey, Verifier, seal
from esper_leyline.v1.common_pb2 import BUS_MESSAGE_TYPE_TELEMETRY
from google.protobuf.message import Message

from tests.bench.common import machine, row, section
from tests.unit.leyline.test_contracts import command, field_report, packet, signal

CALLS = 100
CASES: tuple[tuple[str, Message, int, float], ...] = (
    ("state packet, no seeds", packet(0), 280, 80.0),
    ("state packet, 2 seeds", packet(2), 280, 80.0),
    ("state packet, 100 seeds", packet(100), 4200, 80.0),
    ("command", command(), 280, 40.0),
    ("emergency signal", signal(), 280, 40.0),
    ("field report", field_report(), 280, 120.0),
)
"""Name, message, most bytes, most microseconds to serialize."""
CHECK_US = 20.0


def timed(call: Callable[[], object], rounds: int) -> list[float]:
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(CALLS):
            call()
        found.append((time.perf_counter() - began) / CALLS * 1e6)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    print(machine())
    for name, message, most_bytes, most_us in CASES:
        raw, kind = message.SerializeToString(), type(message)
        section(name)
        print(row("size", [float(len(raw))], unit="bytes", goal="T33", limit=float(most_bytes)))
        print(row("serialize", timed(message.SerializeToString, rounds), unit="µs", goal="T33", limit=most_us))
        print(row("parse", timed(lambda raw=raw, kind=kind: kind.FromString(raw), rounds), unit="µs"))
        # The budget is for messages of bounded size; a hundred seeds are a hundred messages to check.
        limits = {} if "100" in name else {"goal": "T33", "limit": CHECK_US}
        print(row("check", timed(lambda one=message: contracts.check(one), rounds), unit="µs", **limits))
    section("envelope of a state packet")
    key = SigningKey.derive(b"s" * 32, "run", Role.REPORT)
    verifier, payload = Verifier.from_text(key.public_text()), packet(2).SerializeToString()
    envelope = seal(payload, BUS_MESSAGE_TYPE_TELEMETRY, run_uid="run", key=key)
    print(
        row(
            "seal",
            timed(lambda: seal(payload, BUS_MESSAGE_TYPE_TELEMETRY, run_uid="run", key=key), rounds // 4),
            unit="µs",
        )
    )
    print(row("verify", timed(lambda: verifier.check_envelope(envelope), rounds // 4), unit="µs"))


if __name__ == "__main__":
    main()
