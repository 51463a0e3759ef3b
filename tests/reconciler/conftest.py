"""What tests of events share: a receiver, and a clock that it takes for right."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy.engine import URL

from tests.database import Clock, connect
from tests.reconciler.receiver import Receiver, receiving
from tests.support import S


@pytest.fixture
def now(clock: Clock, database_url: URL) -> Clock:
    """The simulated clock, set to about the real time: receivers take nothing that is older than five minutes."""
    with connect(database_url) as connection:
        row = connection.execute("SELECT extract(epoch FROM pg_catalog.clock_timestamp())::bigint").fetchone()
    assert row is not None
    clock.set((row[0] - 200) * S)
    return clock


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver
