"""Settings: what is taken, and that each wrong value is refused by its name."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from talktime.errors import SettingError
from talktime.logs import LogFormat
from talktime.settings import RequestLimits, TokenSettings, UserMay, kept_secret, load_settings
from talktime.webhooks import WebhookSettings

SECRET = "0123456789abcdef0123456789abcdef"
HS256 = {"SECRET": SECRET, "ISSUER": "https://login.example"}
RS256 = {"JWKS": "/etc/talktime/jwks.json", "ALGORITHM": "RS256", "ISSUER": "https://login.example"}


def tokens_of(variables: dict[str, str]) -> TokenSettings | None:
    return load_settings({f"TALKTIME_TOKEN_{name}": value for name, value in variables.items()}).tokens


def test_without_any_variable_there_are_no_tokens_and_no_other_origins() -> None:
    settings = load_settings({})

    assert (None, UserMay.BEAT, ()) == (settings.tokens, settings.user_may, settings.cors_origins)


def test_logs_are_for_people_and_tell_of_no_request_unless_somebody_says_so() -> None:
    unset, given = load_settings({}), load_settings({"TALKTIME_LOG_FORMAT": "json", "TALKTIME_LOG_REQUESTS": "on"})

    assert (LogFormat.TEXT, False) == (unset.log_format, unset.log_requests)
    assert (LogFormat.JSON, True) == (given.log_format, given.log_requests)


def test_a_secret_and_an_issuer_are_enough() -> None:
    assert TokenSettings(
        algorithm="HS256",
        secret=SECRET.encode(),
        jwks=None,
        issuer="https://login.example",
        audience="talktime",
        leeway_s=10,
    ) == tokens_of(HS256)


@pytest.mark.parametrize("algorithm", ["RS256", "ES256"])
def test_a_file_of_keys_wants_an_algorithm(algorithm: str) -> None:
    found = tokens_of({**RS256, "ALGORITHM": algorithm, "AUDIENCE": "meter", "LEEWAY_SECONDS": "0"})

    assert (
        TokenSettings(
            algorithm=algorithm,
            secret=None,
            jwks=Path("/etc/talktime/jwks.json"),
            issuer="https://login.example",
            audience="meter",
            leeway_s=0,
        )
        == found
    )


def test_a_relative_file_stays_what_it_was_when_the_folder_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = tokens_of({**RS256, "JWKS": "keys.json"})

    assert found is not None
    assert tmp_path / "keys.json" == found.jwks


def test_empty_variables_are_as_none() -> None:
    assert tokens_of({"SECRET": "", "JWKS": "", "ISSUER": "", "ALGORITHM": "", "LEEWAY_SECONDS": ""}) is None


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({**HS256, "JWKS": "keys.json"}, "JWKS"),
        ({**HS256, "SECRET": SECRET[:-1]}, "SECRET"),
        ({**HS256, "SECRET": "é" * 15}, "SECRET"),
        ({**HS256, "ISSUER": ""}, "ISSUER"),
        ({**HS256, "ALGORITHM": "RS256"}, "ALGORITHM"),
        ({**HS256, "ALGORITHM": "none"}, "ALGORITHM"),
        ({**HS256, "ALGORITHM": "hs256"}, "ALGORITHM"),
        ({**HS256, "ALGORITHM": "HS512"}, "ALGORITHM"),
        ({**RS256, "ALGORITHM": "HS256"}, "ALGORITHM"),
        ({**RS256, "ALGORITHM": ""}, "ALGORITHM"),
        ({**RS256, "ALGORITHM": "PS256"}, "ALGORITHM"),
        ({**RS256, "ISSUER": ""}, "ISSUER"),
        ({"ISSUER": "i"}, "ISSUER"),
        ({"AUDIENCE": "a"}, "AUDIENCE"),
        ({"ALGORITHM": "HS256"}, "ALGORITHM"),
        ({"LEEWAY_SECONDS": "5"}, "LEEWAY_SECONDS"),
        ({**HS256, "LEEWAY_SECONDS": "31"}, "LEEWAY_SECONDS"),
        ({**HS256, "LEEWAY_SECONDS": "-1"}, "LEEWAY_SECONDS"),
        ({**HS256, "LEEWAY_SECONDS": "1.5"}, "LEEWAY_SECONDS"),
        ({**HS256, "LEEWAY_SECONDS": "٣"}, "LEEWAY_SECONDS"),
        ({**HS256, "LEEWAY_SECONDS": "9" * 5000}, "LEEWAY_SECONDS"),
    ],
)
def test_token_settings_that_contradict_each_other_are_refused_by_name(variables: dict[str, str], name: str) -> None:
    with pytest.raises(SettingError) as refusal:
        tokens_of(variables)

    assert f"TALKTIME_TOKEN_{name}" == refusal.value.name
    assert "\n" not in str(refusal.value)
    assert SECRET[:-1] not in str(refusal.value)


def test_secrets_are_not_shown_with_the_settings() -> None:
    settings = load_settings(
        {"TALKTIME_TOKEN_SECRET": SECRET, "TALKTIME_TOKEN_ISSUER": "i", "TALKTIME_SERVICE_KEY": "k" * 16}
    )

    assert SECRET not in repr(settings)
    assert "k" * 16 not in repr(settings)


@pytest.mark.parametrize(("text", "may"), [("read", 1), ("beat", 2), ("control", 3), ("", 2)])
def test_what_users_may_do_is_one_of_three(text: str, may: int) -> None:
    assert UserMay(may) is load_settings({"TALKTIME_USER_MAY": text}).user_may


@pytest.mark.parametrize("text", ["all", "READ", "read,beat", " read", "2"])
def test_nothing_else_can_be_allowed_to_users(text: str) -> None:
    with pytest.raises(SettingError, match=r"^TALKTIME_USER_MAY: "):
        load_settings({"TALKTIME_USER_MAY": text})


def test_origins_are_listed_once_each() -> None:
    text = "https://app.example.com, http://localhost:3000,http://[::1]:8080,https://app.example.com,http://10.0.0.1"

    assert (
        "https://app.example.com",
        "http://localhost:3000",
        "http://[::1]:8080",
        "http://10.0.0.1",
    ) == load_settings({"TALKTIME_CORS_ORIGINS": text}).cors_origins


@pytest.mark.parametrize(
    "text",
    [
        "*",
        "https://*.example.com",
        "null",
        "app.example.com",
        "https://",
        "https:///",
        "https://app.example.com/",
        "https://app.example.com/path",
        "https://app.example.com?x",
        "https://app.example.com#x",
        "https://user@app.example.com",
        "https://App.example.com",
        "HTTPS://app.example.com",
        "https://app.example.com:",
        "https://app.example.com:443",
        "http://app.example.com:80",
        "https://app.example.com:0",
        "https://app.example.com:65536",
        "https://app.example.com:080",
        "https://app.example.com:x",
        "ftp://app.example.com",
        "file://",
        "https://a.com https://b.com",
        "https://a.com,",
        ",",
        "https://é.com",
    ],
)
def test_what_is_no_origin_of_a_browser_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match=r"^TALKTIME_CORS_ORIGINS: "):
        load_settings({"TALKTIME_CORS_ORIGINS": text})


def test_a_kept_secret_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "home" / "secret"
    with ThreadPoolExecutor(8) as threads:
        found = set(threads.map(lambda _: kept_secret(path), range(32)))

    assert 1 == len(found)
    assert 43 == len(found.pop())
    assert [path] == list(path.parent.iterdir())
    assert (0o600, 0o700) == (stat.S_IMODE(path.stat().st_mode), stat.S_IMODE(path.parent.stat().st_mode))


# --- limits -----------------------------------------------------------------------------------------------------------


def test_limits_of_requests_and_connections_hold_without_any_variable() -> None:
    settings = load_settings({})

    assert RequestLimits(per_user=20, per_service=None, refused=10) == settings.limits
    assert 10_000 == settings.connections_max


@pytest.mark.parametrize(("text", "limit"), [("1", 1), ("1000000", 1_000_000), ("none", None)])
def test_each_limit_of_requests_can_be_set_or_taken_away(text: str, limit: int | None) -> None:
    names = ("USER", "SERVICE", "REFUSED")
    settings = load_settings({f"TALKTIME_{name}_REQUESTS_PER_SECOND": text for name in names})

    assert RequestLimits(per_user=limit, per_service=limit, refused=limit) == settings.limits


@pytest.mark.parametrize(
    "name",
    [
        "TALKTIME_USER_REQUESTS_PER_SECOND",
        "TALKTIME_SERVICE_REQUESTS_PER_SECOND",
        "TALKTIME_REFUSED_REQUESTS_PER_SECOND",
        "TALKTIME_CONNECTIONS_MAX",
    ],
)
@pytest.mark.parametrize("text", ["0", "-1", "1.5", "1000001", "9" * 5000, "٣", "1_000", "NONE", "off", " 1"])
def test_a_limit_that_is_none_is_refused_by_its_name(name: str, text: str) -> None:
    with pytest.raises(SettingError) as refusal:
        load_settings({name: text})

    assert name == refusal.value.name
    assert str(refusal.value).startswith(f"{name}: must be an integer from 1 to 1000000")
    assert "\n" not in str(refusal.value)


def test_connections_cannot_be_without_limit() -> None:
    with pytest.raises(SettingError, match=r"^TALKTIME_CONNECTIONS_MAX: "):
        load_settings({"TALKTIME_CONNECTIONS_MAX": "none"})


# --- webhooks ---------------------------------------------------------------------------------------------------------

WHSEC = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def test_without_a_webhook_nobody_is_told() -> None:
    settings = load_settings({"TALKTIME_WEBHOOK_URL": "", "TALKTIME_BALANCE_LOW_SECONDS": "5"})
    assert (None, None) == (settings.webhook, settings.low_us)


@pytest.mark.parametrize(
    "url",
    ["https://app.example/hooks?a=b", "http://localhost:9/", "http://127.0.0.1:8080/x", "http://[::1]/x"],
)
def test_a_webhook_goes_over_tls_or_stays_on_this_machine(url: str) -> None:
    settings = load_settings({"TALKTIME_WEBHOOK_URL": url, "TALKTIME_WEBHOOK_SECRET": f"{WHSEC} {WHSEC}"})
    assert WebhookSettings(url=url, secrets=(WHSEC, WHSEC), low_us=60_000_000) == settings.webhook
    assert 60_000_000 == settings.low_us
    assert WHSEC not in repr(settings)


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"URL": "http://app.example/", "SECRET": WHSEC}, "URL"),
        ({"URL": "https://", "SECRET": WHSEC}, "URL"),
        ({"URL": "https://a b/", "SECRET": WHSEC}, "URL"),
        ({"URL": "https://a:0/", "SECRET": WHSEC}, "URL"),
        ({"URL": "https://a:x/", "SECRET": WHSEC}, "URL"),
        ({"URL": "app.example", "SECRET": WHSEC}, "URL"),
        ({"URL": "https://app.example/"}, "SECRET"),
        ({"URL": "https://app.example/", "SECRET": "  "}, "SECRET"),
        ({"URL": "https://app.example/", "SECRET": WHSEC[6:]}, "SECRET"),
        ({"URL": "https://app.example/", "SECRET": "whsec_MfKQ"}, "SECRET"),
        ({"URL": "https://app.example/", "SECRET": WHSEC[:-1]}, "SECRET"),
        ({"URL": "https://app.example/", "SECRET": f"{WHSEC},{WHSEC}"}, "SECRET"),
        ({"SECRET": WHSEC}, "SECRET"),
    ],
)
def test_a_webhook_that_cannot_be_is_refused_by_its_name(variables: dict[str, str], name: str) -> None:
    with pytest.raises(SettingError) as refusal:
        load_settings({f"TALKTIME_WEBHOOK_{key}": value for key, value in variables.items()})
    assert f"TALKTIME_WEBHOOK_{name}" == refusal.value.name
    assert WHSEC not in str(refusal.value)


def test_a_time_that_is_none_is_refused() -> None:
    with pytest.raises(SettingError, match="TALKTIME_BALANCE_LOW_SECONDS: must be 0 or more"):
        load_settings({"TALKTIME_BALANCE_LOW_SECONDS": "-1"})
