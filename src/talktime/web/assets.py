"""Files that browsers fetch, and the headers of the pages that fetch them.

``/assets`` has what our own pages use, ``/client`` the JavaScript client, which pages of any origin may import. The
files are read once, when the application is made; a request is answered from memory, or not at all.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from litestar import Request, Response, Router, get
from litestar.exceptions import NotFoundException
from litestar.params import FromPath

from talktime.api import headers

FOLDER = Path(__file__).parent

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "worker-src 'self' blob:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
"""What a page of ours may do: nothing inline, and nothing from elsewhere."""

PAGE_HEADERS: Mapping[str, str] = MappingProxyType(
    {**headers.PAGE_HEADERS, "Content-Security-Policy": CONTENT_SECURITY_POLICY}
)
"""What goes with every HTML page of ours."""

_TYPES = {
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
}
_FOR_ALL = {"Access-Control-Allow-Origin": "*", "Cross-Origin-Resource-Policy": "cross-origin"}
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*(?:\.[a-z0-9_-]+)*\.(?:js|css|svg)")


@dataclass(frozen=True, slots=True)
class Asset:
    """A file as it is sent."""

    content: bytes
    content_type: str
    etag: str


def load_assets(folder: Path, *suffixes: str) -> dict[str, Asset]:
    """Read the files directly in a folder that have one of the suffixes and a plain name; by name."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in suffixes and _NAME.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            found[path.name] = Asset(content, _TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()}"')
    return found


def assets_router() -> Router:
    """Return the routes of both kinds of files, as they are now."""
    own = load_assets(FOLDER / "static", *_TYPES)
    client = load_assets(FOLDER / "client", ".js")

    @get("/assets/{name:str}", include_in_schema=False)
    async def asset(request: Request[Any, Any, Any], name: FromPath[str]) -> Response[bytes]:
        """Send a file of our own pages."""
        return _send(request, own.get(name), {})

    @get("/client/{name:str}", include_in_schema=False)
    async def client_file(request: Request[Any, Any, Any], name: FromPath[str]) -> Response[bytes]:
        """Send a file of the JavaScript client. It is public, and pages of other origins import it."""
        return _send(request, client.get(name), _FOR_ALL)

    return Router("/", route_handlers=[asset, client_file])


def _send(request: Request[Any, Any, Any], asset: Asset | None, also: Mapping[str, str]) -> Response[bytes]:
    if asset is None:
        raise NotFoundException
    sent = {**also, "ETag": asset.etag, "Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("If-None-Match", "").split(",")}
    if known & {asset.etag, "*"}:
        return Response(b"", status_code=304, headers=sent, media_type=asset.content_type)
    return Response(asset.content, headers=sent, media_type=asset.content_type)
