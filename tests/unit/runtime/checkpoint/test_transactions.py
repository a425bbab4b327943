"""Saves in the write-ahead log."""

from pathlib import Path

import pytest
from esper_runtime.checkpoint import Wal, WalError, transactions
from esper_runtime.checkpoint import wal as module
from esper_runtime.checkpoint.transactions import Fate, Transaction
from esper_runtime.checkpoint.wal import Kind, read_log


def begin(wal: Wal, txn: int, **rest: object) -> None:
    wal.append(Kind.BEGIN, txn=txn, attempt=1, number=txn, step=10 * txn, epoch=0, **rest)


def commit(wal: Wal, txn: int) -> None:
    wal.append(Kind.COMMIT, txn=txn, attempt=1, number=txn, step=10 * txn, files=4)


def transaction(txn: int, fate: Fate, **rest: object) -> Transaction:
    return Transaction(txn=txn, attempt=1, number=txn, step=10 * txn, epoch=0, fate=fate, **rest)  # type: ignore[arg-type]


def fates(wal: Wal) -> list[tuple[int, Fate]]:
    return [(each.txn, each.fate) for each in wal.transactions.recent]


@pytest.fixture
def wal(tmp_path: Path) -> Wal:
    return Wal(tmp_path / "wal.log")


def test_a_transaction_is_open_until_it_is_ended(wal: Wal):
    begin(wal, 1, context={"torch": "2"})
    assert wal.transactions.open == transaction(1, Fate.OPEN)
    assert wal.transactions.newest is None
    commit(wal, 1)
    assert wal.transactions.open is None
    assert wal.transactions.newest == transaction(1, Fate.COMMITTED, files=4)
    begin(wal, 2)
    wal.append(Kind.ABORT, txn=2, error="no space")
    assert fates(wal) == [(1, Fate.COMMITTED), (2, Fate.ABORTED)]
    assert wal.transactions.recent[-1].error == "no space"
    assert wal.transactions.newest == transaction(1, Fate.COMMITTED, files=4)
    assert (wal.transactions.last, wal.transactions.context) == (2, {"torch": "2"})
    wal.close()


def test_one_that_was_open_at_the_end_is_reported_and_never_counts(wal: Wal):
    begin(wal, 1)
    commit(wal, 1)
    begin(wal, 2)
    wal.close()
    again = Wal(wal.path)
    again.replay()
    assert again.transactions.open == transaction(2, Fate.OPEN)
    assert again.transactions.newest == transaction(1, Fate.COMMITTED, files=4)
    begin(again, 3)
    assert fates(again) == [(1, Fate.COMMITTED), (2, Fate.INTERRUPTED), (3, Fate.OPEN)]
    assert (again.transactions.committed, again.transactions.interrupted) == (1, 1)
    again.close()


def test_ending_twice_or_what_never_began_changes_nothing(wal: Wal):
    begin(wal, 1)
    commit(wal, 1)
    before = wal.transactions
    commit(wal, 1)
    commit(wal, 7)
    wal.append(Kind.ABORT, txn=1, error="late")
    assert wal.transactions == before
    wal.close()


def test_a_long_log_keeps_its_transactions(wal: Wal, monkeypatch: pytest.MonkeyPatch):
    begin(wal, 1, context={"device": "cpu"})
    commit(wal, 1)
    begin(wal, 2)
    expected = wal.transactions
    wal.close()
    monkeypatch.setattr(module, "COMPACT_BYTES", 256)
    again = Wal(wal.path)
    again.replay()
    assert again.transactions == expected
    assert read_log(wal.path).records == 1
    again.append(Kind.STATE, **again.state.fields())
    assert again.transactions == expected, "a state that knows of no transactions says nothing about them"
    again.close()


def test_only_the_newest_are_remembered_one_by_one(wal: Wal, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transactions, "MAX_RECENT", 3)
    begin(wal, 1)
    commit(wal, 1)
    for txn in range(2, 8):
        begin(wal, txn)
        wal.append(Kind.ABORT, txn=txn, error="x")
    assert fates(wal) == [(5, Fate.ABORTED), (6, Fate.ABORTED), (7, Fate.ABORTED)]
    assert wal.transactions.newest == transaction(1, Fate.COMMITTED, files=4)
    assert (wal.transactions.committed, wal.transactions.aborted) == (1, 6)
    wal.close()


def test_fields_that_are_missing_are_refused(wal: Wal):
    with pytest.raises(WalError, match="begin"):
        wal.append(Kind.BEGIN, txn=1)
    assert wal.transactions.last == 0
    wal.close()


def test_a_log_can_be_read_beside_its_writer(wal: Wal):
    begin(wal, 1)
    with wal.path.open("ab") as file:
        file.write(b"torn")
    seen = read_log(wal.path)
    assert (seen.records, seen.torn_bytes, seen.transactions) == (1, 4, wal.transactions)
    assert wal.path.read_bytes().endswith(b"torn"), "reading cuts nothing"
    wal.close()
