"""Looking at the service, and at what the reference says: nothing that is shown may differ."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from http.client import NOT_FOUND, OK
from typing import Any

from tests.meter.reference import Chat, Reference
from tests.simulator.beliefs import Belief
from tests.simulator.readings import amount, figures, instant, micro, reading_mismatch, tariff_of
from tests.simulator.service import Api, Command, Difference, differ

STATES = ("running", "lapsed", "paused", "exhausted", "abandoned", "ended")
KINDS = ("list",) * 12 + ("each", "account", "by state")


class Looks:
    """A user's beliefs, held against what any of the API processes shows of the user at an instant."""

    def __init__(self, choose_api: Callable[[], Api], chance: random.Random, totals: Counter[str]) -> None:
        self._choose_api = choose_api
        self._chance = chance
        self._totals = totals
        self._entries: dict[tuple[str, str], Any] = {}  # by user and Idempotency-Key

    def keep_entry(self, command: Command, entry: Any) -> None:  # noqa: ANN401 - JSON
        """Keep the ledger entry with which a credit was answered; a repetition must be answered with the same.

        Raises:
            Difference: it is not, or not what was asked for.
        """
        first = self._entries.setdefault((command.user_id, command.key or ""), entry)
        _same(f"answer to {command}", first, entry)
        _same(f"amount of {command}", (command.kind, _signed(command)), (entry["kind"], micro(entry["amount"])))

    def at(self, user_id: str, beliefs: list[Belief], now: int) -> list[Belief]:
        """Look at a user in one of several ways; returns the beliefs that agree.

        Raises:
            Difference: none does.
        """
        kind = self._chance.choice(KINDS)
        account = beliefs[0].account
        if len(beliefs) > 1 or account is None or kind == "list":
            return self._at_list(user_id, beliefs, now)
        if kind == "each":
            for chat_id in account.chats:
                self._compare(user_id, account, [self._get(f"/v1/users/{user_id}/chats/{chat_id}")], now)
        elif kind == "by state":
            self._at_list_by_state(user_id, account, now)
        else:
            self._at_account(user_id, account, now)
        return beliefs

    def at_all(self, user_id: str, beliefs: list[Belief], now: int) -> list[Belief]:
        """Look at all that is shown of a user; returns the beliefs that agree.

        Raises:
            Difference: none does.
        """
        left, differences = [], []
        for belief in self._at_list(user_id, beliefs, now):
            try:
                if belief.account is not None:
                    self._at_account(user_id, belief.account, now)
                    self._at_receipts(user_id, belief.account, now)
                    self._at_ledger(user_id, belief)
            except Difference as difference:
                differences.append(difference)
            else:
                left.append(belief)
        if not left:
            raise differences[0]
        return left

    def _get(self, path: str) -> Any:  # noqa: ANN401 - JSON
        answer = self._choose_api().get(path)
        if answer.status != OK:
            differ(path, answer)
        return answer.body

    def _at_list(self, user_id: str, beliefs: list[Belief], now: int) -> list[Belief]:
        answer = self._choose_api().get(f"/v1/users/{user_id}/chats?limit=200")
        if answer.status not in (OK, NOT_FOUND):
            differ(user_id, answer)
        shown = answer.body["items"] if answer.status == OK else None
        self._totals["readings"] += len(shown or ())
        mismatches, left = [], []
        for belief in beliefs:
            mismatch = _list_mismatch(belief.account, shown, now)
            if mismatch is None:
                left.append(belief)
            else:
                mismatches.append(mismatch)
        if not left:
            differ(f"user {user_id}", "\n or ".join(mismatches))
        return left

    def _compare(self, user_id: str, account: Reference, shown: list[Any], now: int) -> None:
        self._totals["readings"] += len(shown)
        _same(f"users of {user_id}'s readings", {user_id} if shown else set(), {body["user_id"] for body in shown})
        mismatch = _readings_mismatch(account, shown, now)
        if mismatch is not None:
            differ(f"user {user_id}", mismatch)

    def _pages(self, path: str, query: str = "") -> list[Any]:
        """Read all of a list, sometimes in small pages."""
        limit = self._chance.choice((1, 2, 3, 200, 200, 200))
        return list(self._choose_api().get_pages(path, query, limit=limit))

    def _at_list_by_state(self, user_id: str, account: Reference, now: int) -> None:
        state = self._chance.choice(STATES)
        shown = self._pages(f"/v1/users/{user_id}/chats", f"&state={state}")
        chats = [chat for chat in _newest_first(_advanced(account, now)) if chat.state == state]
        _same(
            f"chats of {user_id} that are {state}",
            [chat.chat_id for chat in chats],
            [body["chat_id"] for body in shown],
        )
        self._compare(user_id, account, shown, now)

    def _at_account(self, user_id: str, account: Reference, now: int) -> None:
        shown = self._get(f"/v1/users/{user_id}/account")
        view = _advanced(account, now)
        running = [chat for _, chat in sorted(view.chats.items()) if chat.state == "running"]
        accrued = sum(chat.tariff.cost(chat.count_us) - chat.tariff.cost(chat.open_count) for chat in running)
        _same("running chats", [chat.chat_id for chat in running], [body["chat_id"] for body in shown["running"]])
        _same("balance", (view.balance, accrued), (micro(shown["balance"]), micro(shown["accrued"])))
        instants = [instant(shown[name]) for name in ("as_of", "server_time", "materialized_through")]
        _same("instants", [view.at, now, account.at], instants)
        # What each must be is compared with the readings themselves.
        exhaustions = [body["exhausts_at"] for body in shown["running"] if body["exhausts_at"] is not None]
        _same("exhausts_at", min(exhaustions, default=None), shown["exhausts_at"])
        self._compare(user_id, account, shown["running"], now)

    def _at_receipts(self, user_id: str, account: Reference, now: int) -> None:
        view = _advanced(account, now)
        for chat_id, chat in view.chats.items():
            segments = [s for s in view.segments if s.chat_id == chat_id]
            expected: list[tuple[object, ...]] = [
                (s.started_at, s.ended_at, s.reason, s.ended_at - s.started_at, s.free_us, s.paid_us, s.cost, s.tariff)
                for s in segments
            ]
            if chat.open_started_at is not None:
                length_us, cost = view.at - chat.open_started_at, chat.tariff.cost(chat.count_us)
                free_us, cost = chat.open_free_us, cost - chat.tariff.cost(chat.open_count)
                figures_ = (length_us, free_us, length_us - free_us, cost, chat.tariff)
                expected.append((chat.open_started_at, None, None, *figures_))
            shown = [
                (
                    instant(item["started_at"]),
                    instant(item["ended_at"]),
                    item["stop_reason"],
                    *(item[name] for name in ("elapsed_us", "free_us", "paid_us")),
                    micro(item["cost"]),
                    tariff_of(item),
                )
                for item in self._pages(f"/v1/users/{user_id}/chats/{chat_id}/segments")
            ]
            _same(f"receipt of {user_id}'s chat {chat_id}", expected, shown)

    def _at_ledger(self, user_id: str, belief: Belief) -> None:
        account = belief.account
        assert account is not None
        lines = self._pages(f"/v1/users/{user_id}/ledger")[::-1]
        charges = [
            (item["chat_id"], *(instant(item[name]) for name in ("segment_started_at", "happened_at")), item["amount"])
            for item in lines
            if item["kind"] == "charge"
        ]
        expected = [(s.chat_id, s.started_at, s.ended_at, amount(-s.cost)) for s in account.segments if s.cost]
        _same(f"charges of {user_id}", sorted(expected), sorted(charges))
        booked = Counter((item["kind"], micro(item["amount"])) for item in lines if item["kind"] != "charge")
        _same(f"credits of {user_id}", Counter((c.kind, _signed(c)) for c in belief.credits.values()), booked)
        for (owner, _), entry in self._entries.items():
            if owner == user_id:
                _same(f"entry {entry['number']} of {user_id}", entry, lines[entry["number"] - 1])
        sum_of = 0
        for number, item in enumerate(lines, start=1):
            sum_of += micro(item["amount"])
            _same(f"ledger of {user_id}", (number, sum_of), (item["number"], micro(item["balance_after"])))
        _same(f"sum of {user_id}'s ledger", account.credited - sum(s.cost for s in account.segments), sum_of)


