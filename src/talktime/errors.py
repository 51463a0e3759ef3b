"""What can go wrong, in one tree. Nothing here knows of HTTP; the API maps each class to a status in one table.

::

    TalktimeError
    ├── SettingError                 a wrong value in the environment; names the variable
    ├── SchemaError                  the database cannot be migrated
    ├── ServiceKeyError              for operators; no request of the API meets one
    │   ├── InvalidKeyName           no name for a key, or a reserved one
    │   ├── KeyNameTaken             there is a key of this name, if only a revoked one
    │   └── KeyNotFound
    ├── OldTablesError               an old system's tables are not there, or not what they are said to be
    ├── MovingIncomplete             an import or an export did not come to its end
    ├── CannotMint                   a token cannot be made here, or not for this
    ├── NotFound
    │   ├── UserNotFound
    │   └── ChatNotFound
    ├── Conflict                     right in form, refused by the state it meets
    │   ├── WrongAdvisor             the chat belongs to another advisor
    │   ├── ChatNotActive            a heartbeat for an abandoned or ended chat; carries the reading
    │   ├── InsufficientBalance      a refund or correction larger than what is left
    │   └── BalanceLimitExceeded     a credit that would pass the largest balance
    ├── IdempotencyKeyReused         the key came before with another request
    ├── Overloaded                   more wait for the database than can be answered soon; nothing was done
    └── DatabaseUnavailable          no answer from the database; the outcome may be unknown, repeat the request
        ├── LockTimeout              somebody held a row for too long; nothing was written
        └── EmbeddedDatabaseError    the embedded PostgreSQL cannot be prepared or started
"""

from __future__ import annotations


class TalktimeError(Exception):
    """Base of all errors that talktime raises on purpose; its text is fit to show to the caller."""


class SettingError(TalktimeError):
    """An environment variable holds a value that cannot be used."""

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        super().__init__(f"{name}: {reason}")


class SchemaError(TalktimeError):
    """The database cannot be migrated: the role may not, or a newer release wrote it."""


class ServiceKeyError(TalktimeError):
    """A service key cannot be made or revoked."""


class InvalidKeyName(ServiceKeyError):
    """The name is not fit for a service key."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"a key cannot be named {name!r}: names are 1 to 64 characters out of letters, digits and -_.:@+=~|, and "
            "neither . nor .. nor environment"
        )


class KeyNameTaken(ServiceKeyError):
    """There is a service key of this name already; the names of revoked ones are not used again."""

    def __init__(self, name: str) -> None:
        super().__init__(f"there is, or was, a key named {name!r}; choose another name")


class KeyNotFound(ServiceKeyError):
    """There is no service key of this name in the database."""

    def __init__(self, name: str) -> None:
        super().__init__(f"there is no key named {name!r}")


class CannotMint(TalktimeError):
    """A token cannot be made: the key that signs is elsewhere, or nobody would take such a token."""


class OldTablesError(TalktimeError):
    """The old tables are not there, are not what they are said to be, or the mapping is wrong."""


class MovingIncomplete(TalktimeError):
    """Not everything was moved; what was is whole."""


class NotFound(TalktimeError):
    """What was named does not exist."""


class UserNotFound(NotFound):
    """The user has no account yet: no credit and no chat."""

    def __init__(self, user_id: str) -> None:
        super().__init__(f"user {user_id!r} has no account")


class ChatNotFound(NotFound):
    """The user has no chat of this id."""

    def __init__(self, user_id: str, chat_id: str) -> None:
        super().__init__(f"user {user_id!r} has no chat {chat_id!r}")


class Conflict(TalktimeError):
    """The request is well formed, but the state it meets refuses it."""


class WrongAdvisor(Conflict):
    """A chat belongs to one advisor for ever."""

    def __init__(self, chat_id: str) -> None:
        super().__init__(f"chat {chat_id!r} belongs to another advisor")


class ChatNotActive(Conflict):
    """A heartbeat came for an abandoned or ended chat. `reading` is the chat's, once the caller has added it."""

    def __init__(self, chat_id: str, state: str) -> None:
        self.reading: object = None
        super().__init__(f"chat {chat_id!r} is {state}; start it again to go on")


class InsufficientBalance(Conflict):
    """The balance, after all that is accrued, is smaller than what is to be taken."""

    def __init__(self, balance: str) -> None:
        super().__init__(f"the balance is {balance}")


class BalanceLimitExceeded(Conflict):
    """The credit would lift the balance above its cap."""

    def __init__(self, limit: str) -> None:
        super().__init__(f"no balance may pass {limit} credits")


class IdempotencyKeyReused(TalktimeError):
    """The Idempotency-Key was used before, with another request."""

    def __init__(self) -> None:
        super().__init__("this Idempotency-Key was used before with a different request")


class Overloaded(TalktimeError):
    """More requests wait for the database than it can answer soon. Nothing was done."""

    def __init__(self) -> None:
        super().__init__("too many requests are waiting; try again")


class DatabaseUnavailable(TalktimeError):
    """The database did not answer, or the connection was lost and the outcome is unknown."""


class LockTimeout(DatabaseUnavailable):
    """Somebody held a row that was needed for too long. Nothing was written."""


class EmbeddedDatabaseError(DatabaseUnavailable):
    """The embedded PostgreSQL cannot be prepared or started."""
