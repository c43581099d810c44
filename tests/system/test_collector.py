"""Old objects are out of the collector's sight, new ones are not."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from specmoe_compile.system.collector import old_objects_frozen


class Knot:
    """An object in a cycle of its own."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def nothing_frozen() -> Iterator[None]:
    """The tests' own frozen objects, of conftest.py, are so again afterwards."""
    gc.unfreeze()
    yield
    gc.freeze()


def test_cycles_of_the_block_are_collected_and_older_ones_after_it() -> None:
    old = weakref.ref(Knot())
    with old_objects_frozen():
        new = weakref.ref(Knot())
        gc.collect()
        assert new() is None and old() is not None
    gc.collect()
    assert old() is None


def test_an_error_ends_it_too() -> None:
    with pytest.raises(ZeroDivisionError), old_objects_frozen():
        assert gc.get_freeze_count() > 0
        raise ZeroDivisionError
    assert gc.get_freeze_count() == 0


def test_what_somebody_else_froze_stays() -> None:
    gc.freeze()
    with old_objects_frozen(), old_objects_frozen():
        pass
    assert gc.get_freeze_count() > 0
