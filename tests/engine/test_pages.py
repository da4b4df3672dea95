"""Pages: who holds them, who finds them, and which go first."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxopt_llm.engine.pages import PagePool, PageTables, extend_chain


def chain_of(tokens, page_size=4):
    chain: list[bytes] = []
    extend_chain(chain, tokens, page_size=page_size)
    return chain


def tables(**settings):
    defaults = {"num_pages": (16,), "windows": (None,), "page_size": 4, "max_slots": 3, "max_seq_len": 40}
    return PageTables(**defaults | settings)


def fill(pages, slot, tokens):
    """A slot that has computed these tokens from the start."""
    chain = chain_of(tokens)
    assert pages.admit(slot, [], len(tokens)) == 0
    assert pages.grow(slot, len(tokens)) == len(tokens)
    pages.register(slot, chain, 0, len(chain))
    return chain


def test_a_chain_knows_all_before_it():
    tokens = list(range(13))
    chain = chain_of(tokens)
    assert len(chain) == 3
    assert chain == chain_of(tokens[:12])
    assert chain[:2] == chain_of(tokens[:8])
    changed = chain_of([99, *tokens[1:]])
    assert not set(chain) & set(changed)
    assert len(set(chain_of([7] * 40))) == 10  # the same page further on is another page


def test_a_chain_is_extended_where_it_ended():
    tokens = list(range(30))
    chain: list[bytes] = []
    for end in range(len(tokens) + 1):
        extend_chain(chain, tokens[:end], page_size=4)
    assert chain == chain_of(tokens)


def test_take_share_release():
    pool = PagePool(4)
    assert pool.take(3) == [0, 1, 2]
    pool.share([1])
    assert (pool.used, pool.cached, pool.free, pool.holders(1)) == (3, 0, 1, 2)
    pool.release([0, 1, 2])
    assert (pool.used, pool.free, pool.holders(1)) == (1, 3, 1)
    pool.release([1])
    assert (pool.used, pool.available) == (0, 4)


def test_registered_pages_stay_until_they_are_needed():
    pool = PagePool(3)
    first, second = pool.take(2)
    pool.register(first, b"one")
    pool.release([first, second])
    assert (pool.cached, pool.free) == (1, 2)
    assert pool.find([b"one"]) == [first]
    pool.take(2)
    assert b"one" in pool
    assert pool.take(1) == [first]
    assert b"one" not in pool
    assert pool.available == 0


def test_the_least_recently_used_goes_first_and_a_tail_before_its_head():
    pool = PagePool(4)
    pages = pool.take(4)
    for page, digest in zip(pages, [b"a0", b"a1", b"b0", b"b1"], strict=True):
        pool.register(page, digest)
    pool.release(pages[:2])
    pool.release(pages[2:])
    pool.share(pages[:2])  # a is used again, and is then the latest
    pool.release(pages[:2])
    gone = []
    for _ in range(4):
        pool.take(1)
        gone.append({b"a0", b"a1", b"b0", b"b1"} - {d for d in (b"a0", b"a1", b"b0", b"b1") if d in pool})
    assert gone == [{b"b1"}, {b"b1", b"b0"}, {b"b1", b"b0", b"a1"}, {b"b1", b"b0", b"a1", b"a0"}]


def test_the_first_of_two_equal_pages_is_found():
    pool = PagePool(2)
    first, second = pool.take(2)
    pool.register(first, b"same")
    pool.register(second, b"same")
    pool.release([second])
    assert (pool.cached, pool.free) == (0, 1)
    assert pool.find([b"same"]) == [first]


def test_forgotten_pages_are_free():
    pool = PagePool(3)
    pages = pool.take(2)
    pool.register(pages[0], b"held")
    pool.register(pages[1], b"cached")
    pool.release(pages[1:])
    pool.forget()
    assert (pool.used, pool.cached, pool.free) == (1, 0, 2)
    pool.register(pages[0], b"new")
    assert b"held" not in pool and b"new" in pool


def test_slots_share_a_prefix():
    pages = tables()
    tokens = list(range(12))
    chain = fill(pages, 0, tokens)
    assert pages.admit(1, chain[:2], 12) == 2
    assert pages.held(0, 1) == pages.held(0, 0)[:2]
    assert pages.grow(1, 12) == 12
    assert pages.held(0, 1)[2] != pages.held(0, 0)[2]
    assert pages.pools[0].used == 4
    pages.release(0)
    assert pages.pools[0].used == 3
    assert pages.admit(0, chain_of([5, *tokens[1:]]), 12) == 0


def test_growth_takes_what_there_is():
    pages = tables(num_pages=(3, 2), windows=(None, 4))
    pages.admit(0, [], 4)
    assert pages.lacks(0, 12) == 3
    assert pages.grow(0, 12) == 8
    assert pages.grow(0, 12) == 8
    assert pages.grow(0, 7) == 7
    pages.advance(0, 8)  # sees 5 to 8: page 1 on
    assert [len(pages.held(kind, 0)) for kind in range(2)] == [2, 1]
    assert pages.grow(0, 12) == 12


def test_admission_leaves_room_for_the_whole_prompt():
    pages = tables(num_pages=(4,))
    chain = fill(pages, 0, list(range(8)))
    pages.release(0)
    assert pages.admit(0, chain, 17) is None
    assert pages.pools[0].cached == 2
    assert pages.admit(0, chain, 16) == 2


def test_pages_to_share_do_not_count_as_room():
    pages = tables(num_pages=(4,))
    chain = fill(pages, 0, list(range(8)))
    fill(pages, 1, [9] * 8)
    pages.release(0)
    assert pages.pools[0].available == 2
    assert pages.admit(0, chain, 12) is None  # two to share, and they were the last
    assert pages.admit(0, chain, 8) == 2


@pytest.mark.parametrize("window", [1, 2, 4, 5, 6, 9, 40, None])
def test_peak_is_what_one_by_one_takes(window):
    pages = tables(windows=(window,))
    for length in range(1, 41):
        pages.admit(0, [], 1)
        most = 0
        for position in range(length):
            pages.advance(0, position)
            assert pages.grow(0, position + 1) == position + 1
            most = max(most, len(pages.held(0, 0)))
        pages.release(0)
        assert most <= pages.peak(length)[0]
    assert most == pages.peak(length)[0]


def test_a_window_needs_only_its_own_pages_to_share():
    """Page size 4, window 6: a query at 12 sees 7 to 12, so pages 1 and 2 must be there."""
    pages = tables(num_pages=(16, 16), windows=(None, 6))
    tokens = list(range(16))
    chain = fill(pages, 0, tokens)
    pages.advance(0, 16)
    full, window = pages.pools
    assert (full.used, window.used, window.cached) == (4, 2, 2)
    pages.release(0)
    assert pages.admit(1, chain[:3], 16) == 3
    assert [len(pages.held(kind, 1)) for kind in range(2)] == [3, 2]
    pages.release(1)
    window.take(13)  # evicts page 0 of the chain, which was given back first
    assert [digest in window for digest in chain] == [False, True, True, True]
    assert pages.match(chain[:1]) == 0
    assert pages.match(chain[:3]) == 3
    window.take(1)  # and page 3, the tail
    assert pages.match(chain) == 3
    window.take(1)
    assert pages.match(chain) == 0


def brute_force_match(chain, registered, windows, page_size):
    """By the definition: the longest n for which every kind has what a query at n * page_size sees."""
    for n in range(len(chain), 0, -1):
        seen = [range(0 if w is None else max(0, n * page_size - w + 1), n * page_size) for w in windows]
        if all(
            chain[position // page_size] in found
            for positions, found in zip(seen, registered, strict=True)
            for position in positions
        ):
            return n
    return 0


@given(st.data())
def test_match_is_the_longest(data):
    windows = data.draw(st.sampled_from([(None,), (5,), (None, 1), (None, 3, 9), (8, 2)]))
    page_size = data.draw(st.integers(1, 4))
    chain = chain_of(list(range(8 * page_size)), page_size)
    pages = tables(num_pages=(8,) * len(windows), windows=windows, page_size=page_size)
    registered = [data.draw(st.sets(st.sampled_from(chain))) for _ in windows]
    for pool, found in zip(pages.pools, registered, strict=True):
        for page, digest in zip(pool.take(8), chain, strict=True):
            if digest in found:
                pool.register(page, digest)
    assert pages.match(chain) == brute_force_match(chain, registered, windows, page_size)


def test_snapshots_stay_as_they_were():
    pages = tables(windows=(None, 4), num_pages=(8, 8))
    pages.admit(0, [], 4)
    pages.grow(0, 8)
    before = pages.snapshot()
    kept = before.copy()
    assert before.shape == (2, 3, 10) and before.dtype == np.int32
    pages.grow(0, 8)
    pages.advance(0, 8)
    assert pages.snapshot() is before
    pages.grow(0, 9)
    assert pages.snapshot() is not before
    np.testing.assert_array_equal(before, kept)
    with pytest.raises(ValueError, match="read-only"):
        before[0, 0, 0] = 1
