"""The checks of this suite stand in modules of their own; a failed one is to show its values, as in a test."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.faults.books", "tests.faults.load", "tests.faults.processes")
