"""What programs do before their event loop runs."""

from __future__ import annotations

import gc

from talktime.process import settle


def test_what_is_loaded_is_left_out_of_collections() -> None:
    loaded: list[list[int]] = [[] for _ in range(1000)]
    before = gc.get_freeze_count()
    try:
        settle()

        assert gc.get_freeze_count() >= before + len(loaded)
        assert all(found is not loaded for found in gc.get_objects())
    finally:
        gc.unfreeze()
