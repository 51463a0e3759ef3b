"""The demo: a page at / that shows what talktime does, and the little server that a product would have behind it.

The page has a short-lived token of a user, as pages of products do. What that token may not do, it asks of the routes
under /demo, which do it as a service: start a chat, pause it, end it, add credits. Keys stay here. It serves this
machine alone: whoever opens the page gets credits for nothing.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from typing import Any

from litestar import MediaType, Request, Response, Router, get, post
from litestar.datastructures import CacheControlHeader
from litestar.params import FromPath
from msgspec import Struct

from talktime import operations
from talktime.api.callers import UserCaller
from talktime.api.params import IDEMPOTENCY_KEY, check_ids
from talktime.api.problems import FORBIDDEN, Fault, Refusal, refuse_caller, refuse_input
from talktime.api.schemas import (
    AdvisorAnswer,
    JsonResponse,
    LedgerEntryBody,
    ReadingBody,
    advisor_answer,
    ledger_entry_body,
    reading_body,
)
from talktime.api.tokens import mint
from talktime.meter.reading import Reading
from talktime.meter.state import CreditKind, RateCard, Tariff
from talktime.meter.units import MICRO
from talktime.operations import Service
from talktime.settings import TokenSettings
from talktime.store.history import is_unused
from talktime.web.assets import FOLDER, PAGE_HEADERS
from talktime.web.sessions import check_same_site

TOKEN_SECONDS = 300
WELCOME = TOP_UP = 5 * MICRO
_GUEST = re.compile(r"guest-[0-9a-f]{16}")
_PASSED_ON = ("Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Real-IP", "Via")
_THIS_MACHINE = re.compile(r"(?:localhost|127\.0\.0\.1|\[::1\])(?::\d{1,5})?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Demo:
    """How the demo signs the tokens of its guests."""

    tokens: TokenSettings


class Portrait(Struct, frozen=True):
    """An advisor as the page presents one, with the rate card in force."""

    name: str
    field: str
    card: AdvisorAnswer


class Guest(Struct, frozen=True):
    """A user of the demo, and a token for the page."""

    user_id: str
    token: str
    seconds: int


@dataclass(frozen=True, slots=True)
class _Advisor:
    name: str
    field: str
    card: RateCard


_SECOND = MICRO
_ADVISORS = {
    "mara-lindholm": _Advisor(
        "Mara Lindholm", "Career coaching", RateCard(Tariff(1_500_000), 180 * _SECOND)
    ),  # as exact as it gets
    "theo-okafor": _Advisor(
        "Theo Okafor", "Mathematics", RateCard(Tariff(2_400_000, 60 * _SECOND, 6 * _SECOND), 30 * _SECOND)
    ),  # in blocks, as telephony has them
    "ines-caron": _Advisor(
        "Inès Caron", "Contract law", RateCard(Tariff(12_000_000), 10 * _SECOND)
    ),  # dear enough to run out of credits while one watches
}


async def seed(service: Service) -> None:
    """Give an empty database the demo's advisors; nothing happens to one that is in use."""
    if await service.database.snapshot(is_unused):
        for advisor_id, advisor in _ADVISORS.items():
            await operations.put_advisor(service, advisor_id, advisor.card)


@get("/", include_in_schema=False, sync_to_thread=True)
def demo_page() -> Response[bytes]:
    """Send the page."""
    return Response((FOLDER / "demo.html").read_bytes(), media_type=MediaType.HTML, headers=PAGE_HEADERS)


@get("/demo/advisors", include_in_schema=False)
async def advisors(request: Request[Any, Any, Any]) -> list[Portrait]:
    """List the advisors."""
    return [
        Portrait(advisor.name, advisor.field, advisor_answer(advisor_id, card, default=default))
        for advisor_id, advisor in _ADVISORS.items()
        for card, default in [await operations.get_advisor(_service(request), advisor_id)]
    ]


@post("/demo/guests", include_in_schema=False)
async def new_guest(request: Request[Any, Any, Any]) -> Guest:
    """Make a user, with some credits."""
    user_id = f"guest-{secrets.token_hex(8)}"
    await _credit(request, user_id, CreditKind.GRANT, WELCOME, memo="welcome", key="welcome")
    return _guest(request, user_id)


