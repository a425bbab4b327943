import pytest
from esper_leyline.oona import OonaConfig, OonaConfigError


def test_a_directory_without_a_url_means_no_redis(tmp_path):
    assert OonaConfig.from_directory(tmp_path) is None
    assert OonaConfig.from_directory(tmp_path / "absent") is None


def test_url_and_authority_come_from_files_and_credentials_are_read_at_every_connection(tmp_path):
    (tmp_path / "url").write_text("rediss://valkey:6379\n")
    (tmp_path / "username").write_text("run-1\n")
    (tmp_path / "password").write_text("old\n")
    (tmp_path / "ca.crt").write_text("-----BEGIN CERTIFICATE-----\n")
    config = OonaConfig.from_directory(tmp_path)
    options = config.connection_options()
    assert options["ssl_ca_data"] == "-----BEGIN CERTIFICATE-----"
    assert options["credential_provider"].get_credentials() == ("run-1", "old")
    (tmp_path / "password").write_text("new\n")
    assert options["credential_provider"].get_credentials() == ("run-1", "new")


def test_a_password_without_a_user_is_sent_alone():
    options = OonaConfig(url="redis://x", password="secret").connection_options()
    assert options["credential_provider"].get_credentials() == ("secret",)


def test_no_credentials_means_no_login(tmp_path):
    (tmp_path / "url").write_text("redis://valkey:6379")
    assert OonaConfig.from_directory(tmp_path).connection_options() == {}
    assert OonaConfig(url="redis://x").connection_options() == {}


def test_secrets_do_not_show_in_the_representation():
    assert "hunter2" not in repr(OonaConfig(url="redis://x", password="hunter2", ca="hunter2"))


@pytest.mark.parametrize("url", ["http://x", "valkey:6379", ""])
def test_a_url_of_another_kind_is_refused_with_the_schemes_that_work(url):
    with pytest.raises(OonaConfigError, match=r"redis://, rediss://, unix://"):
        OonaConfig(url=url)
