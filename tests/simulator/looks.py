"""Looking at the service, and at what the reference says: nothing that is shown may differ."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from http.client import NOT_FOUND, OK
from typing import Any

from tests.meter.reference import Reference
from tests.simulator.beliefs import Belief
from tests.simulator.readings import figures, instant, micro, reading_mismatch
from tests.simulator.service import Api, differ

STATES = ("running", "lapsed", "paused", "exhausted", "abandoned", "ended")
KINDS = ("list",) * 12 + ("each", "account", "by state")


class Looks:
    """A user's beliefs, held against what any of the API processes shows of the user at an instant."""

    def __init__(self, choose_api: Callable[[], Api], chance: random.Random, totals: Counter[str]) -> None:
        self._choose_api = choose_api
        self._chance = chance
        self._totals = totals

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
        """Look at all that is shown of a user."""
        left = self._at_list(user_id, beliefs, now)
        account = left[0].account
        if account is not None:
            self._at_account(user_id, account, now)
            self._at_receipts(user_id, account, now)
            self._at_ledger(user_id, left[0])
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
        mismatch = _readings_mismatch(account, shown, now)
        if mismatch is not None:
            differ(f"user {user_id}", mismatch)

    def _at_list_by_state(self, user_id: str, account: Reference, now: int) -> None:
        state = self._chance.choice(STATES)
        shown = self._get(f"/v1/users/{user_id}/chats?state={state}")["items"]
        view = _advanced(account, now)
        expected = {chat_id for chat_id, chat in view.chats.items() if chat.state == state}
        _same(f"chats of {user_id} that are {state}", expected, {body["chat_id"] for body in shown})
        self._compare(user_id, account, shown, now)

    def _at_account(self, user_id: str, account: Reference, now: int) -> None:
        shown = self._get(f"/v1/users/{user_id}/account")
        view = _advanced(account, now)
        running = {chat_id: chat for chat_id, chat in view.chats.items() if chat.state == "running"}
        accrued = sum(chat.tariff.cost(chat.count_us) - chat.tariff.cost(chat.open_count) for chat in running.values())
        _same("running chats", sorted(running), [body["chat_id"] for body in shown["running"]])
        _same("balance", (view.balance, accrued), (micro(shown["balance"]), micro(shown["accrued"])))
        _same("instants", (view.at, account.at), (instant(shown["as_of"]), instant(shown["materialized_through"])))
        self._compare(user_id, account, shown["running"], now)

    def _at_receipts(self, user_id: str, account: Reference, now: int) -> None:
        view = _advanced(account, now)
        for chat_id in view.chats:
            expected = [
                (s.started_at, s.ended_at, s.reason, s.free_us, s.paid_us, s.cost)
                for s in view.segments
                if s.chat_id == chat_id
            ]
            shown = [
                (
                    instant(item["started_at"]),
                    instant(item["ended_at"]),
                    item["stop_reason"],
                    item["free_us"],
                    item["paid_us"],
                    micro(item["cost"]),
                )
                for item in self._choose_api().get_pages(f"/v1/users/{user_id}/chats/{chat_id}/segments")
                if item["ended_at"] is not None
            ]
            _same(f"receipt of {user_id}'s chat {chat_id}", expected, shown)

    def _at_ledger(self, user_id: str, belief: Belief) -> None:
        assert belief.account is not None
        lines = list(self._choose_api().get_pages(f"/v1/users/{user_id}/ledger"))[::-1]
        charges = [
            (item["chat_id"], instant(item["segment_started_at"]), micro(item["amount"]))
            for item in lines
            if item["kind"] == "charge"
        ]
        expected = [(s.chat_id, s.started_at, -s.cost) for s in belief.account.segments if s.cost]
        _same(f"charges of {user_id}", sorted(expected), sorted(charges))
        booked = Counter((item["kind"], abs(micro(item["amount"]))) for item in lines if item["kind"] != "charge")
        _same(f"credits of {user_id}", Counter((c.kind, c.amount) for c in belief.credits.values()), booked)
        sum_of = 0
        for number, item in enumerate(lines, start=1):
            sum_of += micro(item["amount"])
            _same(f"ledger of {user_id}", (number, sum_of), (item["number"], micro(item["balance_after"])))


def _advanced(account: Reference, now: int) -> Reference:
    view = account.copy()
    view.advance(max(now, view.at))
    return view


def _list_mismatch(account: Reference | None, shown: list[Any] | None, now: int) -> str | None:
    if account is None or shown is None:
        return None if account is None and shown is None else "there is an account on one side only"
    newest_first = sorted(account.chats.values(), key=lambda chat: (chat.started_at, chat.chat_id), reverse=True)
    expected, listed = [chat.chat_id for chat in newest_first], [body["chat_id"] for body in shown]
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
