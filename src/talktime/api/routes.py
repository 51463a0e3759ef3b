"""The handlers of the routes under /v1, one per use case.

Bodies, queries and headers are valid when a handler is called; it checks the ids in its path. Who else than a service
may call it, its `opt` says (`talktime.api.callers`). What is raised on the way is answered by `talktime.api.problems`.
"""

from __future__ import annotations

from typing import cast

from litestar import get, post, put
from litestar.params import JSONBody

from talktime import beats, operations
from talktime.api.bodies import (
    BEATS_BYTES_MAX,
    AdvisorBody,
    ApiRequest,
    CreditBody,
    StartBody,
)
from talktime.api.callers import AdvisorCaller, ServiceCaller
from talktime.api.docs import problems
from talktime.api.many_beats import BEATS_MAX, BeatsBody
from talktime.api.params import (
    AdvisorId,
    ChatId,
    CreditKey,
    Cursor,
    Limit,
    StartKey,
    State,
    UserId,
    check_ids,
    is_id,
    parse_limit,
    parse_state,
    read_chats_cursor,
    read_cursor,
    write_chats_cursor,
    write_cursor,
)
from talktime.api.problems import INVALID_INPUT, kind_of, refuse_caller
from talktime.api.schemas import (
    AccountAnswer,
    AdvisorAnswer,
    BeatResult,
    BeatResults,
    LedgerEntryBody,
    LedgerPage,
    ReadingBody,
    ReadingPage,
    SegmentPage,
    account_answer,
    advisor_answer,
    ledger_entry_body,
    reading_body,
    segment_body,
)
from talktime.errors import (
    BalanceLimitExceeded,
    ChatNotActive,
    ChatNotFound,
    DatabaseUnavailable,
    IdempotencyKeyReused,
    InsufficientBalance,
    Overloaded,
    UserNotFound,
    WrongAdvisor,
)
from talktime.meter.reading import Reading
from talktime.meter.state import ChatState
from talktime.operations import Service
from talktime.settings import UserMay

_PAGED = ("limit", "cursor")
_CHAT = "/users/{user_id:str}/chats/{chat_id:str}"


def _service(request: ApiRequest) -> Service:
    return cast("Service", request.app.state["service"])


def _shown(request: ApiRequest, reading: Reading) -> ReadingBody:
    return reading_body(reading, request.app.state["heartbeat_us"])


def _beat_result(beaten: beats.Beaten | None) -> BeatResult:
    """Write what became of a heartbeat, or of one whose ids are none."""
    if isinstance(beaten, ChatState):
        return BeatResult(200, beaten.value, beaten is ChatState.RUNNING)
    kind = INVALID_INPUT if beaten is None else kind_of(beaten)
    reading = getattr(beaten, "reading", None)
    return BeatResult(kind.status, None if reading is None else reading.state.value, code=kind.code)


# --- advisors ---------------------------------------------------------------------------------------------------------


@put(
    "/advisors/{advisor_id:str}",
    summary="Set an advisor's rate card",
    description="It holds for segments that are opened from now on, and its free time for users who have not started a "
    "chat with this advisor yet. A clock that runs keeps its tariff.",
    tags=["advisors"],
    responses=problems(400, 401, 403, 408, 413, 415, 429, DatabaseUnavailable),
    opt={"body": AdvisorBody},
)
async def put_advisor(request: ApiRequest, advisor_id: AdvisorId, data: JSONBody[AdvisorBody]) -> AdvisorAnswer:
    """Set an advisor's rate card."""
    check_ids(advisor_id=advisor_id)
    card = data.card()
    await operations.put_advisor(_service(request), advisor_id, card)
    return advisor_answer(advisor_id, card, default=False)


@get(
    "/advisors/{advisor_id:str}",
    summary="Read an advisor's rate card",
    description="The card in force: the advisor's own, or the default one.",
    tags=["advisors"],
    responses=problems(400, 401, 403, 429, DatabaseUnavailable),
)
async def get_advisor(request: ApiRequest, advisor_id: AdvisorId) -> AdvisorAnswer:
    """Return the card in force for an advisor."""
    check_ids(advisor_id=advisor_id)
    card, default = await operations.get_advisor(_service(request), advisor_id)
    return advisor_answer(advisor_id, card, default=default)


# --- accounts ---------------------------------------------------------------------------------------------------------


