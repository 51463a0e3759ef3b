"""A short run of the simulator, of other histories each time; for a long one there is `python -m tests.simulator`.

``TALKTIME_TEST_HISTORIES`` says how many histories to run (default 16).
"""

from __future__ import annotations

import os
import random
from collections import Counter

from tests.database import Databases
from tests.simulator.runs import run_histories

STEPS = 250
ENOUGH = 16


def test_nothing_that_the_service_shows_in_random_histories_differs_from_the_reference(databases: Databases) -> None:
    histories = int(os.environ.get("TALKTIME_TEST_HISTORIES") or ENOUGH)
    first = random.randrange(1_000_000_000)
    totals: Counter[str] = Counter()
    for made in run_histories(databases, range(first, first + histories), STEPS, at_once=2):
        totals += made
    print(", ".join(f"{count} {what}" for what, count in sorted(totals.items())))
    assert (histories, histories * STEPS) == (totals["histories"], totals["steps"])
    if histories >= ENOUGH:  # what makes it worth its time did happen
        assert all(totals[what] for what in ("killed APIs", "cuts", "passes", "readings", "commands without answer"))
