"""What all tests share: databases (database.py describes them), the simulated clock, and Hypothesis profiles."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from sqlalchemy import Engine, event
from sqlalchemy.engine import URL

from tests import driver, sql_rules
from tests.database import Clock, Databases, provided_databases, running_server, simulated_clock

_SCANNED: set[str] = set()
_DATABASE_USED = pytest.StashKey[str]()

# No deadlines and no complaints about slow data: a busy machine is not a bug. `default` as the parent, because with CI
# in the environment Hypothesis would begin with a profile of its own.
_BASE = settings.get_profile("default")
_SLOW_IS_FINE = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
settings.register_profile("fast", _BASE, max_examples=50, **_SLOW_IS_FINE)
settings.register_profile("thorough", _BASE, max_examples=2_000, **_SLOW_IS_FINE)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


@event.listens_for(Engine, "before_cursor_execute")
def _scan(_connection: object, _cursor: object, statement: str, *_: object) -> None:
    """Hold every statement that a test makes the product send against the SQL rules."""
    if statement not in _SCANNED:
        sql_rules.check(statement)
        _SCANNED.add(statement)


@pytest.fixture(scope="session", autouse=True)
def _past_sqlalchemy() -> Iterator[None]:
    """Scan what is sent past SQLAlchemy too."""
    with driver.watched(lambda connection, statement, _: _scan(connection, None, statement)):
        yield


@pytest.fixture(scope="session")
def databases(pytestconfig: pytest.Config) -> Iterator[Databases]:
    """A server with the migrated template, started when the first test asks for it."""
    choice = os.environ.get("TALKTIME_TEST_DATABASE") or "auto"
    image = os.environ.get("TALKTIME_TEST_IMAGE") or "postgres:17"
    with running_server(choice, image) as server:
        pytestconfig.stash[_DATABASE_USED] = server.description
        with provided_databases(server.url) as databases:
            yield databases


@pytest.fixture
def database_url(databases: Databases) -> Iterator[URL]:
    """A migrated database of the test's own."""
    url = databases.create()
    yield url
    databases.drop(url)


@pytest.fixture
def empty_database_url(databases: Databases) -> Iterator[URL]:
    """A database of the test's own without any table, for migrations."""
    url = databases.create(empty=True)
    yield url
    databases.drop(url)


@pytest.fixture
def clock(database_url: URL) -> Iterator[Clock]:
    """Simulated time in the test's database. To be asked for before anything that connects."""
    with simulated_clock(database_url) as clock:
        yield clock


def pytest_configure() -> None:
    """End on SIGTERM as on Ctrl-C, so that a run that is ended from outside removes its container too."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use a database."""
    for item in items:
        if "databases" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.database)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI, a skipped test is a failure: nobody would look at it again."""
    if os.environ.get("CI") and _skipped(session.config) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say which database was used and why, and what the skipped tests mean in CI."""
    used = config.stash.get(_DATABASE_USED, None)
    if used:
        terminalreporter.write_line(f"database: {used}")
    if os.environ.get("CI") and _skipped(config):
        terminalreporter.write_line("skipped tests fail the run, because CI is set", red=True)


def _skipped(config: pytest.Config) -> int:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    return len(reporter.stats.get("skipped", ())) if reporter else 0
