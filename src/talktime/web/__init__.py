"""What browsers get: the files that pages use, the console for operators, and the demo.

``assets``     static files, the JavaScript client, and the headers of pages
``console``    the console's routes: signing in and out, its errors; ``views`` are its pages
``sessions``   the console's sessions, and the tokens of its forms
``rendering``  templates, and how figures are written in them; ``charts`` draws the plots
``demo``       the demo page, and the server that a product would have behind it
"""

from __future__ import annotations

from typing import Any

from litestar import Response, get

from talktime.web.assets import assets_router
from talktime.web.console import console_router
from talktime.web.demo import Demo, demo_router
from talktime.web.rendering import redirect
from talktime.web.sessions import HOME


@get("/", include_in_schema=False)
async def front_door() -> Response[str]:
    """Lead to the console, where there is no demo."""
    return redirect(HOME)


def pages(demo: Demo | None = None) -> list[Any]:
    """Return the route handlers of all pages; those of the demo only if there is one."""
    return [assets_router(), console_router(), front_door if demo is None else demo_router(demo)]