@post(
    "/users/{user_id:str}/credits",
    summary="Add or take credits",
    description="`purchase`, `grant` and `compensation` add; `refund` and `correction` take, as far as the balance "
    "reaches. An account is made if the user has none. A repeated request gets the answer of the first.",
    tags=["accounts"],
    responses=problems(
        400,
        401,
        403,
        InsufficientBalance,
        BalanceLimitExceeded,
        408,
        413,
        415,
        IdempotencyKeyReused,
        429,
        DatabaseUnavailable,
    ),
    opt={"body": CreditBody, "key": "required"},
)
async def post_credit(
    request: ApiRequest, user_id: UserId, idempotency_key: CreditKey, data: JSONBody[CreditBody]
) -> LedgerEntryBody:
    """Add or take credits, once per key."""
    check_ids(user_id=user_id)
    entry = await operations.credit(
        _service(request),
        user_id,
        kind=data.kind,
        amount=int(data.amount),
        memo=str(data.memo),
        key=idempotency_key,
    )
    return ledger_entry_body(entry)


@get(
    "/users/{user_id:str}/account",
    summary="Read a user's account",
    description="The balance now, what the open segments have cost so far, the running chats, and when the credits "
    "run out if these go on.",
    tags=["accounts"],
    responses=problems(400, 401, 403, UserNotFound, 429, DatabaseUnavailable),
    opt={"user": UserMay.READ},
)
async def get_account(request: ApiRequest, user_id: UserId) -> AccountAnswer:
    """Return a user's account."""
    check_ids(user_id=user_id)
    account = await operations.read_account(_service(request), user_id)
    return account_answer(account, request.app.state["heartbeat_us"])


@get(
    "/users/{user_id:str}/ledger",
    summary="List a user's ledger",
    description="Newest first: what came in or was taken, and one charge for each closed segment that cost something, "
    "from when a pass or a command has written it.",
    tags=["accounts"],
    responses=problems(400, 401, 403, UserNotFound, 429, DatabaseUnavailable),
    opt={"user": UserMay.READ, "query": _PAGED},
)
async def get_ledger(request: ApiRequest, user_id: UserId, limit: Limit = None, cursor: Cursor = None) -> LedgerPage:
    """Return a page of a user's ledger."""
    check_ids(user_id=user_id)
    before = read_cursor("ledger", cursor)
    entries, key = await operations.read_ledger(_service(request), user_id, before=before, limit=parse_limit(limit))
    return LedgerPage([ledger_entry_body(entry) for entry in entries], write_cursor("ledger", key))


# --- chats ------------------------------------------------------------------------------------------------------------


@post(
    f"{_CHAT}/start",
    status_code=200,
    summary="Start a chat's clock",
    description="Makes the chat if there is none, and the user's account too, so that free time works at once; with a "
    "user's token the chat must exist. A clock that runs already gets a heartbeat. The user's other running chats in "
    "the exclusivity scope stop at the same instant. The reading says whether the clock runs (`accruing`): without "
    "credits or free time it does not.",
    tags=["chats"],
    responses=problems(
        400, 401, 403, ChatNotFound, WrongAdvisor, 408, 413, 415, IdempotencyKeyReused, 429, DatabaseUnavailable
    ),
    opt={"user": UserMay.CONTROL, "body": StartBody, "key": "optional"},
)
async def start(
    request: ApiRequest,
    user_id: UserId,
    chat_id: ChatId,
    data: JSONBody[StartBody],
    idempotency_key: StartKey = None,
) -> ReadingBody:
    """Start a chat's clock."""
    check_ids(user_id=user_id, chat_id=chat_id)
    reading = await operations.start(
        _service(request),
        user_id,
        chat_id,
        advisor_id=str(data.advisor_id),
        key=idempotency_key,
        # Whoever makes a chat binds its advisor, and so its price.
        create=isinstance(request.auth, ServiceCaller),
    )
    return _shown(request, reading)


@post(
    f"{_CHAT}/heartbeat",
    status_code=200,
    summary="Keep a chat's clock running",
    description="Renews the lease of a running clock and resumes a lapsed one. A paused or exhausted chat stays so. "
    "An abandoned or ended chat answers 409 with its reading: start it again.",
    tags=["chats"],
    responses=problems(400, 401, 403, ChatNotFound, ChatNotActive, 408, 413, 429, Overloaded, DatabaseUnavailable),
    opt={"user": UserMay.BEAT},
)
async def heartbeat(request: ApiRequest, user_id: UserId, chat_id: ChatId) -> ReadingBody:
    """Keep a chat's clock running."""
    check_ids(user_id=user_id, chat_id=chat_id)
    return _shown(request, await operations.heartbeat(_service(request), user_id, chat_id))


