"""The commands for operators, straight on the database, and the words in which figures are told.

None of them needs a running API. Instants are shown in the time zone of who looks.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import uuid
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import pendulum
from rich.console import Console
from rich.table import Table

from talktime import keys, operating, operations
from talktime.errors import DatabaseUnavailable, UserNotFound
from talktime.meter.state import CreditKind, RateCard, Tariff
from talktime.meter.units import MICRO, ceil_div, format_credits, format_seconds
from talktime.operations import Service
from talktime.store.database import Database, provide_database

if TYPE_CHECKING:
    from talktime.keys import ServiceKey
    from talktime.settings import Settings
    from talktime.store.ledger import LedgerEntry
    from talktime.store.operators import LateEvent

T = TypeVar("T")

ADVISOR_ROLE = "advisor"


# --- service keys -----------------------------------------------------------------------------------------------------


def make_key(settings: Settings, name: str) -> None:
    """Make a service key; alone on standard output, so that a shell can take it into a variable."""
    key = _on_database(settings, lambda service: keys.new_key(service.database, name))
    print(key)
    print(
        f"The service key {name!r} is in force within 5 seconds. It is shown only now: what is kept is its hash.",
        file=sys.stderr,
    )


def show_keys(settings: Settings) -> None:
    """List the database's keys, the oldest first: a table on a terminal, else tab-separated lines."""
    found = _on_database(settings, lambda service: keys.list_keys(service.database))
    if not sys.stdout.isatty():
        for key in found:
            print(key_line(key))
        return
    table = Table("name", "made", "revoked")
    for key in found:
        revoked = "" if key.revoked_at is None else _date_in_words(key.revoked_at)
        table.add_row(key.name, _date_in_words(key.created_at), revoked)
    Console().print(table if found else "There is no key; `talktime key new NAME` makes one.")


def key_line(key: ServiceKey) -> str:
    """Write a key as a line: name, when it was made, and when it was revoked, if it was."""
    revoked = "" if key.revoked_at is None else local_time(key.revoked_at).to_iso8601_string()
    return f"{key.name}\t{local_time(key.created_at).to_iso8601_string()}\t{revoked}"


def revoke(settings: Settings, name: str) -> None:
    """Take a key out of force."""
    _on_database(settings, lambda service: keys.revoke_key(service.database, name))
    print(f"The service key {name!r} is revoked for ever. What still uses it is refused within 5 seconds.")


# --- tokens -----------------------------------------------------------------------------------------------------------


def mint_token(settings: Settings, subject: str, *, advisor: bool, seconds: int) -> None:
    """Print a token for a user's page, or an advisor's, signed with the settings' secret or else the home's own."""
    from talktime.api.tokens import local, mint  # noqa: PLC0415 - slow to import, and only this command needs it

    tokens = local(settings.home) if settings.tokens is None else settings.tokens
    print(mint(tokens, subject, seconds=seconds, role=ADVISOR_ROLE if advisor else None))


# --- credits and cards ------------------------------------------------------------------------------------------------


def credit(settings: Settings, user_id: str, *, amount: int, kind: CreditKind, memo: str, key: str | None) -> None:
    """Add credits to a user's balance, or take some, once per key."""
    key = key or str(uuid.uuid4())

    async def work(service: Service) -> str:
        try:
            newest, _ = await operations.read_ledger(service, user_id, before=None, limit=1)
        except UserNotFound:
            newest = []
        try:
            entry = await operations.credit(service, user_id, kind=kind, amount=amount, memo=memo, key=key)
        except DatabaseUnavailable as error:
            message = f"{error}; to repeat this without doing it twice, add --key {key}"
            raise DatabaseUnavailable(message) from error
        account = await operations.read_account(service, user_id)
        # Entries are numbered in order, so one that is not newer than the newest was there before.
        again = bool(newest) and entry.number <= newest[0].number
        return credited_in_words(entry, account.balance, again=again)

    print(_on_database(settings, work))


def credited_in_words(entry: LedgerEntry, balance: int, *, again: bool) -> str:
    """Say what a credit did, or that it changed nothing because it had been made before."""
    what = f"{entry.kind} of {credits_in_words(abs(entry.amount))}"
    now = credits_in_words(balance)
    if again:
        day = local_time(entry.recorded_at).to_day_datetime_string()
        return (
            f"{entry.user_id}: nothing changed, for this key made the {what} on {day} (ledger entry {entry.number});"
            f" the balance is {now}"
        )
    done = "taken from" if entry.amount < 0 else "added to"
    return f"{entry.user_id}: {what} {done} the balance, which is now {now} (ledger entry {entry.number})"


def advise(
    settings: Settings,
    advisor_id: str,
    *,
    rate: int | None,
    free_us: int | None,
    first_us: int | None,
    increment_us: int | None,
) -> None:
    """Show an advisor's card, after changing in it what is given; the rest stays as it is in the card in force."""

    async def work(service: Service) -> str:
        card, is_default = await operations.get_advisor(service, advisor_id)
        if rate is None and free_us is None and first_us is None and increment_us is None:
            return f"{advisor_id}: {card_in_words(card)}" + (" (the default card)" if is_default else "")
        tariff = Tariff(
            card.tariff.rate if rate is None else rate,
            card.tariff.first_us if first_us is None else first_us,
            card.tariff.increment_us if increment_us is None else increment_us,
        )
        card = RateCard(tariff, card.free_us if free_us is None else free_us)
        await operations.put_advisor(service, advisor_id, card)
        return f"{advisor_id}: {card_in_words(card)}"

    print(_on_database(settings, work))


