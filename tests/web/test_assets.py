"""Static files: what is served, how it is kept, and what cannot be reached."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from httpx import AsyncClient, Response
from litestar import Litestar

from talktime.web.assets import FOLDER, PAGE_HEADERS, assets_router, load_assets
from tests.api.requests import as_sent


@pytest.fixture(scope="module")
def app() -> Litestar:
    return Litestar(route_handlers=[assets_router()])


async def get(app: Litestar, path: str, headers: dict[str, str] | None = None) -> Response:
    client: AsyncClient
    async with as_sent(app) as client:
        return await client.get(path, headers=headers)


@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        ("/assets/base.css", "text/css; charset=utf-8"),
        ("/assets/parts.css", "text/css; charset=utf-8"),
        ("/assets/console.css", "text/css; charset=utf-8"),
        ("/assets/console.js", "text/javascript; charset=utf-8"),
        ("/assets/favicon.svg", "image/svg+xml"),
        ("/client/index.js", "text/javascript; charset=utf-8"),
    ],
)
async def test_a_file_is_sent_as_it_is_with_its_type(app: Litestar, path: str, content_type: str) -> None:
    answer = await get(app, path)
    folder = "static" if path.startswith("/assets/") else "client"
    content = (FOLDER / folder / path.rpartition("/")[2]).read_bytes()
    assert (200, content_type, content) == (answer.status_code, answer.headers["content-type"], answer.content)
    assert "nosniff" == answer.headers["x-content-type-options"]
    assert "no-cache" == answer.headers["cache-control"]
    assert f'"{hashlib.sha256(content).hexdigest()}"' == answer.headers["etag"]


@pytest.mark.parametrize("form", ["{}", "W/{}", '"other", {}', "*"])
async def test_a_file_that_the_browser_has_is_not_sent_again(app: Litestar, form: str) -> None:
    etag = (await get(app, "/assets/base.css")).headers["etag"]
    again = await get(app, "/assets/base.css", {"If-None-Match": form.format(etag)})
    assert (304, b"", etag, "no-cache") == (
        again.status_code,
        again.content,
        again.headers["etag"],
        again.headers["cache-control"],
    )
    changed = await get(app, "/assets/base.css", {"If-None-Match": '"other"'})
    assert 200 == changed.status_code


async def test_pages_of_any_origin_may_import_the_client_and_nothing_else(app: Litestar) -> None:
    client, own = await get(app, "/client/index.js"), await get(app, "/assets/console.js")
    assert "*" == client.headers["access-control-allow-origin"]
    assert "access-control-allow-origin" not in own.headers


@pytest.mark.parametrize(
    "path",
    [
        "/assets/nothing.css",
        "/assets/",
        "/assets/index.js",  # of the client
        "/assets/../assets.py",
        "/assets/..%2fassets.py",
        "/assets/%2e%2e%2fviews.py",
        "/assets/....//views.py",
        "/assets//etc/passwd",
        "/assets/console.js%00.css",
        "/assets/templates/layout.html",
        "/client/base.css",
        "/client/package.json",
        "/client/index.d.ts",
        "/client/test/server.js",
        "/client/test%2fserver.js",
        "/client/..%2fstatic%2fconsole.js",
    ],
)
async def test_nothing_else_can_be_reached(app: Litestar, path: str) -> None:
    assert 404 == (await get(app, path)).status_code


def test_only_plain_files_directly_in_the_folder_with_plain_names_are_read(tmp_path: Path) -> None:
    for name in ("a.css", "b-2.min.css", "c.js", ".hidden.css", "UPPER.css", "sp ace.css", "d.txt", "e.css.bak"):
        (tmp_path / name).write_text("")
    (tmp_path / "folder.css").mkdir()
    (tmp_path / "folder.css" / "inner.css").write_text("")
    (tmp_path / "link.css").symlink_to("/etc/passwd")
    assert ["a.css", "b-2.min.css"] == list(load_assets(tmp_path, ".css"))


def test_no_stylesheet_or_script_of_ours_takes_anything_from_elsewhere() -> None:
    for path in (FOLDER / "static").iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text, path.name
        assert "https:" not in text, path.name


def test_pages_may_do_nothing_inline() -> None:
    policy = PAGE_HEADERS["Content-Security-Policy"]
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; ")
    for rule in ("base-uri 'none'", "form-action 'self'", "frame-ancestors 'none'", "worker-src 'self' blob:"):
        assert rule in policy.split("; ")
