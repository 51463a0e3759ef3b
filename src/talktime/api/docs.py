"""The OpenAPI document, and a page that shows it. All that the page needs is served from here: it works offline."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec
from litestar import MediaType, Request, Response, Router, get
from litestar.datastructures import CacheControlHeader
from litestar.exceptions import NotFoundException
from litestar.openapi import OpenAPIConfig, ResponseSpec
from litestar.openapi.plugins import JsonRenderPlugin, OpenAPIRenderPlugin, YamlRenderPlugin
from litestar.openapi.spec import Components, Example, Schema, SecurityScheme, Tag
from litestar.params import FromPath
from litestar.plugins import OpenAPISchemaPlugin
from litestar.types import Empty
from litestar.typing import FieldDefinition

from talktime.api.auth import SECURITY_SCHEME
from talktime.api.bodies import BODIES, VALUES
from talktime.api.headers import PAGE_HEADERS
from talktime.api.problems import DOMAIN, FRAMEWORK, PROBLEM_JSON, Kind, ProblemBody, type_of
from talktime.errors import TalktimeError

if TYPE_CHECKING:
    from litestar._openapi.schema_generation import SchemaCreator

_DESCRIPTION = """\
Exact metering for chats that are paid by the minute.

- Amounts are decimal strings with up to 6 decimals, durations are microseconds (`..._us`) or exact seconds
  (`..._seconds`), and instants are RFC 3339 in UTC with microseconds and `Z`. Nothing is a float.
- Ids are the host product's own: 1 to 128 characters out of letters, digits and `-_.:@+=~|`, not `.` or `..`;
  percent-encode them in paths.
- Services call with a service key and may do everything. Users call with a token (JWT) of the host product whose `sub`
  is the user's id, and may read their chats, account and ledger; what else (send heartbeats; or start, pause and stop
  the chats that there are) is a setting. Advisors, with a `role` of `advisor` and their id as `sub`, may read the chats
  with them. All else is a 403, which never tells whether a thing exists.
- Errors are problem documents (RFC 9457) whose `type` and `code` never change; `errors` says what was wrong and where.
- After a 429 or a 503 (in as many seconds as `Retry-After` says), or where no answer came, repeat the request: start,
  heartbeat, pause, stop and a credit with its Idempotency-Key can be repeated safely.
"""

_MEANINGS = {
    400: "The request is not valid; `errors` says what is wrong and where.",
    401: "No credential, or one that is not valid.",
    403: "This caller may not do this, whether or not it exists.",
    404: "It does not exist.",
    408: "The body did not come in time.",
    409: "The state of things refuses the request.",
    413: "The body is larger than 64 KiB, or than 4 MiB where it holds many heartbeats.",
    415: "The body is not `application/json`, or not in UTF-8.",
    422: "The Idempotency-Key was used before, with another request.",
    429: "Too many requests of this caller, or too many without a good credential from its address; see `Retry-After`.",
    503: "The database does not answer, and the outcome may be unknown, or too many wait: repeat the request after "
    "`Retry-After`.",
}

_ASSETS = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
}

# The browser itself sees to it that the page asks nobody else.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <meta name="viewport" content="width=device-width, initial-scale=1">
  <title>{title}</title>
  <link rel="icon" href="data:,">
  <link rel="stylesheet" href="{base}/assets/swagger-ui.css">
</head>
<body>
  <div id="docs" data-url="{base}/openapi.json"></div>
  <script src="{base}/assets/swagger-ui-bundle.js"></script>
  <script src="{base}/assets/docs.js"></script>
</body>
</html>
"""

_SCRIPT = """\
"use strict";
SwaggerUIBundle({
  url: document.getElementById("docs").dataset.url,
  dom_id: "#docs",
  deepLinking: true,
  persistAuthorization: false,
  validatorUrl: null,
});
"""

_BASE = "/schema"
_DAY_SECONDS = 86_400


def problems(*answers: int | type[TalktimeError]) -> dict[int, ResponseSpec]:
    """Declare the problem documents with which a route can answer: by status, or by error of the domain."""
    kinds: dict[int, list[Kind]] = {}
    for answer in answers:
        kind = FRAMEWORK[answer][0] if isinstance(answer, int) else DOMAIN[answer]
        kinds.setdefault(kind.status, []).append(kind)
    return {
        status: ResponseSpec(
            ProblemBody,
            generate_examples=False,
            description=_MEANINGS[status],
            media_type=PROBLEM_JSON,
            examples=[Example(summary=kind.title, value=_example_of(kind)) for kind in found],
        )
        for status, found in kinds.items()
    }


