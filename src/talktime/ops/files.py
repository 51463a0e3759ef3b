"""Files for those who run talktime: what `talktime ops NAME` prints. They lie beside this module."""

from __future__ import annotations

from importlib.resources import files

FILES: dict[str, tuple[str, ...]] = {
    "alerts": ("alerts.yaml",),
}
"""Which files each name stands for, in the order in which they are printed."""

ABOUT = {
    "alerts": "Prometheus' rules for when to wake somebody",
}


def text_of(file: str) -> str:
    """Return what is in a file."""
    return (files(__package__) / file).read_text(encoding="utf-8")


def show(name: str) -> None:
    """Print the files of a name."""
    for file in FILES[name]:
        print(text_of(file), end="")
