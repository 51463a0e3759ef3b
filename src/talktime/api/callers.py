"""The kinds of callers, and what each may do. Who a caller is, `auth` finds out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from talktime.api.problems import refuse_caller
from talktime.settings import UserMay


@dataclass(frozen=True, slots=True)
class ServiceCaller:
    """A program of the host product with a service key; it may do everything."""


@dataclass(frozen=True, slots=True)
class UserCaller:
    """A user with a token of the host product; may do with the own chats, account and ledger what `UserMay` says."""

    user_id: str


@dataclass(frozen=True, slots=True)
class AdvisorCaller:
    """An advisor with a token of the host product; may read the clocks of the chats with this advisor."""

    advisor_id: str


Caller = ServiceCaller | UserCaller | AdvisorCaller


def check_access(caller: Caller, opt: Mapping[str, Any], path_params: Mapping[str, Any], user_may: UserMay) -> None:
    """Check that a caller may use a route.

    A handler's `opt` says who else than a service may: users from which `UserMay` on (`user`), on a path that names
    them; and advisors (`advisor`), whose chats the handler tells from others. A handler that says nothing is for
    services only.

    Raises:
        Refusal: this caller may not.
    """
    may = False
    match caller:
        case ServiceCaller():
            may = True
        case UserCaller(user_id):
            may = "user" in opt and opt["user"] <= user_may and path_params.get("user_id") == user_id
        case AdvisorCaller():
            may = bool(opt.get("advisor", False))
    if not may:
        raise refuse_caller()
