"""The alert rules: each fires when it should and none when all is well, in Prometheus' own words; and on what is there.

promtool is part of Debian's package `prometheus`.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy.engine import URL

from reconciler.sweep import sweep_and_record
from talktime import operating
from talktime.ops.files import text_of
from talktime.store.database import Database
from tests.api.requests import BEATS
from tests.api.server import serving
from tests.program import run

RULES = text_of("alerts.yaml")
ALERTS = re.findall(r"^ *- alert: (\w+)$", RULES, re.MULTILINE)
READ = '{instance="a",job="talktime",method="GET",path="/v1/users/{user_id}/account",status_code="%d"}'

# A value every 15 seconds; time begins at 0.
WELL = {
    'up{job="talktime",instance="a"}': "1x80",
    'talktime_database_up{instance="a"}': "1x80",
    'talktime_reconciler_last_success_timestamp_seconds{instance="a"}': "0+15x80",
    'talktime_reconciler_last_pass_accounts{instance="a"}': "100x80",
    'talktime_reconciler_last_pass_failed_accounts{instance="a"}': "0x80",
    'talktime_reconcile_lag_seconds{instance="a"}': "20x80",
    'talktime_unmaterialized_seconds{instance="a"}': "1500x80",
    'talktime_audit_differences{instance="a"}': "0x80",
    'talktime_events_dead{instance="a"}': "0x80",
    'talktime_events_lag_seconds{instance="a"}': "20x80",
    f"talktime_requests_total{READ % 200}": "0+1500x80",
    f"talktime_requests_total{READ % 500}": "0+10x80",
    f"talktime_requests_total{READ % 503}": "0+10x80",
    'talktime_requests_unanswered_total{instance="a"}': "0x80",
    'talktime_batch_waiting{instance="a",batch="readings"}': "4000x80",
    'talktime_pool_waiting{instance="a"}': "0 0 7" + " 0 0 7" * 26,
    'talktime_clock_behind_seconds{instance="a"}': "0x80",
}
"""What Prometheus sees of a service that is well."""

ILL = {
    "TalktimeNotScraped": {'up{job="talktime",instance="a"}': "0x80"},
    "TalktimeDatabaseAway": {'talktime_database_up{instance="a"}': "0x80"},
    "TalktimeReconcilerWithoutSuccess": {
        'talktime_reconciler_last_success_timestamp_seconds{instance="a"}': "0+15x20 300x60"
    },
    "TalktimeAccountsNotWritten": {'talktime_reconciler_last_pass_failed_accounts{instance="a"}': "1x80"},
    "TalktimeReconcilerLags": {'talktime_reconcile_lag_seconds{instance="a"}': "121x80"},
    "TalktimeMuchUnmaterialized": {'talktime_unmaterialized_seconds{instance="a"}': "6061x80"},
    "TalktimeAuditFoundDifferences": {'talktime_audit_differences{instance="a"}': "1x80"},
    "TalktimeEventsDead": {'talktime_events_dead{instance="a"}': "1x80"},
    "TalktimeEventsLate": {'talktime_events_lag_seconds{instance="a"}': "301x80"},
    "TalktimeErrors": {f"talktime_requests_total{READ % 500}": "0+16x80"},
    "TalktimeUnavailable": {f"talktime_requests_total{READ % 503}": "0+16x80"},
    "TalktimeQueuesFull": {'talktime_batch_waiting{instance="a",batch="readings"}': "5001x80"},
    "TalktimePoolWaiting": {'talktime_pool_waiting{instance="a"}': "1x80"},
    "TalktimeClockBehind": {'talktime_clock_behind_seconds{instance="a"}': "2x80"},
}
"""What it sees otherwise when something is not."""


def fired(tmp_path: Path, series: dict[str, str | None], alerts: list[str]) -> None:
    """Check that of all alerts just these fire after 15 minutes of this."""
    (tmp_path / "alerts.yaml").write_text(RULES)
    test = {
        "interval": "15s",
        "input_series": [{"series": name, "values": values} for name, values in series.items() if values is not None],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": "15m",
                "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in alerts],
            }
        ],
    }
    tests = {"rule_files": ["alerts.yaml"], "evaluation_interval": "15s", "tests": [test]}
    (tmp_path / "tests.yaml").write_text(json.dumps(tests))  # all JSON is YAML
    promtool("test", "rules", str(tmp_path / "tests.yaml"))


def promtool(*arguments: str) -> str:
    if shutil.which("promtool") is None:
        pytest.skip("there is no promtool on this machine")  # in CI that is a failure
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert 0 == done.returncode, done.stdout + done.stderr
    return done.stdout


def test_what_the_command_prints_are_valid_rules(tmp_path: Path) -> None:
    printed = run("ops", "alerts")
    assert (0, "", RULES) == (printed.returncode, printed.stderr, printed.stdout)
    (tmp_path / "alerts.yaml").write_text(printed.stdout)
    assert f"{len(ALERTS)} rules found" in promtool("check", "rules", str(tmp_path / "alerts.yaml"))


def test_there_is_a_case_for_each_alert() -> None:
    assert ALERTS == list(ILL)


def test_none_fires_when_all_is_well(tmp_path: Path) -> None:
    fired(tmp_path, {**WELL}, [])


@pytest.mark.parametrize("alert", ILL)
def test_each_fires_when_it_should_and_alone(tmp_path: Path, alert: str) -> None:
    fired(tmp_path, {**WELL, **ILL[alert]}, [alert])


def test_some_have_a_second_reason(tmp_path: Path) -> None:
    fired(tmp_path, {**WELL, 'up{job="talktime",instance="a"}': None}, ["TalktimeNotScraped"])
    unanswered = {'talktime_requests_unanswered_total{instance="a"}': "0+16x80"}
    fired(tmp_path, {**WELL, f"talktime_requests_total{READ % 503}": None, **unanswered}, ["TalktimeUnavailable"])
    never = {'talktime_reconciler_last_success_timestamp_seconds{instance="a"}': "0x80"}
    fired(tmp_path, {**WELL, **never}, ["TalktimeReconcilerWithoutSuccess"])


async def test_all_that_the_rules_look_at_is_there_and_the_readme_tells_of_all_that_is(
    database_url: URL, pytestconfig: pytest.Config
) -> None:
    database = Database(database_url)
    await sweep_and_record(database, asyncio.Event())
    await operating.record_audit(database, took_us=1, accounts=0, differing=0, differences=0)
    await database.close()
    async with serving(database_url) as client:
        await client.post("/v1/heartbeats", json=BEATS)
        text = (await client.get("/metrics")).text
    there = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    named = set(re.findall(r"talktime_\w+", RULES))
    assert len(named) >= len(ALERTS)
    assert named - there == set()
    assert {name.partition("{")[0] for name in WELL} - {"up"} == named
    names = {name for name in there if name.startswith("talktime_") and not name.endswith("_created")}
    readme = (pytestconfig.rootpath / "README.md").read_text()
    told = [line for line in readme.splitlines() if line.startswith("| `talktime_")]
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in names} == set(
        re.findall(r"`(talktime_\w+)`", "".join(told))
    )
