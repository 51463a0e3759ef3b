"""What browsers get: the files that pages use, the console for operators, and the demo.

``assets``   static files, the JavaScript client, and the headers of pages
``console``  the console's routes: signing in and out, its errors; ``views`` are its pages
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from talktime.web.assets import assets_router
from talktime.web.console import console_router

if TYPE_CHECKING:
    from talktime.web.demo import Demo


def pages(demo: Demo | None = None) -> list[Any]:
    """Return the route handlers of all pages; those of the demo only if there is one."""
    handlers: list[Any] = [assets_router(), console_router()]
    if demo is not None:
        from talktime.web.demo import demo_router  # noqa: PLC0415 - it builds on this package

        handlers.append(demo_router(demo))
    return handlers