def _signed(command: Command) -> int:
    return -command.amount if command.kind in ("refund", "correction") else command.amount


def _newest_first(account: Reference) -> list[Chat]:
    return sorted(account.chats.values(), key=lambda chat: (chat.started_at, chat.chat_id), reverse=True)


def _advanced(account: Reference, now: int) -> Reference:
    view = account.copy()
    view.advance(max(now, view.at))
    return view


def _list_mismatch(account: Reference | None, shown: list[Any] | None, now: int) -> str | None:
    if account is None or shown is None:
        return None if account is None and shown is None else "there is an account on one side only"
    expected, listed = [chat.chat_id for chat in _newest_first(account)], [body["chat_id"] for body in shown]
    if expected != listed:
        return f"the chats {listed} are listed, and must be {expected}"
    return _readings_mismatch(account, shown, now)


def _readings_mismatch(account: Reference, shown: list[Any], now: int) -> str | None:
    view = _advanced(account, now)  # once for all readings
    for body in shown:
        expected = {**figures(view, body["chat_id"], now), "materialized_through": account.at}
        mismatch = reading_mismatch(expected, body)
        if mismatch is not None:
            return mismatch
    return None


def _same(what: str, expected: object, shown: object) -> None:
    if expected != shown:
        differ(what, f"expected {expected}, got {shown}")
