"""The console on a real socket, and a browser's part in it: cookies, hidden fields, forms."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator
from html import unescape

from httpx import AsyncClient, Response
from sqlalchemy.engine import URL

from talktime.web import pages
from talktime.web.assets import PAGE_HEADERS
from tests.api.requests import KEY
from tests.api.server import serving

SIGN_IN = "/console/sign-in"
COOKIE = "talktime_console"

TYPEWRITER = str.maketrans({"\N{MINUS SIGN}": "-", "\N{RIGHT SINGLE QUOTATION MARK}": "'"})


@contextlib.asynccontextmanager
async def console(url: URL, *, key: str | None = KEY, **variables: str) -> AsyncIterator[AsyncClient]:
    """Serve all pages over a database and yield a client that is signed in, unless there is no key."""
    async with serving(url, pages=pages(), **variables) as client:
        del client.headers["Authorization"]
        if key is not None:
            assert 303 == (await client.post(SIGN_IN, data={"key": key})).status_code
        yield client


def page_of(response: Response, status: int = 200) -> str:
    """Check that this is a page of that status, and return its HTML."""
    assert (status, "text/html; charset=utf-8") == (response.status_code, response.headers["content-type"])
    assert dict(PAGE_HEADERS).items() <= {name: response.headers.get(name) for name in PAGE_HEADERS}.items()
    return response.text


def text_of(html: str) -> str:
    """Return what a person reads of a page, in one line."""
    body = html[html.index("<main") : html.index("</main>")]
    within_words = re.sub(r"</?(?:a|code|data|span|strong|time)\b[^>]*>", "", body)
    return unescape(" ".join(re.sub(r"<[^>]*>", " ", within_words).split())).translate(TYPEWRITER)


def field_of(html: str, name: str) -> str:
    """Return the value of a hidden field."""
    [value] = set(re.findall(rf'<input type="hidden" name="{name}" value="([^"]*)">', html))
    return unescape(value)