# --- events -----------------------------------------------------------------------------------------------------------

EVENTS_SHOWN_MAX = 1_000


def show_events(settings: Settings, *, dead: bool) -> None:
    """List the events that were sent and not delivered, or the dead ones: tab-separated lines."""
    found, more = _on_database(
        settings, lambda service: operating.late_events(service.database, dead=dead, limit=EVENTS_SHOWN_MAX)
    )
    for event in found:
        print(event_line(event))
    if more:
        print(f"There are more than these {EVENTS_SHOWN_MAX}.", file=sys.stderr)


def event_line(event: LateEvent) -> str:
    """Write an event as a line: user, number, type, when it happened, attempts, next attempt or dead, last problem."""
    again = "dead" if event.next_try_at is None else utc_text(event.next_try_at)
    place = f"{event.user_id}\t{event.number}\t{event.type}\t{utc_text(event.occurred_at)}"
    return f"{place}\t{event.attempts}\t{again}\t{event.last_error or '-'}"


def retry_events(settings: Settings, user_id: str | None, *, number: int | None) -> None:
    """Have the dead events of a user, or of all users, sent again."""

    async def work(service: Service) -> int:
        if user_id is not None:
            return await operating.retry_events(service.database, user_id, number)
        count, more = 0, True
        while more:
            found, more = await operating.late_events(service.database, dead=True, limit=EVENTS_SHOWN_MAX)
            for of_user in sorted({event.user_id for event in found}):
                count += await operating.retry_events(service.database, of_user, None)
        return count

    count = _on_database(settings, work)
    print(f"{count} dead event{'' if count == 1 else 's'} will be sent again with the next pass.")


# --- words ------------------------------------------------------------------------------------------------------------


def local_time(at: int) -> pendulum.DateTime:
    """Return an instant in the time zone of who looks."""
    return _utc(at).in_timezone("local")


def utc_text(at: int | None) -> str:
    """Write an instant as in the API's answers; a dash for none."""
    return "-" if at is None else _utc(at).format("YYYY-MM-DD[T]HH:mm:ss.SSSSSS[Z]")


def _utc(at: int) -> pendulum.DateTime:
    seconds, rest = divmod(at, MICRO)
    return pendulum.from_timestamp(seconds).replace(microsecond=rest)


def _date_in_words(at: int) -> str:
    # How long ago it was goes by this machine's clock: to people, a second more or less is nothing.
    date = local_time(at)
    return f"{date.to_day_datetime_string()} ({date.diff_for_humans()})"


def clock_text(us: int) -> str:
    """Write a duration as a clock shows it, in whole seconds that have passed: ``0:03:07``."""
    minutes, seconds = divmod(us // MICRO, 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def duration_in_words(us: int) -> str:
    """Say a duration: "1 minute 30 seconds", or "0.5 seconds" where it is no whole number of them."""
    if us == 0 or us % MICRO:
        return f"{format_seconds(us)} seconds"
    return str(pendulum.duration(seconds=us // MICRO).in_words())


def wait_in_words(us: int) -> str:
    """Say how long it takes until something, in seconds begun."""
    return duration_in_words(ceil_div(max(0, us), MICRO) * MICRO)


def credits_in_words(amount: int) -> str:
    """Say an amount exactly, without idle zeros: "1.5 credits"."""
    text = format_credits(amount).rstrip("0").removesuffix(".")
    return f"{text} credit" if text == "1" else f"{text} credits"


def tariff_in_words(tariff: Tariff) -> str:
    """Say a price: "1.5 credits a minute, charged exactly"."""
    return f"{credits_in_words(tariff.rate)} a minute, {_blocks_in_words(tariff)}"


def card_in_words(card: RateCard) -> str:
    """Say a rate card: "1.5 credits a minute, the first 3 minutes free, charged exactly"."""
    free = f"the first {duration_in_words(card.free_us)} free" if card.free_us else "no free time"
    return f"{credits_in_words(card.tariff.rate)} a minute, {free}, {_blocks_in_words(card.tariff)}"


def _blocks_in_words(tariff: Tariff) -> str:
    first, increment = f"{format_seconds(tariff.first_us)} s", f"{format_seconds(tariff.increment_us)} s"
    if tariff.increment_us == 0:
        return f"the first {first} charged as a whole, then exactly" if tariff.first_us else "charged exactly"
    # Without a first block, or with one like the others, all are alike.
    alike = tariff.first_us in (0, tariff.increment_us)
    return f"in blocks of {increment}" if alike else f"in blocks of {first}, then {increment}"


# --- the database -----------------------------------------------------------------------------------------------------


def keep_quiet() -> None:
    """Leave it to the command's own words what is wrong with the database; the log's are for services."""
    logging.getLogger("talktime.store").setLevel(logging.ERROR)
    logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)


def _on_database(settings: Settings, work: Callable[[Service], Awaitable[T]]) -> T:
    async def run() -> T:
        database = Database(url, pool_size=1)
        try:
            return await work(Service(database, settings.policy, settings.default_card, settings.low_us))
        finally:
            await database.close()

    keep_quiet()
    with provide_database(settings.database_url, settings.home) as url:
        return asyncio.run(run())
