"""The rules of Redis users as text: names that cannot widen them, passwords that are not in them."""

import pytest
from esper_leyline import signing
from esper_leyline.oona import acl

SEED = b"s" * 32
UID = "0f5b4b0e-6a0e-4b62-9a5b-1f1d2c3b4a59"


@pytest.mark.parametrize("uid", ["", "*", "a b", "a)", "a~*", "a\n", "x" * 65, "ü"])
def test_a_uid_that_would_be_more_than_a_name_is_refused(uid: str) -> None:
    with pytest.raises(ValueError, match="no UID"):
        acl.run_rules(uid)


def test_the_password_itself_is_in_no_rule() -> None:
    words = acl.setuser(acl.run_user(UID), "open sesame", acl.run_rules(UID))
    assert words[:4] == (f"run-{UID}", "reset", "on", acl.hashed("open sesame"))
    assert not [word for word in words if "open sesame" in word]


def test_no_role_has_all_commands_or_all_keys() -> None:
    for rules in (acl.run_rules(UID), acl.nissa_rules(), acl.operator_rules()):
        text = " ".join(rules)
        assert "+@" not in text
        assert "~* " not in f"{text} "
        assert "&* " not in f"{text} "
        assert not {"+keys", "+config", "+flushall", "+eval", "+acl|load", "+acl|save"} & set(rules)
    assert "acl|" not in " ".join((*acl.run_rules(UID), *acl.nissa_rules(), *acl.operator_rules(users=False)))


def test_passwords_differ_by_seed_run_and_generation_and_are_no_key() -> None:
    found = {
        signing.bus_password(SEED, UID),
        signing.bus_password(SEED, UID, 2),
        signing.bus_password(SEED, "other"),
        signing.bus_password(b"t" * 32, UID),
        *(signing.SigningKey.derive(SEED, UID, role).to_text().strip() for role in signing.Role),
    }
    assert len(found) == 4 + len(signing.Role)
    assert signing.bus_password(SEED, UID) == signing.bus_password(SEED, UID)
    with pytest.raises(ValueError, match="at least 32"):
        signing.bus_password(b"short", UID)


def test_a_line_of_the_list_is_read() -> None:
    line = f"user run-{UID} on sanitize-payload {acl.hashed('x')} resetchannels -@all +ping (~* +get)"
    assert acl.listed(line) == (f"run-{UID}", frozenset({acl.hashed("x")}))
    assert acl.listed("") == acl.listed("nonsense") == ("", frozenset())
