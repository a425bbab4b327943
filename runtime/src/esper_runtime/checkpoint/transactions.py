"""Saves as transactions: BEGIN, then COMMIT once the generation is on the volume, or ABORT when nothing of it is left.

At most one is open. One that is open at the end of the log died in the middle: nobody may count on it until the next
start has looked at what is there and closed it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from esper_runtime.checkpoint.walstate import Kind

MAX_RECENT = 64
"""Transactions remembered one by one; older ones are only counted."""


class Fate(StrEnum):
    """How a transaction ended, or did not."""

    OPEN = "open"
    COMMITTED = "committed"
    ABORTED = "aborted"
    INTERRUPTED = "interrupted"
    """The next one began although this one had never ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Transaction:
    """One save, as the log tells it."""

    txn: int
    attempt: int
    number: int
    """Of the generation."""
    step: int
    epoch: int
    fate: Fate = Fate.OPEN
    files: int = 0
    """Files of the generation, its manifest apart; known once it is committed."""
    error: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Transactions:
    """The sum of all BEGIN, COMMIT and ABORT records."""

    last: int = 0
    """Number of the newest transaction; they count from 1 over the whole run."""
    recent: tuple[Transaction, ...] = ()
    """The newest MAX_RECENT, oldest first."""
    newest: Transaction | None = None
    """The newest that was committed."""
    committed: int = 0
    aborted: int = 0
    interrupted: int = 0
    context: Mapping[str, Any] = field(default_factory=dict)
    """What the process of the newest BEGIN that told it ran: code, model, torch, device."""

    @property
    def open(self) -> Transaction | None:
        """The one that has begun and not ended."""
        return self.recent[-1] if self.recent and self.recent[-1].fate is Fate.OPEN else None

    def after(self, kind: Kind, fields: Mapping[str, Any]) -> "Transactions":
        """With one more record. KeyError, TypeError or ValueError when a field is missing or of no use."""
        match kind:
            case Kind.BEGIN:
                return self._begun(fields)
            case Kind.COMMIT:
                return self._ended(fields, Fate.COMMITTED)
            case Kind.ABORT:
                return self._ended(fields, Fate.ABORTED)
            case Kind.STATE if "transactions" in fields:
                return _transactions_of(fields["transactions"])
        return self

    def _begun(self, fields: Mapping[str, Any]) -> "Transactions":
        begun = Transaction(
            txn=int(fields["txn"]),
            attempt=int(fields["attempt"]),
            number=int(fields["number"]),
            step=int(fields["step"]),
            epoch=int(fields["epoch"]),
        )
        before = self if self.open is None else self._closed(replace(self.open, fate=Fate.INTERRUPTED))
        context = fields.get("context", before.context)
        recent = (*before.recent, begun)[-MAX_RECENT:]
        return replace(before, last=begun.txn, recent=recent, context=dict(context))

    def _ended(self, fields: Mapping[str, Any], fate: Fate) -> "Transactions":
        """A record about one that is not open says again what an earlier one said: it changes nothing."""
        txn, open_ = int(fields["txn"]), self.open
        if open_ is None or open_.txn != txn:
            return self
        files = int(fields["files"]) if fate is Fate.COMMITTED else 0
        return self._closed(replace(open_, fate=fate, files=files, error=str(fields.get("error", ""))))

    def _closed(self, ended: Transaction) -> "Transactions":
        return replace(
            self,
            recent=(*self.recent[:-1], ended),
            newest=ended if ended.fate is Fate.COMMITTED else self.newest,
            committed=self.committed + (ended.fate is Fate.COMMITTED),
            aborted=self.aborted + (ended.fate is Fate.ABORTED),
            interrupted=self.interrupted + (ended.fate is Fate.INTERRUPTED),
        )

    def fields(self) -> dict[str, Any]:
        """For a STATE record."""
        return asdict(self)


def _transactions_of(fields: Mapping[str, Any]) -> Transactions:
    newest = fields["newest"]
    recent = tuple(_transaction_of(transaction) for transaction in fields["recent"])
    return Transactions(**{**fields, "recent": recent, "newest": None if newest is None else _transaction_of(newest)})


def _transaction_of(fields: Mapping[str, Any]) -> Transaction:
    return Transaction(**{**fields, "fate": Fate(fields["fate"])})
