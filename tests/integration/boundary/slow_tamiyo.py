"""A tamiyo that takes a file away for each answer: `slow_tamiyo.py <socket> <key file> <run uid> <file> <type>`."""

import asyncio
import sys
from pathlib import Path
from typing import Any

from esper_leyline.signing import SigningKey, sign_command
from esper_leyline.v1.command_pb2 import AdaptationCommand, DecisionMetadata, SignedCommand
from esper_leyline.v1.command_pb2_grpc import TamiyoPolicyServiceServicer, add_TamiyoPolicyServiceServicer_to_server
from esper_leyline.v1.telemetry_pb2 import SystemStatePacket
from esper_runtime.sidecar.rpc import serving

sys.path.insert(0, str(Path(__file__).parents[3]))
from tests.support.waiting import until


class Slow(TamiyoPolicyServiceServicer):
    def __init__(self, key: SigningKey, run_uid: str, gate: Path, command_type: int, deadline_ms: int) -> None:
        self.key, self.run_uid, self.gate = key, run_uid, gate
        self.command_type, self.deadline_ms = command_type, deadline_ms
        self.asked = 0

    async def Evaluate(self, request: SystemStatePacket, context: Any) -> SignedCommand:
        self.asked += 1
        await until(self.gate.exists)
        self.gate.unlink()
        command = AdaptationCommand(
            version=1,
            command_id=f"command-{self.asked}",
            command_type=self.command_type,
            execution_deadline_ms=self.deadline_ms,
            metadata=DecisionMetadata(training_run_id=self.run_uid, packet_id=request.packet_id),
        )
        return sign_command(command, run_uid=self.run_uid, key=self.key)


async def main(socket: str, key: str, run_uid: str, gate: str, command_type: str, deadline_ms: str = "0") -> None:
    slow = Slow(SigningKey.from_text(Path(key).read_text()), run_uid, Path(gate), int(command_type), int(deadline_ms))
    async with serving(Path(socket), add_TamiyoPolicyServiceServicer_to_server, slow):
        print("listening", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
