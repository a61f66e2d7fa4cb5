"""The file of API keys: nothing in it opens a door, and what happens to it while it is in use harms nobody."""

import json
import logging
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from raycascade import cli
from raycascade.errors import ConfigError
from raycascade.serving import keys
from raycascade.serving.keys import KeyRing, add_key, is_loopback, read_keys, remove_key, require_safe_binding
from raycascade.serving.options import KeysOptions, ServeOptions


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 10.0  # every request comes long after the last one
        return self.now_s


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "keys.json")


def owner(ring: KeyRing, presented: str) -> str | None:
    found = ring.owner(presented)
    return found.name if found else None


# ---------------------------------------------------------------- the file
def test_a_key_opens_for_its_owner_and_nothing_else_opens(path: str):
    made = {name: add_key(path, name) for name in ("shop", "page", "batch")}
    ring = KeyRing(path)
    assert {name: owner(ring, key) for name, key in made.items()} == {name: name for name in made}
    shop = made["shop"]
    wrong = ["", "shop", shop[:-1], shop + "x", shop.upper(), shop + "\x00", "\udcff", "x" * 100_000]
    wrong += [key.salt for key in read_keys(path)] + [key.sha256 for key in read_keys(path)]
    assert {owner(ring, presented) for presented in wrong} == {None}


def test_the_file_holds_no_key_and_only_its_owner_may_read_it(path: str):
    made = [add_key(path, name) for name in ("a", "b")]
    text = Path(path).read_text()
    assert not any(key in text or key.removeprefix("rck_") in text for key in made)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert os.listdir(os.path.dirname(path)) == ["keys.json"]


def test_a_file_that_was_opened_to_others_stays_open_to_them(path: str):
    add_key(path, "a")
    os.chmod(path, 0o640)
    add_key(path, "b")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o640


def test_two_keys_are_never_alike_and_neither_are_the_hashes_of_one_key(path: str):
    made = {add_key(path, f"key-{i}") for i in range(20)}
    assert len(made) == 20
    assert min(map(len, made)) == 47  # 256 bits in base 64, behind the prefix
    assert len({keys.hashed("same", key.salt) for key in read_keys(path)}) == 20


def test_keys_that_are_added_at_the_same_time_are_all_there(path: str):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: add_key(path, f"key-{i}"), range(24)))
    assert {key.name for key in read_keys(path)} == {f"key-{i}" for i in range(24)}


def test_a_removed_key_leaves_the_others(path: str):
    kept, gone = add_key(path, "kept"), add_key(path, "gone")
    remove_key(path, "gone")
    ring = KeyRing(path)
    assert (owner(ring, kept), owner(ring, gone)) == ("kept", None)


@pytest.mark.parametrize(("name", "options", "message"), [
    ("shop", {}, "there is a key 'shop' already"), ("", {}, "name"), ("a b", {}, "name"), ("a\n", {}, "name"),
    ("x" * 65, {}, "name"), ("new", {"per_second": 0.0}, "per_second"), ("new", {"burst": 0}, "burst"),
    ("new", {"per_second": float("inf")}, "per_second"),
])
def test_a_key_that_cannot_be_is_refused_and_the_file_stays_as_it_was(
    path: str, name: str, options: dict[str, float], message: str
):
    add_key(path, "shop")
    before = Path(path).read_bytes()
    with pytest.raises(ConfigError, match=message):
        add_key(path, name, **options)  # pyright: ignore[reportArgumentType]
    assert Path(path).read_bytes() == before


def test_who_removes_a_key_that_is_not_there_is_told_the_near_miss(path: str):
    add_key(path, "shop")
    with pytest.raises(ConfigError, match="no key 'shp'; did you mean 'shop'"):
        remove_key(path, "shp")


BROKEN = {
    "no JSON": "{secret-of-a-file", "not UTF-8": b"\xff\xfe{", "another format": '{"format": 2, "keys": []}',
    "a list": '["secret-of-a-file"]', "a key in the clear": '{"keys": [{"name": "a", "key": "secret-of-a-file"}]}',
    "no hash": '{"keys": [{"name": "a", "salt": "secret-of-a-file", "sha256": ""}]}',
    "one name twice": json.dumps({"keys": [{"name": "a", "salt": "0" * 32, "sha256": "0" * 64}] * 2}),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named_at_the_start_and_not_quoted(path: str, content: str | bytes):
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=r"keys\.json: ") as caught:
        KeyRing(path)
    assert "secret-of-a-file" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named_with_what_makes_one(path: str):
    with pytest.raises(ConfigError, match="no such file of keys; make one with `raycascade keys add"):
        KeyRing(path)


# ---------------------------------------------------------------- while it is in use
def test_a_changed_file_holds_from_the_next_look_on(path: str):
    first = add_key(path, "first")
    ring = KeyRing(path, clock_s=Clock())
    second = add_key(path, "second")
    assert owner(ring, second) == "second"
    remove_key(path, "first")
    assert owner(ring, first) is None
    assert owner(ring, second) == "second"


