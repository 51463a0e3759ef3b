"""The OpenAPI document tells the truth, and its page needs no one else."""

from __future__ import annotations

import re
from importlib.metadata import version

import pytest
from litestar import Litestar
from litestar.testing import TestClient

from talktime.api.many_beats import BEATS_MAX
from tests.api.requests import ROUTES, Json

PROBLEM = "application/problem+json"


@pytest.fixture(scope="module")
def document(client: TestClient[Litestar]) -> Json:
    return client.get("/schema/openapi.json").json()


def _operations(document: Json) -> list[tuple[str, str, Json]]:
    return [
        (method.upper(), path, operation)
        for path, item in document["paths"].items()
        for method, operation in item.items()
    ]


def _route(path: str) -> str:
    for name, value in (("user_id", "u1"), ("chat_id", "c1"), ("advisor_id", "a1")):
        path = path.replace(f"/{value}", f"/{{{name}}}")
    return path


def test_it_names_the_service_and_its_version(document: Json) -> None:
    assert ("talktime", version("talktime")) == (document["info"]["title"], document["info"]["version"])


def test_it_lists_every_route_and_no_other(document: Json) -> None:
    expected = {(method, _route(path)) for method, path, _ in ROUTES} | {("GET", "/livez"), ("GET", "/readyz")}

    assert expected == {(method, path) for method, path, _ in _operations(document)}


def test_every_operation_is_explained_guarded_and_has_its_problems(document: Json) -> None:
    for method, path, operation in _operations(document):
        assert operation["summary"], path
        assert operation["description"], path
        assert operation["tags"], path
        if not path.startswith("/v1/"):
            continue
        assert operation["security"] == [{"bearer": []}]
        answers = operation["responses"]
        expected = {"400", "401", "403", "429", "503"} | (
            {"408", "413", "415"} if "requestBody" in operation else set()
        )
        assert expected <= set(answers), (method, path)
        for status, answer in answers.items():
            assert list(answer["content"]) == [PROBLEM if int(status) >= 400 else "application/json"]
            assert answer["description"]


def test_operations_have_distinct_ids(document: Json) -> None:
    ids = [operation["operationId"] for _, _, operation in _operations(document)]

    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("method", "path", "statuses"),
    [
        ("put", "/v1/advisors/{advisor_id}", "200 400 401 403 408 413 415 429 503"),
        ("get", "/v1/advisors/{advisor_id}", "200 400 401 403 429 503"),
        ("post", "/v1/users/{user_id}/credits", "201 400 401 403 408 409 413 415 422 429 503"),
        ("get", "/v1/users/{user_id}/account", "200 400 401 403 404 429 503"),
        ("post", "/v1/users/{user_id}/chats/{chat_id}/start", "200 400 401 403 404 408 409 413 415 422 429 503"),
        ("post", "/v1/users/{user_id}/chats/{chat_id}/heartbeat", "200 400 401 403 404 408 409 413 429 503"),
        ("post", "/v1/users/{user_id}/chats/{chat_id}/stop", "200 400 401 403 404 408 413 429 503"),
        ("get", "/readyz", "200 503"),
    ],
)
def test_the_answers_of_a_route_are_listed(document: Json, method: str, path: str, statuses: str) -> None:
    assert statuses.split() == sorted(document["paths"][path][method]["responses"])


def test_idempotency_keys_are_parameters(document: Json) -> None:
    found = {
        path: parameter["required"]
        for _, path, operation in _operations(document)
        for parameter in operation.get("parameters", ())
        if (parameter["name"], parameter["in"]) == ("Idempotency-Key", "header")
    }

    assert found == {"/v1/users/{user_id}/credits": True, "/v1/users/{user_id}/chats/{chat_id}/start": False}


def test_bodies_take_what_the_decoder_takes(document: Json) -> None:
    schemas = document["components"]["schemas"]
    card, credit = schemas["AdvisorBody"], schemas["CreditBody"]

    assert not any(schemas[name]["additionalProperties"] for name in ("AdvisorBody", "CreditBody", "StartBody"))
    assert card["required"] == ["credits_per_minute", "free_seconds"]
    assert (card["properties"]["free_seconds"]["type"], card["properties"]["first_seconds"]["default"]) == ("number", 0)
    assert (credit["properties"]["amount"]["type"], credit["required"]) == ("string", ["kind", "amount"])


def test_every_reference_leads_somewhere(document: Json) -> None:
    for name in set(re.findall(r'"\$ref": ?"#/components/schemas/([^"]+)"', str(document).replace("'", '"'))):
        assert name in document["components"]["schemas"]


@pytest.mark.parametrize("path", ["/schema", "/schema/", "/schema/swagger"])
def test_the_page_asks_nobody_else(client: TestClient[Litestar], path: str) -> None:
    response = client.get(path)
    links = re.findall(r'(?:src|href|data-url)="([^"]+)"', response.text)

    assert response.status_code == 200
    assert not re.search(r"https?:|//", response.text)
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert len(links) == 5
    for link in links:
        assert link == "data:," or client.get(link).status_code == 200


def test_the_document_comes_as_yaml_too(client: TestClient[Litestar]) -> None:
    assert "title: talktime" in client.get("/schema/openapi.yaml").text


@pytest.mark.parametrize("name", ["swagger-editor-bundle.js", "LICENSE", "..%2F__init__.py", "%2e%2e", "docs.js.map"])
def test_only_the_files_of_the_page_are_served(client: TestClient[Litestar], name: str) -> None:
    response = client.get(f"/schema/assets/{name}")

    assert (response.status_code, response.headers["content-type"]) == (404, PROBLEM)


def test_other_pages_below_are_not_found(client: TestClient[Litestar]) -> None:
    response = client.get("/schema/redoc")

    assert (response.status_code, response.headers["content-type"]) == (404, PROBLEM)


def test_a_request_of_heartbeats_says_how_many_it_takes(document: Json) -> None:
    [body] = [schema for name, schema in document["components"]["schemas"].items() if name.endswith("BeatsBody")]
    beats = body["properties"]["beats"]
    assert ("array", BEATS_MAX) == (beats["type"], beats.get("maxItems"))
    description = document["paths"]["/v1/heartbeats"]["post"]["description"]
    assert "malformed has the result 400" in description
