"""Until when the running clocks of an account are sure of their credits, as each running chat's row says.

So a heartbeat need not look at the rest of the account. It is found out under the account's lock, whenever more happens
to the account than that time passes; time alone leaves it as it was.
"""

from __future__ import annotations

from talktime.meter.advance import foretell
from talktime.meter.state import Account
from talktime.meter.units import END_OF_TIME_US

LATEST_US = END_OF_TIME_US - 2 * 86_400_000_000
"""Where credits run out later, or never, this is stored: a date in every time zone that a session can have."""


def first_exhaustion(account: Account) -> int:
    """Return the first instant at which a running clock of the account stops for want of credits, if all of them beat.

    Before it none does, whichever of them fall silent: each that goes on then has no less free time, and together they
    pay no more. Behind it nothing is sure, not even for a clock that would go on for long: what a silent one leaves may
    keep another going that costs more, and takes it all.
    """
    stops = (forecast.stops_at for forecast in foretell(account, beating=True).values())
    return min((at for at in stops if at is not None and at < LATEST_US), default=LATEST_US)
