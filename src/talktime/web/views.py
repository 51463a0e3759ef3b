"""The console's pages. Whoever gets here is signed in: `talktime.web.console` sees to it."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from litestar import Request, Response, get, post
from litestar.exceptions import NotFoundException
from litestar.params import FromPath, FromQuery

from talktime import operating, operations
from talktime.api.bodies import Amount, Memo
from talktime.api.params import is_id, read_chats_cursor, read_cursor, write_chats_cursor, write_cursor
from talktime.errors import Conflict, IdempotencyKeyReused
from talktime.meter.reading import Reading
from talktime.meter.state import CreditKind
from talktime.meter.units import MICRO, MINUTE_US
from talktime.operating import KeptHour
from talktime.operations import SegmentView, Service
from talktime.store.openings import OpeningChat
from talktime.web import charts
from talktime.web.rendering import credits_exact, credits_short, iso, redirect, render, user_url
from talktime.web.sessions import Session, form_of, service_of

RUNNING_MAX = 100
USERS_MAX = 50
CHATS_MAX = 20
LEDGER_MAX = 20
SEGMENTS_MAX = 100
PASSES_MAX = 50
PASS_IS_LATE_US = MINUTE_US
REASON_LENGTH_MAX = 400
"""Of what an operator gives as a reason; the key's name comes after it, and all of it is a memo."""

_KEY_PREFIX = "console-"


def page(request: Request[Any, Any, Any], template: str, *, status: int = 200, **values: Any) -> Response[str]:  # noqa: ANN401 - templates take anything
    """Return a page of the console, for the session of the request."""
    session: Session = request.auth
    heartbeat_us = request.app.state["heartbeat_us"]
    return render(template, status=status, session=session, heartbeat_us=heartbeat_us, query="", **values)


# --- everybody --------------------------------------------------------------------------------------------------------


@get("/", include_in_schema=False)
async def overview(request: Request[Any, Any, Any]) -> Response[str]:
    """Show what runs now, and the last hour."""
    database = service_of(request).database
    kept = request.app.state.setdefault("last_hour", KeptHour())
    now = await operating.running_now(database, limit=RUNNING_MAX)
    hour = await operating.last_hour(database, kept)
    complete = now.complete
    live = [minute.live for minute in hour.minutes]
    costs = [minute.cost for minute in hour.minutes]
    return page(
        request,
        "overview.html",
        now=now,
        server_time=iso(now.as_of),
        # Where not all are at hand, as they were counted a moment ago.
        running_count=len(now.readings) if complete else hour.live,
        rate=operating.rate_of(now.readings) if complete else hour.rate,
        lag_us=await operating.lag(database),
        late_us=PASS_IS_LATE_US,
        hour=hour,
        plots=[
            (
                "Running chats",
                charts.steps(live, "Running chats", lambda value: f"{value:,}"),
                f"last hour, now {live[-1]:,}",
                [f"{minute:,}" for minute in live],
            ),
            (
                "Credits per minute",
                charts.bars(costs, "Credits per minute", _plain, unit=MICRO),
                f"last hour, {credits_short(costs[-1]).striptags()} in the last minute",
                [_plain(cost) for cost in costs],
            ),
        ],
    )


def _plain(amount: int) -> str:
    return credits_exact(amount).striptags().removesuffix(".00")


@get("/users", include_in_schema=False)
async def users(request: Request[Any, Any, Any], q: FromQuery[str] = "") -> Response[str]:
    """Find users by the beginning of their id; an id in full leads to its page."""
    text = q.strip()
    found: list[str] = []
    more = False
    if is_id(text):
        found, more = await operating.find_users(service_of(request).database, text, limit=USERS_MAX)
        if text in found[:1]:
            return redirect(user_url(text))
    session: Session = request.auth
    return render("users.html", session=session, query=text, found=found, more=more, valid=is_id(text))


@get("/passes", include_in_schema=False)
async def passes(request: Request[Any, Any, Any]) -> Response[str]:
    """Show the reconciler's last passes."""
    database = service_of(request).database
    made, now = await operating.last_passes(database, limit=PASSES_MAX)
    silent_us = now - (made[0].began_at + made[0].took_us) if made else None
    return page(request, "passes.html", passes=made, silent_us=silent_us, late_us=PASS_IS_LATE_US)


# --- one user ---------------------------------------------------------------------------------------------------------


def _new_key() -> str:
    return _KEY_PREFIX + secrets.token_urlsafe(16)


@dataclass(frozen=True, slots=True)
class CreditForm:
    """The form that credits a user, as typed; `key` makes it count once, however often it is sent."""

    key: str = field(default_factory=_new_key)
    kind: str = ""
    amount: str = ""
    reason: str = ""
    faults: Mapping[str, str] = field(default_factory=dict)
    refusal: str = ""


@get("/users/{user_id:str}", include_in_schema=False)
async def user(
    request: Request[Any, Any, Any],
    user_id: FromPath[str],
    chats: FromQuery[str | None] = None,
    ledger: FromQuery[str | None] = None,
    credited: FromQuery[str | None] = None,
) -> Response[str]:
    """Show a user's account, chats and ledger."""
    return await _user_page(request, user_id, CreditForm(), chats=chats, ledger=ledger, credited=credited)


