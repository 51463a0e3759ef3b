"""The application over a database that no one can reach: what gets past the API's own checks is answered with 503."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from litestar import Litestar
from litestar.testing import TestClient

from talktime.api.app import create_app
from talktime.settings import load_settings
from talktime.store.database import Database
from tests.api.requests import KEY, UNLIMITED

CLOSED_PORT = "postgresql+psycopg://nobody:nothing@127.0.0.1:1/nowhere"


def make_app() -> Litestar:
    return create_app(load_settings({"TALKTIME_SERVICE_KEY": KEY, **UNLIMITED}), lambda: Database(CLOSED_PORT))


@pytest.fixture(scope="package")
def app() -> Litestar:
    return make_app()


@pytest.fixture(scope="package")
def client(app: Litestar) -> Iterator[TestClient[Litestar]]:
    with TestClient(app) as client:
        yield client
