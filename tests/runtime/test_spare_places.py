"""Places that all layers share for experts without a slot."""

from __future__ import annotations

from specmoe_compile.runtime.cache.spare_places import NOBODY, SparePlaces


def test_a_record_stays_until_its_place_is_the_one_used_longest_ago() -> None:
    places = SparePlaces(2)
    for expert in (5, 6):
        places.release(places.take(0, expert))
    first = places.find(0, 5)
    places.use(first)
    places.release(first)
    assert places.take(0, 7) != first
    assert (places.find(0, 5), places.find(0, 6)) == (first, NOBODY)


def test_layers_do_not_share_records() -> None:
    places = SparePlaces(1)
    places.release(places.take(3, 5))
    assert places.find(3, 5) == 0
    assert places.find(2, 5) == places.find(3, 4) == NOBODY


def test_a_busy_place_is_neither_found_nor_taken() -> None:
    places = SparePlaces(1)
    assert places.take(0, 5) == 0
    assert places.find(0, 5) == NOBODY
    assert places.take(0, 6) == NOBODY
    places.release(0)
    assert places.find(0, 5) == 0


def test_what_did_not_arrive_is_forgotten() -> None:
    places = SparePlaces(1)
    places.take(0, 5)
    places.forget(0)
    places.release(0)
    assert places.find(0, 5) == NOBODY
    assert places.take(0, 6) == 0
