"""`raycascade users load` into a real Redis server: what is loaded is what queries would have brought."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("redis", reason="the package redis is not installed; install raycascade[redis]")

from raycascade import cli
from raycascade.bundle import Bundle, load_bundle
from raycascade.flows import users as flow
from raycascade.serving.options import UsersOptions
from raycascade.serving.requests import Event, Query
from raycascade.serving.user_rows import encode_queries
from raycascade.serving.users import StoreUnavailable, open_user_store
from raycascade.serving.users_redis import RedisUserStore
from tests.naive_users import run
from tests.redis_process import RedisProcess, needs_redis
from tests.tiny_world import NUM_USERS, raw_requests

pytestmark = needs_redis


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    process = RedisProcess(tmp_path_factory.mktemp("redis"))
    yield process
    process.kill()


@pytest.fixture
def server(shared: RedisProcess) -> RedisProcess:
    with shared.client() as client:
        client.flushall()
    return shared


@pytest.fixture(scope="module")
def bundle(tiny_bundle: str) -> Bundle:
    return load_bundle(tiny_bundle)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two files of the tiny log in shuffled order, of several row groups each."""
    folder = tmp_path / "log"
    folder.mkdir()
    rows = raw_requests().take(np.random.default_rng(3).permutation(8 * NUM_USERS))
    for number, part in enumerate((rows.slice(0, 120), rows.slice(120))):
        pq.write_table(part, folder / f"part-{number}.parquet", row_group_size=50)
    return folder


def fetched(server: RedisProcess, bundle: Bundle, users: list[Any]) -> list[Any]:
    async def ask() -> list[Any]:
        store = open_user_store(UsersOptions(store="redis", url=server.url, timeout_ms=60_000), bundle)
        states = await store.fetch(users, timeout_s=60)
        await store.close()
        return states

    return run(ask())


def test_loaded_users_are_encoded_as_queries_that_bring_the_last_row_of_each(
    server: RedisProcess, bundle: Bundle, source: Path, tmp_path: Path
):
    result = flow.load(str(source), to=server.url, bundle=bundle.uri, errors=str(tmp_path / "errors"))
    assert {name: result[name] for name in ("rows", "bad", "errors", "skipped")} == {
        "rows": 200, "bad": 0, "errors": "", "skipped": 0}
    assert result["loaded"] + result["older"] == 200
    assert result["loaded"] >= NUM_USERS
    assert result["rows_per_second"] > 0
    last = raw_requests().take(np.arange(7, 8 * NUM_USERS, 8)).to_pylist()
    users = [row["user_id"] for row in last]
    ids = [str(user) for user in users]
    stored = encode_queries([Query(user_id=row["user_id"], time_ms=row["time_ms"]) for row in last],
                            fetched(server, bundle, users), bundle, request_ids=ids)
    brought = encode_queries([Query(
        user_id=row["user_id"], time_ms=row["time_ms"], features={name: row[name] for name in ("city", "income")},
        exclude=row["exclude"], history=[Event(item_id=item, time_ms=moment, features={"action": action})
                                         for item, moment, action in zip(row["history"], row["history_time_ms"],
                                                                         row["history_action"], strict=True)])
        for row in last], [None] * len(last), bundle, request_ids=ids)
    left, right = bundle.recommend(stored.table).final, bundle.recommend(brought.table).final
    assert np.array_equal(left.rows_QC, right.rows_QC)
    assert np.array_equal(left.scores_QC, right.scores_QC)
    assert set(stored.sources) == {"store"}


def test_the_same_load_again_changes_nothing(server: RedisProcess, bundle: Bundle, source: Path, tmp_path: Path):
    users = list(range(100, 100 + NUM_USERS))
    flow.load(str(source), to=server.url, bundle=bundle.uri, errors=str(tmp_path / "errors"))
    once = fetched(server, bundle, users)
    assert None not in once
    flow.load(str(source), to=server.url, bundle=bundle.uri, errors=str(tmp_path / "errors"))
    assert fetched(server, bundle, users) == once


def test_an_interrupted_load_goes_on_behind_the_last_row_group(
    server: RedisProcess, bundle: Bundle, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real, calls = RedisUserStore.load, [0]

    async def failing(self: RedisUserStore, users: Any, *, timeout_s: float) -> int:
        calls[0] += 1
        if calls[0] == 4:
            raise StoreUnavailable("gone", "connection")
        return await real(self, users, timeout_s=timeout_s)

    monkeypatch.setattr(RedisUserStore, "load", failing)
    with pytest.raises(StoreUnavailable, match="gone; 120 rows are loaded, and the same command goes on"):
        flow.load(str(source), to=server.url, bundle=bundle.uri, errors=str(tmp_path / "errors"))
    result = flow.load(str(source), to=server.url, bundle=bundle.uri, errors=str(tmp_path / "errors"))
    assert (result["skipped"], result["rows"]) == (120, 80)
    states = fetched(server, bundle, list(range(100, 100 + NUM_USERS)))
    last = raw_requests().take(np.arange(7, 8 * NUM_USERS, 8)).to_pylist()
    assert [len(state.events) for state in states] == [len(row["history"]) for row in last]


def test_bad_rows_have_a_line_each_and_the_command_says_how_many(
    server: RedisProcess, bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file, errors = tmp_path / "users.parquet", tmp_path / "errors.txt"
    income = [float("nan") if n % 700 == 0 else 1.0 for n in range(2100)]
    pq.write_table(pa.table({"user_id": np.arange(2100), "income": income}), file, row_group_size=1000)
    arguments = ["users", "load", str(file), "--to", server.url, "--bundle", bundle.uri, "--errors", str(errors)]
    assert cli.run([*arguments, "--json"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out.splitlines()[-1])
    assert (result["rows"], result["loaded"], result["bad"], result["errors"]) == (2100, 2097, 3, str(errors))
    assert "3 of 2100 rows are bad" in printed.err
    assert errors.read_text().splitlines() == [
        f"{file}: row {n}: user '{n}': income: got nan for a feature of kind dense" for n in (0, 700, 1400)]


def test_a_load_without_one_good_row_fails(
    server: RedisProcess, bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "users.parquet"
    pq.write_table(pa.table({"user_id": pa.array([None], pa.int64()), "city": ["x"]}), file)
    assert cli.run(["users", "load", str(file), "--to", server.url, "--bundle", bundle.uri, "--errors",
                    str(tmp_path / "errors")]) == 2
    assert "all 1 rows are bad" in capsys.readouterr().err


def test_without_a_server_the_command_ends_with_one_line(
    bundle: Bundle, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert cli.run(["users", "load", str(source), "--to", "redis://:s3cret@127.0.0.1:1/0", "--bundle", bundle.uri]) == 1
    said = capsys.readouterr().err
    assert said.startswith("raycascade: the user store at redis://127.0.0.1:1/0: ")
    assert said.count("\n") == 1
    assert "s3cret" not in said
