"""The application around its routes: health, metrics, errors of every kind, and its lifetime."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from litestar import Litestar, get
from litestar.params import FromPath
from litestar.testing import TestClient
from prometheus_client.parser import text_string_to_metric_families

from talktime import errors
from talktime.api.app import create_app
from talktime.api.auth import Gate
from talktime.api.problems import DOMAIN
from talktime.settings import load_settings
from talktime.store.database import Database
from tests.api.conftest import CLOSED_PORT, make_app
from tests.api.requests import AUTH, CHAT, KEY, ROUTES, Json, problem_of
from tests.api.test_schemas import READING, READING_JSON

ERRORS: dict[str, errors.TalktimeError] = {
    "user-not-found": errors.UserNotFound("u1"),
    "chat-not-found": errors.ChatNotFound("u1", "c1"),
    "wrong-advisor": errors.WrongAdvisor("c1"),
    "chat-not-active": errors.ChatNotActive("c1", "ended"),
    "insufficient-balance": errors.InsufficientBalance("1.000000"),
    "balance-limit-exceeded": errors.BalanceLimitExceeded("9.000000"),
    "idempotency-key-reused": errors.IdempotencyKeyReused(),
    "unavailable": errors.EmbeddedDatabaseError("it does not start"),
}


@get("/fail/{code:str}")
async def fail(code: FromPath[str]) -> None:
    if code not in ERRORS:
        raise RuntimeError(KEY)
    raise ERRORS[code]


@pytest.fixture(scope="module")
def failing() -> Iterator[TestClient[Litestar]]:
    app = make_app()
    app.register(fail)
    with TestClient(app) as client:
        yield client


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ERRORS)
def test_every_error_of_the_domain_has_its_problem(failing: TestClient[Litestar], code: str) -> None:
    status = next(kind.status for kind in DOMAIN.values() if kind.code == code)
    body = problem_of(failing.get(f"/fail/{code}"), status, code)

    assert str(ERRORS[code]) == body["detail"]
    assert "reading" not in body


def test_each_code_has_one_kind_and_all_conflicts_are_mapped() -> None:
    assert len(DOMAIN) == len({kind.code for kind in DOMAIN.values()})
    assert set(DOMAIN) >= {*errors.Conflict.__subclasses__(), *errors.NotFound.__subclasses__()}


def test_a_chat_that_is_not_active_comes_with_its_reading(
    failing: TestClient[Litestar], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ERRORS["chat-not-active"], "reading", READING)

    assert problem_of(failing.get("/fail/chat-not-active"), 409, "chat-not-active")["reading"] == READING_JSON


def test_the_unexpected_is_logged_and_not_told(failing: TestClient[Litestar], caplog: pytest.LogCaptureFixture) -> None:
    response = failing.get("/fail/otherwise", headers=AUTH)

    problem_of(response, 500, "internal-error")
    assert KEY not in response.text
    [record] = caplog.records
    assert (record.levelno, record.getMessage()) == (logging.ERROR, "unexpected error in GET /fail/{code}")
    assert record.exc_info
    assert record.exc_info[0] is RuntimeError


def test_refusals_are_not_logged(client: TestClient[Litestar], caplog: pytest.LogCaptureFixture) -> None:
    client.get("/v1/advisors/a1")
    client.get("/v1/advisors/a%00", headers=AUTH)
    client.get("/nowhere")
    client.get("/v1/advisors/a1", headers=AUTH)

    assert [record for record in caplog.records if record.name.startswith("talktime.api")] == []


def test_the_environment_cannot_switch_debug_pages_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITESTAR_DEBUG", "1")
    monkeypatch.setenv("LITESTAR_PDB", "1")
    app = make_app()

    assert not app.debug
    assert not app.pdb_on_exception


def test_making_an_application_leaves_logging_alone() -> None:
    before = list(logging.getLogger().handlers)
    make_app()

    assert before == logging.getLogger().handlers


# --- paths and methods ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/", "/nowhere", "/v1", "/v1/", "/v1/nowhere", "/v2/advisors/a1", "/v1/users/u1", "/V1/x"]
)
def test_unknown_paths_are_not_found(client: TestClient[Litestar], path: str) -> None:
    problem_of(client.get(path, headers=AUTH), 404, "not-found")


@pytest.mark.parametrize(("method", "path", "_body"), ROUTES)
def test_wrong_methods_are_told_the_right_ones(
    client: TestClient[Litestar], method: str, path: str, _body: Json
) -> None:
    response = client.request("DELETE", path, headers=AUTH)

    problem_of(response, 405, "method-not-allowed")
    assert method in response.headers["allow"].split(", ")


@pytest.mark.parametrize(
    ("path", "methods"),
    [("/v1/advisors/a1", "GET, OPTIONS, PUT"), (f"{CHAT}/start", "OPTIONS, POST"), (CHAT, "GET, OPTIONS")],
)
def test_who_asks_for_the_methods_of_a_path_is_told_all(client: TestClient[Litestar], path: str, methods: str) -> None:
    response = client.request("OPTIONS", path, headers=AUTH)

    assert (204, b"", methods) == (response.status_code, response.content, response.headers["allow"])


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics", "/schema"])
def test_pages_are_only_read(client: TestClient[Litestar], path: str) -> None:
    response = client.post(path)

    problem_of(response, 405, "method-not-allowed")
    assert "GET" in response.headers["allow"]


# --- health and metrics -----------------------------------------------------------------------------------------------


def test_livez_does_not_ask_the_database(client: TestClient[Litestar]) -> None:
    response = client.get("/livez")

    assert (response.status_code, response.json()) == (200, {"status": "alive"})


def test_readyz_says_that_the_database_does_not_answer(client: TestClient[Litestar]) -> None:
    response = client.get("/readyz")

    problem_of(response, 503, "unavailable")
    assert response.headers["retry-after"] == "1"
    assert "127.0.0.1" not in response.text


def _requests(client: TestClient[Litestar]) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {
        (sample.labels["method"], sample.labels["path"], sample.labels["status_code"]): sample.value
        for family in families
        for sample in family.samples
        if sample.name == "talktime_requests_total"
    }


def test_requests_are_counted_by_route_and_not_by_id() -> None:
    with TestClient(make_app()) as client:
        for user in ("u1", "u2"):
            client.get(f"/v1/users/{user}/chats/c1", headers=AUTH)
        client.post(f"{CHAT}/stop")
        client.get("/v1/nowhere/u3")

        assert _requests(client) == {
            ("GET", "/v1/users/{user_id}/chats/{chat_id}", "503"): 2,
            ("POST", "/v1/users/{user_id}/chats/{chat_id}/stop", "401"): 1,
        }


def test_applications_in_one_process_count_apart() -> None:
    with TestClient(make_app()) as one, TestClient(make_app()) as other:
        one.get("/livez")

        assert _requests(one) == {("GET", "/livez", "200"): 1}
        assert _requests(other) == {}


# --- pages ------------------------------------------------------------------------------------------------------------


@get("/page", include_in_schema=False)
async def page() -> str:
    return "a page"


def test_pages_are_served_beside_the_api_without_a_credential() -> None:
    app = create_app(load_settings({}), lambda: Database(CLOSED_PORT), pages=[page])
    with TestClient(app) as client:
        assert (200, "a page") == ((response := client.get("/page")).status_code, response.text)
        problem_of(client.get("/v1/advisors/a1"), 401, "unauthorized")
    assert isinstance(app.state["gate"], Gate)


# --- lifetime ---------------------------------------------------------------------------------------------------------


def test_the_database_is_opened_at_the_start_and_closed_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    close = Database.close

    async def noted_close(database: Database) -> None:
        events.append("closed")
        await close(database)

    def noted_open() -> Database:
        events.append("opened")
        return Database(CLOSED_PORT)

    monkeypatch.setattr(Database, "close", noted_close)
    app = create_app(load_settings({"TALKTIME_SERVICE_KEY": KEY}), noted_open)
    assert events == []
    with TestClient(app) as client:
        client.get("/livez")
        assert events == ["opened"]
    assert events == ["opened", "closed"]
