"""What somebody may write into ConfigMap esper-emergency: whatever it is, it costs the other broadcasts nothing."""

import json

import pytest
from esper_operator import observe
from esper_operator.observe import emergency
from esper_operator.testing.builders import a_run

GOOD = "mode: Freeze\nselector: {}\n"
RUN = a_run().seen().run


def said(**data: str) -> tuple[list[str], list[str]]:
    """Ids of the broadcasts that count, and what is wrong with the others."""
    found, problems = observe.broadcasts({"data": data}, RUN)
    json.dumps([*(one.reason for one in found), *map(str, problems)], ensure_ascii=False).encode()  # can be told
    return [one.id for one in found], [str(problem) for problem in problems]


def laughs(levels: int) -> str:
    lines = ["a0: &a0 lol"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join([*lines, f"reason: *a{levels - 1}", GOOD])


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (GOOD + 'reason: "\\UFFFFFFFF"', "is no YAML"),
        (laughs(12), "alias"),
        ("mode: [Freeze]\nselector: {}\n", "mode is"),
        (GOOD + "reason: [a, b]", "reason must be text"),
        ("[" * 8000, "nested deeper than 8 levels"),
        (GOOD + "x" * 20_000, "at most 16384"),
        ('"\\ud83d": 1\n' + GOOD, "unknown key"),
        ("mode: Freeze\nselector: " + "a," * 4000, "the part ''"),
    ],
    ids=["no character", "billion laughs", "mode", "reason", "depth", "length", "half a character", "empty parts"],
)
def test_what_cannot_be_read_is_told_and_harms_no_other(text: str, wrong: str) -> None:
    ids, problems = said(bad=text, good=GOOD)
    assert ids == ["good"]
    assert len(problems) == 1
    assert wrong in problems[0]


def test_a_reason_keeps_its_characters_however_they_are_written() -> None:
    written = json.dumps({"mode": "Kill", "selector": {}, "reason": "smoke \N{FIRE} and \ud83d"})
    (found,), problems = observe.broadcasts({"data": {"fire": written}}, RUN)
    assert found.reason == "smoke \N{FIRE} and \N{REPLACEMENT CHARACTER}"
    assert problems == ()


def test_all_keys_are_read_once_for_all_runs() -> None:
    data = {"data": {f"k{n:03}": GOOD + f"reason: r{n}" for n in range(200)} | {"bad": "["}}
    emergency._parsed.cache_clear()
    for number in range(50):
        found, problems = observe.broadcasts(data, a_run(f"run-{number}").seen().run)
        assert (len(found), len(problems)) == (200, 1)
    assert emergency._parsed.cache_info().misses == 1
