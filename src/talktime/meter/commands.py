"""The commands: an account's state, an instant and a wish -> the account's next state.

Each advances the account to the instant, applies the wish, and settles: a clock that cannot pay its next tick stops at
that very instant. A refused command raises, and the caller writes nothing. `now` may lie before the account's own
instant, if the clock stepped back; the command then happens at the account's instant.
"""

from __future__ import annotations

from collections.abc import Mapping

from talktime.errors import (
    BalanceLimitExceeded,
    ChatNotActive,
    ChatNotFound,
    IdempotencyKeyReused,
    InsufficientBalance,
    WrongAdvisor,
)
from talktime.meter.advance import advance
from talktime.meter.state import (
    TRANSITIONS,
    Account,
    Allowance,
    Chat,
    ChatState,
    Credit,
    CreditKind,
    Event,
    Policy,
    RateCard,
    Scope,
    Segment,
    StopReason,
    halt,
    seniority,
)
from talktime.meter.units import MAX_BALANCE, format_credits


def start(
    account: Account,
    now: int,
    *,
    chat_id: str,
    advisor_id: str,
    card: RateCard,
    policy: Policy,
    key: str | None = None,
) -> Account:
    """Run the chat's clock from this instant, and stop the others in the scope at the same instant.

    On a running chat this is a heartbeat. A `key` that equals the one of the chat's latest start changes nothing. If
    the clock could not run even its first tick, the chat is `exhausted`, nobody is switched and no tariff changes.

    Raises:
        WrongAdvisor: the chat belongs to another advisor.
        IdempotencyKeyReused: the key came with another advisor.
    """
    account = advance(account, max(now, account.at))
    chat = account.chats.get(chat_id)
    if chat is not None:
        if key is not None and key == chat.start_key:
            if advisor_id != chat.advisor_id:
                raise IdempotencyKeyReused
            return account
        if advisor_id != chat.advisor_id:
            raise WrongAdvisor(chat_id)
        if chat.state is ChatState.RUNNING:
            return _with_chats(account, _alive(chat, account.at, policy)._replace(start_key=key))
        chat = _alive(chat, account.at, policy)._replace(start_key=key)
    else:
        chat = Chat(
            chat_id=chat_id,
            advisor_id=advisor_id,
            state=ChatState.PAUSED,
            tariff=card.tariff,
            lease_us=policy.lease_us,
            abandon_after_us=policy.abandon_after_us,
            last_heartbeat_at=account.at,
            started_at=account.at,
            start_key=key,
        )
    allowances = {advisor_id: Allowance(card.free_us, 0), **account.allowances}
    account = account._replace(allowances=allowances)
    repriced = chat if chat.tariff == card.tariff else chat._replace(tariff=card.tariff, count_us=0)
    started = advance(
        _with_chats(_switch(account, chat, policy.scope), _opened(repriced, account.at, Event.START)), account.at
    )
    if started.chats[chat_id].state is ChatState.RUNNING:
        return started
    return _with_chats(account, _refused(chat, account.at))


def heartbeat(account: Account, now: int, *, chat_id: str, policy: Policy) -> Account:
    """Renew the lease of a running chat; resume a lapsed one unless another in the scope runs; else a sign of life.

    Raises:
        ChatNotFound: the user has no such chat.
        ChatNotActive: it is abandoned or ended.
    """
    account = advance(account, max(now, account.at))
    chat = _known(account, chat_id)
    if chat.state not in TRANSITIONS[Event.BEAT]:
        raise ChatNotActive(chat_id, chat.state)
    chat = _alive(chat, account.at, policy)
    account = _with_chats(account, chat)
    occupied = any(other.state is ChatState.RUNNING for other in _others_in_scope(account, chat, policy.scope))
    if chat.state is not ChatState.LAPSED or occupied:
        return account
    resumed = advance(_with_chats(account, _opened(chat, account.at, Event.RESUME)), account.at)
    if resumed.chats[chat_id].state is ChatState.RUNNING:
        return resumed
    return _with_chats(account, _refused(chat, account.at))


def pause(account: Account, now: int, *, chat_id: str, policy: Policy) -> Account:
    """Pause a running or lapsed chat; a sign of life from a paused or exhausted one; nothing on the others.

    Raises:
        ChatNotFound: the user has no such chat.
    """
    account = advance(account, max(now, account.at))
    chat = _known(account, chat_id)
    if chat.state not in TRANSITIONS[Event.PAUSE]:
        return account
    return _leave(account, _alive(chat, account.at, policy), Event.PAUSE)