@post(
    "/heartbeats",
    status_code=200,
    summary="Keep many chats' clocks running",
    description=f"Up to {BEATS_MAX:,} heartbeats at once, for a gateway that holds the connections of many users. Each "
    "has a result of its own, with the status that it would have got by itself, and none fails another; one that is "
    "malformed has the result 400. The request as a whole is refused only where it is no object with a list of "
    "`beats`, or they are too many.",
    tags=["chats"],
    responses=problems(400, 401, 403, 408, 413, 415, 429, DatabaseUnavailable),
    opt={"body": BeatsBody},
    request_max_body_size=BEATS_BYTES_MAX,
)
async def heartbeats(request: ApiRequest, data: JSONBody[BeatsBody]) -> BeatResults:
    """Keep many chats' clocks running."""
    valid = [(beat.user_id, beat.chat_id) for beat in data.beats if is_id(beat.user_id) and is_id(beat.chat_id)]
    request.app.state["meters"].observe_many(len(data.beats))
    found = dict(zip(valid, await beats.heartbeats(_service(request), valid), strict=True))
    return BeatResults([_beat_result(found.get((beat.user_id, beat.chat_id))) for beat in data.beats])


@post(
    f"{_CHAT}/pause",
    status_code=200,
    summary="Pause a chat",
    description="Stops a running clock. A chat that does not run stays as it is.",
    tags=["chats"],
    responses=problems(400, 401, 403, ChatNotFound, 408, 413, 429, DatabaseUnavailable),
    opt={"user": UserMay.CONTROL},
)
async def pause(request: ApiRequest, user_id: UserId, chat_id: ChatId) -> ReadingBody:
    """Pause a chat."""
    check_ids(user_id=user_id, chat_id=chat_id)
    return _shown(request, await operations.pause(_service(request), user_id, chat_id))


@post(
    f"{_CHAT}/stop",
    status_code=200,
    summary="End a chat",
    description="The first stop wins; later ones change nothing. A start opens the chat again.",
    tags=["chats"],
    responses=problems(400, 401, 403, ChatNotFound, 408, 413, 429, DatabaseUnavailable),
    opt={"user": UserMay.CONTROL},
)
async def stop(request: ApiRequest, user_id: UserId, chat_id: ChatId) -> ReadingBody:
    """End a chat."""
    check_ids(user_id=user_id, chat_id=chat_id)
    return _shown(request, await operations.stop(_service(request), user_id, chat_id))


@get(
    _CHAT,
    summary="Read a chat's clock",
    description="Changes nothing and locks nothing: poll it as often as you like. An advisor may read the chats with "
    "this advisor, without `balance`, `exhausts_at` and `materialized_through`.",
    tags=["chats"],
    responses=problems(400, 401, 403, ChatNotFound, 429, Overloaded, DatabaseUnavailable),
    opt={"user": UserMay.READ, "advisor": True},
)
async def get_chat(request: ApiRequest, user_id: UserId, chat_id: ChatId) -> ReadingBody:
    """Return a chat's reading."""
    check_ids(user_id=user_id, chat_id=chat_id)
    if isinstance(request.auth, AdvisorCaller):
        # Asked alone, so that the time of the answer does not tell either whether there is such a chat.
        if await operations.advisor_of(_service(request), user_id, chat_id) != request.auth.advisor_id:
            raise refuse_caller()
        reading = await operations.read_chat(_service(request), user_id, chat_id)
        return reading_body(reading, request.app.state["heartbeat_us"], for_advisor=True)
    return _shown(request, await operations.read_chat(_service(request), user_id, chat_id))


@get(
    "/users/{user_id:str}/chats",
    summary="List a user's chats",
    description="Their readings, the chat started last first.",
    tags=["chats"],
    responses=problems(400, 401, 403, UserNotFound, 429, DatabaseUnavailable),
    opt={"user": UserMay.READ, "query": ("state", *_PAGED)},
)
async def get_chats(
    request: ApiRequest,
    user_id: UserId,
    in_state: State = None,
    limit: Limit = None,
    cursor: Cursor = None,
) -> ReadingPage:
    """Return a page of readings."""
    check_ids(user_id=user_id)
    wanted, after = parse_state(in_state), read_chats_cursor(cursor)
    readings, key = await operations.read_chats(
        _service(request), user_id, state=wanted, after=after, limit=parse_limit(limit)
    )
    return ReadingPage([_shown(request, reading) for reading in readings], write_chats_cursor(key))


@get(
    f"{_CHAT}/segments",
    summary="List a chat's segments",
    description="The receipt: each stretch in which the clock ran, why it stopped, its free and paid time, and its "
    "cost. Oldest first.",
    tags=["chats"],
    responses=problems(400, 401, 403, UserNotFound, ChatNotFound, 429, DatabaseUnavailable),
    opt={"user": UserMay.READ, "query": _PAGED},
)
async def get_segments(
    request: ApiRequest, user_id: UserId, chat_id: ChatId, limit: Limit = None, cursor: Cursor = None
) -> SegmentPage:
    """Return a page of a chat's segments."""
    check_ids(user_id=user_id, chat_id=chat_id)
    after = read_cursor("segments", cursor)
    segments, key = await operations.read_segments(
        _service(request), user_id, chat_id, after=after, limit=parse_limit(limit)
    )
    return SegmentPage([segment_body(segment) for segment in segments], write_cursor("segments", key))
