"""A whole design for information: what it takes to keep a chat for an interval, put together from measured parts.

talktime renews a chat's lease with a heartbeat every 5 seconds, and a pass writes it every 15; the interval writer
writes it every 15, and takes no heartbeats. So of talktime a chat takes the time of one pass over it and of three
heartbeats, as if nothing of it were done at once. The parts are measured one after another, so what else the machine
did may have slowed one and not the other.
"""

from __future__ import annotations

from collections.abc import Mapping

from tests.bench.figures import Figure
from tests.bench.rounds import Part

HEARTBEATS = 3
"""Of a chat in an interval."""
_BEATING = (
    ("heartbeats", "heartbeat", "heartbeats one by one"),
    ("batch", "beats in batches", "heartbeats in batches"),
)


def whole_design(parts: Mapping[str, Part]) -> list[Figure]:
    """Return the figures for which both parts were measured."""
    writing = parts.get("writer", Part())
    figures = []
    for name, side, words in _BEATING:
        beating = parts.get(name, Part())
        if writing.rounds and beating.rounds:
            rates = zip(writing.rates("pass"), beating.rates(side), strict=True)
            figures.append(
                Figure(
                    name=f"whole design per chat and interval, {words}",
                    unit="chats/s",
                    runs=[1 / (1 / written + HEARTBEATS / beaten) for written, beaten in rates],
                    baseline="interval writer",
                    baseline_runs=writing.rates("interval writer"),
                )
            )
    return figures
