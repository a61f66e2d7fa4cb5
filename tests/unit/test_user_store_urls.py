"""URLs of the user store: which can be used, and what is shown of them."""

import pytest

pytest.importorskip("redis", reason="the package redis is not installed; install raycascade[redis]")

from raycascade.errors import ConfigError
from raycascade.serving.users import IdKinds
from raycascade.serving.users_redis import RedisUserStore, redacted, resolve_url


@pytest.mark.parametrize(("url", "shown"), [
    ("redis://:s3cret@host:7000/2", "redis://host:7000/2"), ("rediss://me:s3cret@host", "rediss://host:6379"),
    ("redis://host?password=s3cret", "redis://host:6379"), ("redis://:s3c/ret@host", "redis://..."),
    ("redis://:s3c#ret@host", "redis://..."), ("redis://:s3c?ret@host", "redis://..."),
    ("unix:///run/redis.sock?password=s3cret", "unix:///run/redis.sock"), ("redis://[s3cret@x", "redis://..."),
    ("redis://:pa:s3cret", "redis://..."),
])
def test_a_url_is_shown_without_its_password(url: str, shown: str):
    assert redacted(url) == shown


@pytest.mark.parametrize(("url", "message"), [
    ("http://:s3cret@host", "users.url: got 'http'; give redis://"), ("host:6379", "users.url: got 'no scheme'"),
    ("env:NO_SUCH_VARIABLE", "the environment variable NO_SUCH_VARIABLE is not set"),
    ("redis://:s3cret@host:port", "users.url: redis://... cannot be used"),
    ("redis://:s3cret@host/?max_connections=many", "cannot be used"),
])
def test_a_url_that_cannot_be_used_is_refused_in_one_line(url: str, message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        RedisUserStore(url, IdKinds("int", "int"), namespace="test", history_len=5, exclude_len=0, dedup_s=9,
                       timeout_s=1.0)
    assert "s3cret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_url_may_stand_in_a_variable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("USERS_URL", "rediss://:s3cret@host")
    assert resolve_url("env:USERS_URL") == "rediss://:s3cret@host"
