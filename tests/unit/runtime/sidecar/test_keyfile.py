"""Key files that change under a running sidecar."""

import os
from pathlib import Path

import pytest
from esper_leyline.signing import Role, SignatureError, SigningKey, announced
from esper_runtime.sidecar.environment import SettingsError
from esper_runtime.sidecar.keyfile import GRACE_S, Keyring, private_key

SEED, UID = bytes(range(32)), "uid-1"


def key(generation: int) -> SigningKey:
    return SigningKey.derive(SEED, UID, Role.OPERATOR, generation)


def replace(path: Path, text: str) -> None:
    """As the kubelet does: a new file, and one rename."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    os.replace(fresh, path)


class Ring:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.now = 0.0
        self.refusals: list[str] = []
        path.write_text(announced(SEED, UID, Role.OPERATOR, 1))
        self.ring = Keyring(path, monotonic=lambda: self.now)

    def believes(self, generation: int, message: bytes = b"m") -> bool:
        signer = key(generation)
        try:
            self.ring.check(signer.key_id, signer.private.sign(b"m"), message)
        except SignatureError as error:
            self.refusals.append(error.reason)
            return False
        return True


@pytest.fixture
def ring(tmp_path: Path) -> Ring:
    return Ring(tmp_path / "operator.pub")


def test_the_next_key_is_believed_before_the_file_says_that_it_is_in_force(ring: Ring) -> None:
    assert [ring.believes(generation) for generation in (1, 2, 3)] == [True, True, False]


def test_the_key_before_a_rotation_counts_for_its_grace_and_no_longer(ring: Ring) -> None:
    replace(ring.path, announced(SEED, UID, Role.OPERATOR, 2))
    assert [ring.believes(generation) for generation in (1, 2, 3, 4)] == [True, True, True, False]
    ring.now += GRACE_S - 0.001
    assert ring.believes(1)
    assert not ring.believes(1, b"another message")
    assert ring.refusals == ["unknown_key_id", "invalid_signature"]
    ring.now += 0.001
    assert [ring.believes(generation) for generation in (1, 2, 3)] == [False, True, True]


@pytest.mark.parametrize("spoil", ["gone", "malformed", "unreadable"])
def test_a_file_in_trouble_leaves_the_last_good_keys_in_force(
    ring: Ring, spoil: str, caplog: pytest.LogCaptureFixture
) -> None:
    if spoil == "malformed":
        replace(ring.path, "no key")
    else:
        ring.path.unlink()
    if spoil == "unreadable":
        ring.path.mkdir()
    assert [ring.believes(1) for _ in range(3)] == [True, True, True]
    assert len([r for r in caplog.records if "the keys from before count on" in r.message]) == 1
    if spoil == "unreadable":
        ring.path.rmdir()
    replace(ring.path, announced(SEED, UID, Role.OPERATOR, 2))
    assert ring.believes(3)


def test_a_private_key_is_followed_and_never_quoted(tmp_path: Path) -> None:
    path = tmp_path / "report.key"
    replace(path, key(1).to_text())
    found = private_key(path)
    assert found.current().key_id == key(1).key_id
    replace(path, key(2).to_text())
    assert found.current().key_id == key(2).key_id
    replace(path, key(3).to_text()[:40])
    with pytest.raises(SettingsError, match="holds no private key of 64 hex digits") as caught:
        private_key(path)
    assert key(3).to_text()[:8] not in str(caught.value)