async def _user_page(
    request: Request[Any, Any, Any],
    user_id: str,
    form: CreditForm,
    *,
    status: int = 200,
    chats: str | None = None,
    ledger: str | None = None,
    credited: str | None = None,
) -> Response[str]:
    _require_ids(user_id)
    service = service_of(request)
    account = await operations.read_account(service, user_id)
    readings, next_chats = await operations.read_chats(
        service, user_id, state=None, after=read_chats_cursor(chats), limit=CHATS_MAX
    )
    entries, next_entries = await operations.read_ledger(
        service, user_id, before=read_cursor("ledger", ledger), limit=LEDGER_MAX
    )
    return page(
        request,
        "user.html",
        status=status,
        user_id=user_id,
        account=account,
        server_time=iso(account.server_time),
        readings=readings,
        entries=entries,
        chats=chats,
        ledger=ledger,
        next_chats=write_chats_cursor(next_chats),
        next_entries=write_cursor("ledger", next_entries),
        # Told only of an entry that is there: anybody can make a link.
        credited=next((entry for entry in entries if str(entry.number) == credited), None),
        form=form,
        reason_max=REASON_LENGTH_MAX,
    )


@post("/users/{user_id:str}/credits", include_in_schema=False)
async def credit(request: Request[Any, Any, Any], user_id: FromPath[str]) -> Response[str]:
    """Credit a user, once for each form that was shown."""
    _require_ids(user_id)
    service = service_of(request)
    await operations.read_account(service, user_id)  # a slip of the pen makes no account
    given = await form_of(request)
    form = CreditForm(
        key=given.get("key", ""),
        kind=given.get("kind", ""),
        amount=given.get("amount", "").strip(),
        reason=given.get("reason", "").strip(),
    )
    if not form.key.startswith(_KEY_PREFIX) or not is_id(form.key):
        refused = replace(form, key=_new_key(), refusal="Something of this form was lost. Please send it again.")
        return await _user_page(request, user_id, refused, status=422)
    faults, amount, memo = _checked(form, request.auth)
    if faults:
        return await _user_page(request, user_id, replace(form, faults=faults), status=422)
    try:
        entry = await operations.credit(
            service, user_id, kind=CreditKind(form.kind), amount=amount, memo=memo, key=form.key
        )
    except IdempotencyKeyReused:
        refusal = (
            "This form was sent before, with something else in it, and that was booked. Look at the ledger; if this is "
            "to be booked as well, send it again."
        )
        return await _user_page(request, user_id, replace(form, key=_new_key(), refusal=refusal), status=409)
    except Conflict as error:
        refused = replace(form, refusal=f"Nothing was booked: {error}.")
        return await _user_page(request, user_id, refused, status=409)
    return redirect(f"{user_url(user_id)}?credited={entry.number}")


def _checked(form: CreditForm, session: Session) -> tuple[dict[str, str], int, str]:
    """Return what is wrong with the fields, by name; and the amount and the memo, if nothing is."""
    faults = {}
    amount, memo = 0, ""
    if form.kind not in set(CreditKind):
        faults["kind"] = "Choose what kind of credit this is."
    try:
        amount = int(Amount.parse(form.amount))
    except ValueError as error:
        faults["amount"] = f"The amount {error}." if form.amount else "Say how many credits."
    try:
        memo = str(Memo.parse(f"by {session.key_name}: {form.reason}"))
    except ValueError as error:
        faults["reason"] = f"The reason {error}."
    if not form.reason:
        faults["reason"] = "Say why; it is kept in the ledger."
    elif len(form.reason) > REASON_LENGTH_MAX:
        faults["reason"] = f"The reason must be at most {REASON_LENGTH_MAX} characters."
    return faults, amount, memo


@dataclass(frozen=True, slots=True)
class Totals:
    """What a chat's segments add up to, or what it brought along: microseconds, and micro-credits."""

    elapsed_us: int
    free_us: int
    paid_us: int
    cost: int


def _totals_of(opening: OpeningChat) -> Totals:
    free_us = opening.chat_free_us
    return Totals(opening.elapsed_us, free_us, opening.elapsed_us - free_us, opening.cost)


def _totals(reading: Reading, segments: Sequence[SegmentView], before: Totals | None, *, complete: bool) -> Totals:
    """Return the chat's totals: of what is shown, if that is all, so that a running chat's add up too."""
    if not complete:
        elapsed_us, free_us = reading.elapsed_us, reading.free_used_us
        return Totals(elapsed_us, free_us, elapsed_us - free_us, reading.credits_used)
    parts: list[Totals | SegmentView] = [*segments]
    if before is not None:
        parts.append(before)
    return Totals(
        sum(part.elapsed_us for part in parts),
        sum(part.free_us for part in parts),
        sum(part.paid_us for part in parts),
        sum(part.cost for part in parts),
    )


@get("/users/{user_id:str}/chats/{chat_id:str}", include_in_schema=False)
async def chat(
    request: Request[Any, Any, Any],
    user_id: FromPath[str],
    chat_id: FromPath[str],
    after: FromQuery[str | None] = None,
) -> Response[str]:
    """Show a chat's receipt."""
    _require_ids(user_id, chat_id)
    service: Service = service_of(request)
    reading = await operations.read_chat(service, user_id, chat_id)
    segments, following = await operations.read_segments(
        service, user_id, chat_id, after=read_cursor("segments", after), limit=SEGMENTS_MAX
    )
    opening = await operating.read_opening(service.database, user_id, chat_id)
    before = None if opening is None else _totals_of(opening)
    return page(
        request,
        "chat.html",
        user_id=user_id,
        chat_id=chat_id,
        reading=reading,
        server_time=iso(reading.server_time),
        segments=segments,
        before=before,
        totals=_totals(reading, segments, before, complete=after is None and following is None),
        after=after,
        following=write_cursor("segments", following),
    )


def _require_ids(*ids: str) -> None:
    if not all(map(is_id, ids)):
        raise NotFoundException


HANDLERS = (overview, users, passes, user, credit, chat)
