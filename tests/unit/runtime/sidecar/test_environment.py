from pathlib import Path

import pytest
from esper_runtime.sidecar.environment import Environment, SettingsError


def test_values_are_read_by_type():
    environment = Environment({"A": "x", "B": "7", "C": "/run/esper"})
    assert (environment.text("A"), environment.integer("B"), environment.path("C")) == ("x", 7, Path("/run/esper"))


@pytest.mark.parametrize("variables", [{}, {"A": ""}])
def test_an_absent_and_an_empty_variable_are_the_same(variables):
    environment = Environment(variables)
    assert environment.text("A", "fallback") == "fallback"
    with pytest.raises(SettingsError, match="A is not set"):
        environment.text("A")


@pytest.mark.parametrize(
    ("value", "message"), [("seven", "must be an integer"), ("-1", "at least 0"), ("1.5", "must be an integer")]
)
def test_a_bad_number_is_named_with_its_value(value, message):
    with pytest.raises(SettingsError, match=rf"PORT is '?{value}'?.*{message}"):
        Environment({"PORT": value}).integer("PORT")


def test_a_relative_path_is_refused():
    with pytest.raises(SettingsError, match="absolute"):
        Environment({"A": "run"}).path("A")
