"""Events reach the loop in order and complete; text waits, an end does not."""

from __future__ import annotations

import asyncio
import threading

import pytest

from specmoe_compile.serve.engine import Event, Piece
from specmoe_compile.serve.inbox import Inbox, joined

LONG_S = 3600.0


async def _until_the_end(inbox: Inbox) -> list[list[Event]]:
    batches: list[list[Event]] = []
    while not batches or batches[-1][-1] is not None:
        batches.append(await inbox.take())
    return batches


@pytest.mark.parametrize("pause_s", [None, 0.0, 0.001])
def test_no_text_is_lost_between_threads(pause_s: float | None) -> None:
    async def main() -> list[list[Event]]:
        inbox = Inbox(pause_s=pause_s)

        def write() -> None:
            for number in range(3000):
                inbox.put(Piece(number // 1000, f"{number};"))
            inbox.put(None)

        thread = threading.Thread(target=write)
        thread.start()
        batches = await asyncio.wait_for(_until_the_end(inbox), 60)
        thread.join()
        return batches

    batches = asyncio.run(main())
    assert all(batches)
    said = [event for batch in batches for event in batch if isinstance(event, Piece)]
    assert "".join(piece.text for piece in said) == "".join(f"{n};" for n in range(3000))
    assert [piece.choice for piece in said] == sorted(piece.choice for piece in said)


def test_the_first_text_comes_at_once_and_the_next_ones_together() -> None:
    async def main() -> list[list[Event]]:
        inbox = Inbox(pause_s=LONG_S)
        inbox.put(Piece(0, "a"))
        batches = [await inbox.take()]
        inbox.put(Piece(0, "b"))
        inbox.put(Piece(0, "c"))
        waiting = asyncio.create_task(inbox.take())
        await asyncio.sleep(0.05)
        assert not waiting.done(), "the text did not wait"
        inbox.put(None)
        batches.append(await asyncio.wait_for(waiting, 60))
        return batches

    assert asyncio.run(main()) == [[Piece(0, "a")], [Piece(0, "bc"), None]]


def test_text_that_waited_comes_without_an_end() -> None:
    async def main() -> list[Event]:
        inbox = Inbox(pause_s=0.01)
        inbox.put(Piece(0, "a"))
        await inbox.take()
        inbox.put(Piece(0, "b"))
        return await asyncio.wait_for(inbox.take(), 60)

    assert asyncio.run(main()) == [Piece(0, "b")]


def test_an_answer_in_one_piece_wakes_the_loop_once() -> None:
    async def main() -> list[Event]:
        inbox = Inbox(pause_s=None)
        waiting = asyncio.create_task(inbox.take())
        await asyncio.sleep(0)
        for text in "ab":
            inbox.put(Piece(0, text))
            await asyncio.sleep(0.01)
            assert not waiting.done(), "text woke the loop"
        inbox.put(None)
        return await asyncio.wait_for(waiting, 60)

    assert asyncio.run(main()) == [Piece(0, "ab"), None]


def test_text_of_several_choices_stays_apart() -> None:
    pieces = [Piece(0, "a"), Piece(0, "b"), Piece(1, "c"), Piece(0, "d")]
    assert joined(pieces) == [Piece(0, "ab"), Piece(1, "c"), Piece(0, "d")]