def stop(account: Account, now: int, *, chat_id: str) -> Account:
    """End a chat. The first stop wins; a later one changes nothing.

    Raises:
        ChatNotFound: the user has no such chat.
    """
    account = advance(account, max(now, account.at))
    chat = _known(account, chat_id)
    if chat.state not in TRANSITIONS[Event.STOP]:
        return account
    return _leave(account, chat._replace(revision=chat.revision + 1), Event.STOP)


def credit(account: Account, now: int, *, kind: CreditKind, amount: int, memo: str, key: str) -> Account:
    """Add or take a positive amount of micro-credits, as the kind says.

    Raises:
        InsufficientBalance: the balance, after all that is accrued, is smaller than what is to be taken.
        BalanceLimitExceeded: the balance would pass `MAX_BALANCE`.
    """
    account = advance(account, max(now, account.at))
    signed = -amount if kind.takes else amount
    balance = account.balance + signed
    if balance < 0:
        raise InsufficientBalance(format_credits(account.balance))
    # What open segments accrued is still in the ledger's running sum, which has to fit its column too.
    accrued = sum(chat.accrued for chat in account.chats.values())
    if signed > 0 and balance + accrued > MAX_BALANCE:
        raise BalanceLimitExceeded(format_credits(MAX_BALANCE))
    entry = Credit(kind=kind, amount=signed, credited_at=account.at, memo=memo, key=key)
    return advance(account._replace(balance=balance, journal=(*account.journal, entry)), account.at)


def _known(account: Account, chat_id: str) -> Chat:
    try:
        return account.chats[chat_id]
    except KeyError:
        raise ChatNotFound(account.user_id, chat_id) from None


def _with_chats(account: Account, *chats: Chat) -> Account:
    merged: Mapping[str, Chat] = {**account.chats, **{chat.chat_id: chat for chat in chats}}
    return account._replace(chats=merged)


def _alive(chat: Chat, at: int, policy: Policy) -> Chat:
    """Return the chat after a sign of life at `at`, under the present settings. A heartbeat never moves backwards."""
    return chat._replace(
        last_heartbeat_at=max(chat.last_heartbeat_at, at),
        lease_us=policy.lease_us,
        abandon_after_us=policy.abandon_after_us,
        revision=chat.revision + 1,
    )


def _opened(chat: Chat, at: int, event: Event) -> Chat:
    return chat._replace(
        state=TRANSITIONS[event][chat.state],
        opened_at=at,
        opened_count_us=chat.count_us,
        stopped_at=None,
        stop_reason=None,
    )


def _refused(chat: Chat, at: int) -> Chat:
    return chat._replace(
        state=TRANSITIONS[Event.REFUSE][chat.state],
        stopped_at=at,
        stop_reason=StopReason.EXHAUSTED,
    )


def _leave(account: Account, chat: Chat, event: Event) -> Account:
    """Take a chat out of its state by an event that also stops its clock if it runs."""
    segment: Segment | None = None
    if chat.state is ChatState.RUNNING:
        chat, segment = halt(chat, account.at, event)
    else:
        chat = chat._replace(state=TRANSITIONS[event][chat.state])
    journal = account.journal if segment is None else (*account.journal, segment)
    return _with_chats(account, chat)._replace(journal=journal)


def _others_in_scope(account: Account, chat: Chat, scope: Scope) -> list[Chat]:
    """Return the user's other chats whose clocks exclude that of `chat`, in order of seniority."""
    if scope is Scope.NONE:
        return []
    others = (
        other
        for other in account.chats.values()
        if other.chat_id != chat.chat_id and (scope is Scope.USER or other.advisor_id == chat.advisor_id)
    )
    return sorted(others, key=seniority)


def _switch(account: Account, chat: Chat, scope: Scope) -> Account:
    """Stop all other clocks in the scope. Lapsed ones are paused too, so that their heartbeats cannot take it back."""
    for other in _others_in_scope(account, chat, scope):
        if other.state in TRANSITIONS[Event.SWITCH]:
            left = other._replace(
                last_heartbeat_at=max(other.last_heartbeat_at, account.at),
                revision=other.revision + 1,
            )
            account = _leave(account, left, Event.SWITCH)
    return account
