"""What repeats itself is counted and told once; what is worse or other passes."""

from esper_runtime.weatherlight.coalesce import MAX_KINDS, WINDOW_NS, Coalescer
from hypothesis import given
from hypothesis import strategies as st


def test_repetitions_within_the_window_are_told_with_their_count_when_it_is_over():
    coalescer: Coalescer[int] = Coalescer()
    assert coalescer.passes("a", 1, 0)
    assert [coalescer.passes("a", n, n * 10) for n in (2, 3, 4)] == [False] * 3
    assert coalescer.first() == [2]
    assert coalescer.due(WINDOW_NS - 1) == []
    (held,) = coalescer.due(WINDOW_NS)
    assert (held.count, held.first, held.newest) == (3, 2, 4)
    assert coalescer.due(10 * WINDOW_NS) == []
    assert coalescer.passes("a", 5, WINDOW_NS)


def test_what_is_other_or_comes_later_passes_at_once():
    coalescer: Coalescer[int] = Coalescer()
    assert coalescer.passes(("warning", "x"), 1, 0)
    assert coalescer.passes(("critical", "x"), 2, 1), "a higher level always passes"
    assert coalescer.passes(("warning", "y"), 3, 1), "so do other words"
    assert coalescer.passes(("warning", "x"), 4, WINDOW_NS)
    assert coalescer.due(3 * WINDOW_NS) == []


def test_clocks_that_go_back_lose_nothing():
    coalescer: Coalescer[int] = Coalescer()
    assert coalescer.passes("a", 1, 5 * WINDOW_NS)
    assert coalescer.passes("a", 2, 0)
    assert not coalescer.passes("a", 3, 1)
    assert [held.count for held in coalescer.due(5 * WINDOW_NS)] == [1]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3 * WINDOW_NS)), max_size=60), st.integers(1, 9))
def test_every_event_passes_or_is_counted(events: list[tuple[str, int]], every: int):
    coalescer: Coalescer[int] = Coalescer()
    passed = told = 0
    for number, (kind, at) in enumerate(events):
        passed += coalescer.passes(kind, number, at)
        if number % every == 0:
            told += sum(held.count for held in coalescer.due(at))
    told += sum(held.count for held in coalescer.due(100 * WINDOW_NS))
    assert passed + told == len(events)


def test_it_remembers_no_more_than_so_many():
    coalescer: Coalescer[int] = Coalescer()
    assert all(coalescer.passes(n, n, 0) for n in range(3 * MAX_KINDS))
    assert coalescer.passes(2 * MAX_KINDS, 0, 0), "those beyond the bound pass one by one"
    assert not coalescer.passes(0, 0, 0)
