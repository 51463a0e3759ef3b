"""How often one may call: a rate for each caller, kept in the memory of this process.

The rate is kept by GCRA, the bucket of telephone networks: one instant per caller, in integer nanoseconds of a
monotonic clock, says all that there is to know. So a process holds one small entry for each caller of the last
moments, and forgets it as soon as it no longer matters.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from ipaddress import IPv6Address, ip_address
from time import monotonic_ns

from litestar.types import Scope

from talktime.api.callers import AdvisorCaller, UserCaller
from talktime.api.problems import refuse_flood
from talktime.keys import digest_of
from talktime.settings import RequestLimits

SECOND_NS = 1_000_000_000
BURST_SECONDS = 2
"""How many seconds' worth of requests may come at once: a page that is opened asks for much at first."""
CALLERS_MAX = 100_000
"""How many callers a process remembers. Beyond that, the one heard longest ago is forgotten, and begins afresh."""

COOKIES_MAX = 1_000

Ticks = Callable[[], int]


class Rate:
    """So many requests a second for each caller, and `BURST_SECONDS` of them at once."""

    def __init__(self, per_second: int, *, callers_max: int = CALLERS_MAX, ticks: Ticks = monotonic_ns) -> None:
        # Rounded up, and never more than the second that a refused caller is told to wait.
        self._interval = -(-SECOND_NS // per_second)
        self._slack = self._interval * (BURST_SECONDS * per_second - 1)
        self._callers_max = callers_max
        self._ticks = ticks
        # When each caller's bucket will be empty, in the order in which the callers were last let in.
        self._empty_at: OrderedDict[Hashable, int] = OrderedDict()

    def __len__(self) -> int:
        """How many callers are remembered."""
        return len(self._empty_at)

    def take(self, caller: Hashable) -> bool:
        """Let a caller in and count it; False, and nothing counted, if that would be one too many."""
        now = self._ticks()
        empty_at = max(self._empty_at.get(caller, now), now)
        if empty_at - now > self._slack:
            return False
        self._empty_at[caller] = empty_at + self._interval
        self._empty_at.move_to_end(caller)
        self._forget(now)
        return True

    def _forget(self, now: int) -> None:
        """Drop the callers, out of those heard longest ago, who are as good as new; and one too many in any case."""
        # Two for the one that may have come: so all that can go does go, at a cost that no request feels.
        for _ in range(2):
            caller, empty_at = next(iter(self._empty_at.items()))
            if empty_at > now and len(self._empty_at) <= self._callers_max:
                break
            del self._empty_at[caller]


class Limits:
    """The rates of an application.

    Users and advisors are counted by their ids, services by their keys. Those without a credential in force are counted
    by the address that they come from, and only after the credential was looked at: who has a good one is let in,
    whatever else comes from behind the same proxy. Only cookies that this process does not know are counted before.
    """

    def __init__(self, limits: RequestLimits, *, ticks: Ticks = monotonic_ns) -> None:
        def rate(per_second: int | None) -> Rate | None:
            return None if per_second is None else Rate(per_second, ticks=ticks)

        self._people = rate(limits.per_user)
        self._expired = rate(limits.per_user)
        self._services = rate(limits.per_service)
        self._refused = rate(limits.refused)
        self._unknown_cookies = rate(limits.refused)
        self._cookies: OrderedDict[bytes, None] = OrderedDict()

    def count_person(self, caller: UserCaller | AdvisorCaller) -> None:
        """Count a request of a user or an advisor.

        Raises:
            Refusal: there were too many.
        """
        if self._people is not None and not self._people.take(caller):
            raise refuse_flood()

    def count_expired(self, caller: UserCaller | AdvisorCaller) -> None:
        """Count a request with a token that was good once: beside the others, for anybody may hold an old one.

        Raises:
            Refusal: there were too many.
        """
        if self._expired is not None and not self._expired.take(caller):
            raise refuse_flood()

    def count_service(self, digest: bytes) -> None:
        """Count a request of the service whose key has this digest.

        Raises:
            Refusal: there were too many.
        """
        if self._services is not None and not self._services.take(digest):
            raise refuse_flood()

    def count_refused(self, scope: Scope) -> None:
        """Count a request that no credential lets in.

        Raises:
            Refusal: there were too many from this client's address.
        """
        if self._refused is not None and not self._refused.take(_place_of(scope)):
            raise refuse_flood()

    def count_cookie(self, cookie: str, scope: Scope) -> None:
        """Count a cookie that may name no session: the database has to be asked, for each that anybody makes up.

        Raises:
            Refusal: there were too many from this client's address.
        """
        is_known = digest_of(cookie) in self._cookies
        if not is_known and self._unknown_cookies is not None and not self._unknown_cookies.take(_place_of(scope)):
            raise refuse_flood()

    def remember_cookie(self, cookie: str) -> None:
        """Do not count this cookie from now on: it names a session."""
        digest = digest_of(cookie)
        self._cookies[digest] = None
        self._cookies.move_to_end(digest)
        if len(self._cookies) > COOKIES_MAX:
            self._cookies.popitem(last=False)

    def forget_cookie(self, cookie: str) -> None:
        """Count this cookie again: its session is over."""
        self._cookies.pop(digest_of(cookie), None)


def _place_of(scope: Scope) -> str:
    """Return the client's address; of IPv6, the network: whoever has one address there has them all."""
    client = scope.get("client")
    text = client[0] if client else ""
    try:
        address = ip_address(text)
    except ValueError:
        return text  # of a socket in the file system, or what a proxy calls it
    if isinstance(address, IPv6Address):
        return str(address.ipv4_mapped or int(address) >> 64)
    return text