def _example_of(kind: Kind) -> dict[str, Any]:
    return {
        "type": type_of(kind),
        "title": kind.title,
        "status": kind.status,
        "code": kind.code,
        "detail": "what happened, in a sentence",
    }


class _InputSchemas(OpenAPISchemaPlugin):
    """Tells Litestar the schemas of bodies: the values in them are ours, and they take no other members."""

    def is_plugin_supported_field(self, field_definition: FieldDefinition) -> bool:
        return field_definition.annotation in VALUES or field_definition.annotation in BODIES

    def to_openapi_schema(self, field_definition: FieldDefinition, schema_creator: SchemaCreator) -> Schema:
        if field_definition.annotation in VALUES:
            value: Schema = field_definition.annotation.schema
            return replace(value)
        fields = msgspec.structs.fields(field_definition.annotation)
        body = schema_creator.create_component_schema(
            field_definition,
            required=[field.encode_name for field in fields if field.required],
            property_fields={
                field.encode_name: FieldDefinition.from_annotation(
                    field.type, name=field.encode_name, default=Empty if field.required else field.default
                )
                for field in fields
            },
        )
        for field in fields:
            for meta in getattr(field.type, "__metadata__", ()):  # Litestar does not see how long a list may be
                cast("Schema", (body.properties or {})[field.encode_name]).max_items = meta.max_length
        body.description = field_definition.annotation.__doc__
        body.additional_properties = False
        return body


class _Page(OpenAPIRenderPlugin):
    """Swagger UI, from the files in the installed package swagger-ui-py."""

    def __init__(self) -> None:
        super().__init__(path="/swagger")

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:  # noqa: ARG002
        title = html.escape(openapi_schema["info"]["title"])
        return _PAGE.format(title=title, base=_BASE).encode()

    def receive_router(self, router: Router) -> None:
        router.register(_asset)


@get(
    "/assets/{name:str}",
    cache_control=CacheControlHeader(public=True, max_age=_DAY_SECONDS),
    sync_to_thread=True,
)
def _asset(name: FromPath[str]) -> Response[bytes]:
    if name == "docs.js":
        return Response(_SCRIPT.encode(), media_type="text/javascript")
    if name not in _ASSETS:
        raise NotFoundException
    return Response((_swagger_folder() / name).read_bytes(), media_type=_ASSETS[name])


def _swagger_folder() -> Path:
    # Found, not imported: the package wants web frameworks that are not here.
    found = find_spec("swagger_ui")
    if found is None or not found.submodule_search_locations:
        raise NotFoundException
    return Path(found.submodule_search_locations[0]) / "static"


def _finish(response: Response[Any]) -> Response[Any]:
    # Litestar answers unknown paths below /schema with a page of its own.
    if response.status_code == NotFoundException.status_code:
        raise NotFoundException
    if response.media_type == MediaType.HTML:
        response.headers.update({**PAGE_HEADERS, "Content-Security-Policy": _POLICY})
    return response


SCHEMA_PLUGIN = _InputSchemas()


def openapi_config() -> OpenAPIConfig:
    """Return the configuration of the OpenAPI document and its page, at /schema."""
    schemes: Mapping[str, Any] = {
        SECURITY_SCHEME: SecurityScheme(
            type="http", scheme="bearer", description="A service key, or a token (JWT) of a user or an advisor"
        )
    }
    return OpenAPIConfig(
        title="talktime",
        version=version("talktime"),
        description=_DESCRIPTION,
        components=Components(security_schemes=dict(schemes)),
        tags=[
            Tag("chats", "Clocks: start, keep running, pause, stop, read"),
            Tag("accounts", "Prepaid credits"),
            Tag("advisors", "Rate cards"),
            Tag("operations", "For those who run the service"),
        ],
        render_plugins=[_Page(), JsonRenderPlugin(), YamlRenderPlugin()],
        operation_id_creator=lambda handler, _method, _path: handler.handler_name,
        openapi_router=Router(_BASE, route_handlers=[], include_in_schema=False, after_request=_finish),
    )