def test_between_two_looks_the_file_is_left_alone(path: str, monkeypatch: pytest.MonkeyPatch):
    key = add_key(path, "shop")
    now_s = 0.0
    ring = KeyRing(path, check_s=1.0, clock_s=lambda: now_s)
    late, looks, real = add_key(path, "late"), [], os.stat

    def counted(place: str) -> os.stat_result:
        looks.append(place)
        return real(place)

    monkeypatch.setattr(os, "stat", counted)
    assert [owner(ring, late) for _ in range(100)] == [None] * 100
    assert looks == []
    now_s = 1.0
    assert (owner(ring, late), owner(ring, key), len(looks)) == ("late", "shop", 1)


@pytest.mark.parametrize("content", [*BROKEN.values(), None], ids=[*BROKEN, "gone"])
def test_a_file_that_breaks_keeps_its_old_keys_and_is_logged_once(
    path: str, content: str | bytes | None, caplog: pytest.LogCaptureFixture
):
    key = add_key(path, "shop")
    ring = KeyRing(path, clock_s=Clock())
    if content is None:
        os.unlink(path)
    else:
        Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert [owner(ring, key) for _ in range(3)] == ["shop"] * 3
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "keys.json" in record.getMessage()
    assert "the 1 keys from before stay valid" in record.getMessage()
    assert "secret-of-a-file" not in record.getMessage()


def test_a_file_that_is_mended_counts_again(path: str):
    old = add_key(path, "old")
    good = Path(path).read_bytes()
    ring = KeyRing(path, clock_s=Clock())
    Path(path).write_text("{")
    assert owner(ring, old) == "old"
    Path(path).write_bytes(good)
    new = add_key(path, "new")
    assert (owner(ring, old), owner(ring, new)) == ("old", "new")


def test_every_key_is_compared_whichever_fits(path: str, monkeypatch: pytest.MonkeyPatch):
    made = [add_key(path, f"key-{i}") for i in range(5)]
    ring, compared, real = KeyRing(path), [], keys.hmac.compare_digest

    def counted(one: str, other: str) -> bool:
        compared.append(one)
        return real(one, other)

    monkeypatch.setattr(keys.hmac, "compare_digest", counted)
    for presented in (made[0], made[4], "wrong"):
        compared.clear()
        ring.owner(presented)
        assert len(compared) == 5


# ---------------------------------------------------------------- who may bind where
@pytest.mark.parametrize(("host", "here"), [
    ("127.0.0.1", True), ("127.8.9.1", True), ("localhost", True), ("LOCALHOST", True), ("::1", True), ("[::1]", True),
    ("::ffff:127.0.0.1", True), ("0.0.0.0", False), ("::", False), ("", False), ("10.0.0.5", False),
    ("localhost.evil.example", False), ("127.0.0.1.evil.example", False), ("ranker", False),
])
def test_loopback_is_told_from_the_rest(host: str, here: bool):
    assert is_loopback(host) == here


def test_only_with_keys_may_others_ask(path: str):
    bare, keyed = ServeOptions(), ServeOptions(keys=KeysOptions(file=path))
    require_safe_binding("127.0.0.1", bare)
    with pytest.raises(ConfigError, match=r"--host 0\.0\.0\.0: without API keys only loopback .*`raycascade keys add"):
        require_safe_binding("0.0.0.0", bare)
    with pytest.raises(ConfigError, match="no such file of keys"):
        require_safe_binding("0.0.0.0", keyed)
    add_key(path, "shop")
    require_safe_binding("0.0.0.0", keyed)
    remove_key(path, "shop")
    with pytest.raises(ConfigError, match=r"--host 0\.0\.0\.0: .* holds no key; add one"):
        require_safe_binding("0.0.0.0", keyed)


# ---------------------------------------------------------------- raycascade keys
def test_the_command_line_shows_a_key_once(path: str, capsys: pytest.CaptureFixture[str]):
    assert cli.run(["keys", "add", "shop", "--file", path, "--per-second", "5", "--burst", "8"]) == 0
    key = capsys.readouterr().out.removesuffix("\n")
    found = KeyRing(path).owner(key)
    assert found is not None
    assert (found.name, found.per_second, found.burst) == ("shop", 5.0, 8)
    assert cli.run(["keys", "list", "--file", path, "--json"]) == 0
    listed = capsys.readouterr().out
    (row,) = json.loads(listed)["keys"]
    assert (set(row), row["name"]) == ({"name", "per_second", "burst", "created"}, "shop")
    assert not any(secret in listed for secret in (key, found.salt, found.sha256))
    assert cli.run(["keys", "list", "--file", path]) == 0
    assert "shop" in capsys.readouterr().out
    assert cli.run(["keys", "remove", "shop", "--file", path]) == 0
    assert read_keys(path) == ()


@pytest.mark.parametrize("arguments", [
    ["keys"], ["keys", "add", "shop"], ["keys", "add", "a b", "--file", "PATH"], ["keys", "list", "--file", "PATH"],
    ["keys", "remove", "shop", "--file", "PATH"], ["keys", "add", "shop", "--file", "PATH", "--per-second", "much"],
])
def test_wrong_usage_of_keys_ends_with_status_2(
    arguments: list[str], path: str, capsys: pytest.CaptureFixture[str]
):
    assert cli.run([path if word == "PATH" else word for word in arguments]) == 2
    assert capsys.readouterr().err.count("\n") <= 1