@post("/demo/guests/{user_id:str}/token", include_in_schema=False)
async def new_token(request: Request[Any, Any, Any], user_id: FromPath[str]) -> Guest:
    """Make another token for a guest. Nobody can guess the id of another one, and nobody else gets a token here."""
    if not _GUEST.fullmatch(user_id):
        raise refuse_caller()
    return _guest(request, user_id)


@post("/demo/advisors/{advisor_id:str}/chats/{chat_id:str}/start", status_code=200, include_in_schema=False)
async def start_chat(request: Request[Any, Any, Any], advisor_id: FromPath[str], chat_id: FromPath[str]) -> ReadingBody:
    """Start a chat for the guest."""
    check_ids(advisor_id=advisor_id, chat_id=chat_id)
    user_id = await _user(request)
    reading = await operations.start(_service(request), user_id, chat_id, advisor_id=advisor_id, key=_key(request))
    return _shown(request, reading)


@post("/demo/chats/{chat_id:str}/pause", status_code=200, include_in_schema=False)
async def pause_chat(request: Request[Any, Any, Any], chat_id: FromPath[str]) -> ReadingBody:
    """Pause a chat of the guest."""
    check_ids(chat_id=chat_id)
    return _shown(request, await operations.pause(_service(request), await _user(request), chat_id))


@post("/demo/chats/{chat_id:str}/stop", status_code=200, include_in_schema=False)
async def stop_chat(request: Request[Any, Any, Any], chat_id: FromPath[str]) -> ReadingBody:
    """End a chat of the guest."""
    check_ids(chat_id=chat_id)
    return _shown(request, await operations.stop(_service(request), await _user(request), chat_id))


@post("/demo/credits", include_in_schema=False)
async def top_up(request: Request[Any, Any, Any]) -> LedgerEntryBody:
    """Add credits, as if the guest had bought some."""
    user_id = await _user(request)
    return await _credit(request, user_id, CreditKind.PURCHASE, TOP_UP, memo="demo", key=_key(request))


def demo_router(demo: Demo) -> Router:
    """Return the page and the routes of its server."""
    return Router(
        "/",
        route_handlers=[demo_page, advisors, new_guest, new_token, start_chat, pause_chat, stop_chat, top_up],
        before_request=_only_here,
        cache_control=CacheControlHeader(no_store=True),
        response_class=JsonResponse,
        opt={"demo": demo},
    )


def _only_here(request: Request[Any, Any, Any]) -> None:
    # The socket is on loopback. A page elsewhere whose name was pointed at it would still come under that name, and
    # what a proxy passes on comes from who knows where.
    host = request.headers.get("Host", "")
    if not _THIS_MACHINE.fullmatch(host) or any(name in request.headers for name in _PASSED_ON):
        raise Refusal(FORBIDDEN, "the demo serves this machine alone; open it as http://127.0.0.1 or http://localhost")
    if request.method == "POST":
        check_same_site(request)


def _guest(request: Request[Any, Any, Any], user_id: str) -> Guest:
    demo: Demo = request.route_handler.opt["demo"]
    return Guest(user_id, mint(demo.tokens, user_id, seconds=TOKEN_SECONDS), TOKEN_SECONDS)


def _service(request: Request[Any, Any, Any]) -> Service:
    service: Service = request.app.state["service"]
    return service


async def _user(request: Request[Any, Any, Any]) -> str:
    caller = await request.app.state["gate"].identify(request.scope["headers"])
    # Credits for nothing are for the guests that were made here, whoever else's tokens are valid.
    if not isinstance(caller, UserCaller) or not _GUEST.fullmatch(caller.user_id):
        raise refuse_caller()
    return caller.user_id


def _key(request: Request[Any, Any, Any]) -> str:
    key = request.headers.get(IDEMPOTENCY_KEY, "")
    if not re.fullmatch(r"[ -~]{1,255}", key):
        raise refuse_input(Fault("is required", header=IDEMPOTENCY_KEY))
    return key


def _shown(request: Request[Any, Any, Any], reading: Reading) -> ReadingBody:
    return reading_body(reading, request.app.state["heartbeat_us"])


async def _credit(
    request: Request[Any, Any, Any], user_id: str, kind: CreditKind, amount: int, *, memo: str, key: str
) -> LedgerEntryBody:
    entry = await operations.credit(_service(request), user_id, kind=kind, amount=amount, memo=memo, key=key)
    return ledger_entry_body(entry)
