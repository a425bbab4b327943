"""Whether a signed command may act: signature, form, run, identity, freshness, nonce, in this order.

A command is fresh when it echoes a packet id that this verifier gave out within the window, by its own monotonic
clock; no wall clock takes part. So nothing older than the window can act, whatever was recorded or replayed, and a
restarted verifier, which remembers no packet, refuses everything from before. Nothing here does I/O; one caller at
a time.
"""

import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from esper_leyline import contracts
from esper_leyline.reasons import CommandRejection
from esper_leyline.signing import SignatureError, Verifier
from esper_leyline.v1.command_pb2 import AdaptationCommand, CommandSecurity, SignedCommand
from google.protobuf.message import DecodeError

FRESHNESS_WINDOW_NS: Final = 10_000_000_000
MAX_COMMAND_BYTES: Final = 64 * 1024
MAX_ID_CHARACTERS: Final = 64
"""Of a nonce or command id: the ledger's memory is bounded in bytes, not only in entries."""
_IDENTITY: Final = frozenset({"command_id", "metadata", "metadata.training_run_id", "metadata.packet_id"})
"""What is missing of these has a reason of its own."""
MAX_OPEN_PACKETS: Final = 256
MAX_NONCES: Final = 4096


@dataclass(frozen=True, slots=True)
class Verdict:
    """`rejection` is None when the command may act."""

    command_id: str
    rejection: CommandRejection | None

    @property
    def accepted(self) -> bool:
        return self.rejection is None


class CommandVerifier:
    """Verifies the commands of one run. Accepts each at most once."""

    def __init__(
        self,
        *,
        run_uid: str,
        keys: Verifier,
        clock_ns: Callable[[], int],
        window_ns: int = FRESHNESS_WINDOW_NS,
        new_packet_id: Callable[[], str] = lambda: secrets.token_hex(16),
        max_nonces: int = MAX_NONCES,
    ) -> None:
        self.run_uid = run_uid
        self._keys = keys
        self._clock_ns = clock_ns
        self._window_ns = window_ns
        self._new_packet_id = new_packet_id
        self._opened_ns: OrderedDict[str, int] = OrderedDict()
        # A packet is open for one window and a nonce is kept for one window after its use: as long as its command
        # can be fresh, so forgetting earlier is never needed and later is useless.
        self._seen = _Ledger(keep_ns=window_ns, capacity=max_nonces)

    @property
    def remembered_nonces(self) -> int:
        """As of now: those whose window is over go without a command's coming."""
        self._seen.expire(self._clock_ns())
        return len(self._seen)

    @property
    def forgotten_nonces(self) -> int:
        """Nonces and ids whose window is over, since the start."""
        return self._seen.expired

    @property
    def window_s(self) -> float:
        """How long a packet is open, and a nonce remembered."""
        return self._window_ns / 1e9

    def open_boundary(self) -> str:
        """A new packet id, 128 random bits as hex; its freshness window starts now."""
        packet_id = self._new_packet_id()
        self._opened_ns[packet_id] = self._clock_ns()
        # Forgetting a packet can only refuse a command, never admit one.
        while len(self._opened_ns) > MAX_OPEN_PACKETS:
            self._opened_ns.popitem(last=False)
        return packet_id

    def submit(self, signed: SignedCommand) -> Verdict:
        """Checks in order; the first failure is the verdict. Only an accepted command uses up its nonce."""
        try:
            self._keys.check_command(signed, self.run_uid)
        except SignatureError as error:
            # Nothing of an unauthentic command is repeated to anybody.
            return Verdict("", CommandRejection(error.reason))
        command = _parsed(signed)
        if isinstance(command, CommandRejection):
            return Verdict("", command)
        return Verdict(command.command_id, self._rejection(command, signed.security))

    def _rejection(self, command: AdaptationCommand, security: CommandSecurity) -> CommandRejection | None:
        if command.metadata.training_run_id != self.run_uid:
            return CommandRejection.WRONG_RUN
        if not command.command_id:
            return CommandRejection.MISSING_COMMAND_ID
        now_ns = self._clock_ns()
        opened_ns = self._opened_ns.get(command.metadata.packet_id)
        if opened_ns is None:
            return CommandRejection.UNKNOWN_PACKET
        if now_ns - opened_ns > self._window_of(security):
            return CommandRejection.STALE_COMMAND
        return self._seen.add(f"nonce/{security.nonce}", f"command/{command.command_id}", now_ns=now_ns)

    def _window_of(self, security: CommandSecurity) -> int:
        if not security.HasField("freshness_window"):
            return self._window_ns
        return min(self._window_ns, security.freshness_window.ToNanoseconds())


def _parsed(signed: SignedCommand) -> AdaptationCommand | CommandRejection:
    """The command behind a valid signature, or why it is not one that this version understands."""
    if len(signed.command) > MAX_COMMAND_BYTES or not 0 < len(signed.security.nonce) <= MAX_ID_CHARACTERS:
        return CommandRejection.MALFORMED
    command = AdaptationCommand()
    try:
        command.ParseFromString(signed.command)
    except DecodeError:
        return CommandRejection.MALFORMED
    try:
        contracts.check(command)
    except contracts.ContractError as error:
        if error.wrong_version:
            return CommandRejection.WRONG_VERSION
        return command if error.field in _IDENTITY and error.missing else CommandRejection.MALFORMED
    return command


class _Ledger:
    """Ids in use, each for `keep_ns`. Full means: refuse the new, for an old one forgotten could act again."""

    def __init__(self, *, keep_ns: int, capacity: int) -> None:
        self._keep_ns = keep_ns
        self._capacity = capacity
        self._used_ns: OrderedDict[str, int] = OrderedDict()
        self.expired = 0

    def __len__(self) -> int:
        return len(self._used_ns)

    def add(self, *ids: str, now_ns: int) -> CommandRejection | None:
        """Marks all `ids` as used, or none of them when one already is. O(1) amortized."""
        self.expire(now_ns)
        if any(one in self._used_ns for one in ids):
            return CommandRejection.NONCE_REPLAYED
        if len(self._used_ns) + len(ids) > self._capacity:
            return CommandRejection.NONCE_LEDGER_FULL
        for one in ids:
            self._used_ns[one] = now_ns
        return None

    def expire(self, now_ns: int) -> None:
        """Forgets what cannot be fresh any more. O(1) amortized."""
        while self._used_ns:
            oldest, used_ns = next(iter(self._used_ns.items()))
            if now_ns - used_ns <= self._keep_ns:
                return
            del self._used_ns[oldest]
            self.expired += 1
