"""Files for those who run talktime: what `talktime ops NAME` prints. They lie beside this module."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from talktime.errors import TalktimeError

FILES: dict[str, tuple[str, ...]] = {
    "cron": ("talktime.crontab",),
    "systemd": (
        "talktime-migrate.service",
        "talktime-api.service",
        "talktime-reconciler.service",
        "talktime-audit.service",
        "talktime-audit.timer",
    ),
    "kubernetes": ("talktime.yaml",),
    "alerts": ("alerts.yaml",),
}
"""Which files each name stands for, in the order in which they are printed."""

ABOUT = {
    "cron": "a crontab with passes and the audit",
    "systemd": "units for migrations, API, reconciler and audit",
    "kubernetes": "a manifest with migrations, API, reconciler and audit",
    "alerts": "Prometheus' rules for when to wake somebody",
}


class CannotWrite(TalktimeError):
    """The folder is none, or not this account's to write in."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"cannot write {error.filename}: {error.strerror}")


def text_of(file: str) -> str:
    """Return what is in a file."""
    return (files(__package__) / file).read_text(encoding="utf-8")


def show(name: str) -> None:
    """Print the files of a name; of several, each with a line that tells its name."""
    several = len(FILES[name]) > 1
    for file in FILES[name]:
        if several:
            print(f"# --- {file}")
        print(text_of(file), end="\n" if several else "")


def write(name: str, folder: Path) -> None:
    """Write the files of a name into a folder, and tell which.

    Raises:
        CannotWrite: it cannot be written.
    """
    for file in FILES[name]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text_of(file), encoding="utf-8")
        except OSError as error:
            raise CannotWrite(error) from None
        print(folder / file)
