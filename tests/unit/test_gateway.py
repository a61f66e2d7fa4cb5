"""The gateway and its HTTP interface over stages in this process, held against `Bundle.recommend`."""

import asyncio
import re
from typing import Any

import httpx
import pyarrow as pa
import pytest

from raycascade.bundle import Bundle, load_bundle
from raycascade.serving.api import build_api
from raycascade.serving.gateway import Gateway
from raycascade.serving.requests import Query
from raycascade.serving.stages import LocalStage, OneRequest, StageServer, Survivors, pack, unpack
from tests.served import patient
from tests.tiny_world import KEEPS, item_id


class Silent(LocalStage):
    async def ready(self) -> bool:
        raise ConnectionError("gone")


class Broken(LocalStage):
    async def run(self, request: OneRequest, before: Survivors | None, *, deadline: float) -> Survivors:
        raise RuntimeError("secret")


@pytest.fixture(scope="module")
def bundle(tiny_bundle: str) -> Bundle:
    return load_bundle(tiny_bundle)


def gateway_of(bundle: Bundle, **others: type[LocalStage]) -> Gateway:
    stages = {name: others.get(name, LocalStage)(StageServer(bundle, name)) for name in bundle.cascade.names}
    return Gateway(bundle, stages, patient())


def ask(gateway: Gateway, method: str, path: str, **options: Any) -> httpx.Response:
    async def one() -> httpx.Response:
        transport = httpx.ASGITransport(app=build_api(gateway, gateway.options), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **options)

    return asyncio.run(one())


def recommend(bundle: Bundle, **body: Any) -> httpx.Response:
    return ask(gateway_of(bundle), "POST", "/v1/recommend", json={"user_id": 100, **body})


def expected(bundle: Bundle, user: int) -> tuple[list[object], list[float]]:
    final = bundle.recommend(bundle.encode(pa.table({"user_id": [user]}))).final
    rows, mask = final.kept()
    return bundle.items.ids_of(rows[0][mask[0]]), final.scores_QC[0, :final.keep][mask[0]].tolist()


def items_of(reply: httpx.Response) -> list[int]:
    assert reply.status_code == 200, reply.text
    return [item["item_id"] for item in reply.json()["items"]]


@pytest.mark.parametrize("user", [100, 103, 999_999])
def test_stage_by_stage_the_answer_is_that_of_the_whole_cascade(bundle: Bundle, user: int):
    reply = recommend(bundle, user_id=user).json()
    items, scores = expected(bundle, user)
    assert [item["item_id"] for item in reply["items"]] == items
    assert [item["score"] for item in reply["items"]] == pytest.approx(scores, rel=1e-5, abs=1e-5)


def test_the_answer_says_what_it_is(bundle: Bundle):
    reply = recommend(bundle).json()
    assert set(reply) == {"request_id", "user_id", "items", "model", "version", "known_user",
                          "user_source", "degraded"}
    assert (reply["user_id"], reply["model"], reply["known_user"], reply["degraded"]) == (100, "tiny", True, False)


@pytest.mark.parametrize("user", [31, "31", "nobody", "\u00e9"])
def test_an_unknown_user_is_served(bundle: Bundle, user: int | str):
    reply = recommend(bundle, user_id=user)
    assert len(items_of(reply)) == KEEPS["ranker"]
    assert (reply.json()["known_user"], reply.json()["user_id"]) == (False, user)


def test_k_gives_the_head_of_the_answer(bundle: Bundle):
    everything = items_of(recommend(bundle))
    assert items_of(recommend(bundle, k=2)) == everything[:2]
    assert len(everything) == KEEPS["ranker"]


def test_an_excluded_item_is_not_recommended_at_any_stage(bundle: Bundle):
    banned = items_of(recommend(bundle))[:3]
    reply = recommend(bundle, exclude=banned, trace=True).json()
    for stage in reply["trace"]:
        assert not {item["item_id"] for item in stage["items"]} & set(banned), stage["stage"]
        assert len(stage["items"]) == stage["keep"]


def test_the_trace_holds_what_every_stage_let_through(bundle: Bundle):
    reply = recommend(bundle, trace=True).json()
    ranking = bundle.recommend(bundle.encode(pa.table({"user_id": [100]})))
    assert [stage["stage"] for stage in reply["trace"]] == list(bundle.cascade.names)
    for stage, outcome in zip(reply["trace"], ranking.stages, strict=True):
        assert [item["item_id"] for item in stage["items"]] == bundle.items.ids_of(outcome.kept()[0][0])
    assert reply["trace"][-1]["items"] == reply["items"]


def test_unknown_items_in_a_history_are_tolerated_and_known_ones_count(bundle: Bundle):
    bare = items_of(recommend(bundle, user_id=1, history=[], trace=True))
    unknown = items_of(recommend(bundle, user_id=1, history=["gone", 3, {"item_id": item_id(4)}]))
    assert len(unknown) == len(bare)
    scores = [recommend(bundle, user_id=1, history=past).json()["items"] for past in ([], [item_id(4), item_id(9)])]
    assert scores[0] != scores[1]


@pytest.mark.parametrize(("body", "detail"), [
    ({"k": 0}, "k: .*got 0"), ({"k": "3"}, "k: .*got '3'"),
    ({"k": 6}, "k: 6 is more than the last stage keeps; ask for at most 5"),
    ({"user_id": None}, "user_id"), ({"user_id": True}, "user_id"),
    ({"user_id": 1.5}, r"^user_id: expected a valid integer or a valid string, got 1\.5$"),
    ({"user_id": 1 << 70}, "user_id"),
    ({"exclude": "5000"}, "exclude: "), ({"history": {"a": 1}}, "history: "),
    ({"history": [3, 1.5], "k": 0}, r"^k: .* \(and 1 more\)$"),
    ({"history": [3, {"item": 3}]}, r"^history\.1\.item_id: missing"),
    ({"history": ["3", 1.5]}, r"^history\.1: expected a valid integer or a valid string, got 1\.5$"),
    ({"history": [{"item_id": 3, "act": 3}]}, r"^history\.0\.act: unknown field; known: item_id, time_ms, features$"),
    ({"trace": "yes"}, "trace: "), ({"time_ms": "now"}, "time_ms: "),
    ({"kk": 1}, "kk: unknown field; known: user_id, k,"),
    ({"features": {"citty": 1}}, "did you mean 'city'"), ({"features": {"income": {"a": 1}}}, "features.income"),
])
def test_a_bad_body_is_a_problem_that_says_where(bundle: Bundle, body: dict, detail: str):
    reply = recommend(bundle, **body)
    assert reply.status_code == 422
    assert reply.headers["content-type"] == "application/problem+json"
    assert set(reply.json()) >= {"type", "title", "status", "detail"}
    assert reply.json()["status"] == 422
    assert re.search(detail, reply.json()["detail"]), reply.json()["detail"]


def test_a_body_that_is_no_json_is_a_problem(bundle: Bundle):
    reply = ask(gateway_of(bundle), "POST", "/v1/recommend", content=b"{", headers={"content-type": "application/json"})
    assert (reply.status_code, reply.headers["content-type"]) == (422, "application/problem+json")
    assert "not valid JSON" in reply.json()["detail"]


def test_a_wrong_path_or_method_is_a_problem(bundle: Bundle):
    for method, path, status in (("GET", "/v1/recommend", 405), ("GET", "/v2", 404)):
        reply = ask(gateway_of(bundle), method, path)
        assert (reply.status_code, reply.headers["content-type"]) == (status, "application/problem+json")


def test_a_failure_outside_of_the_stages_is_a_500_that_gives_nothing_away(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: Any) -> None:
        raise RuntimeError("secret")

    gateway = gateway_of(bundle)
    monkeypatch.setattr(gateway.active, "scored", broken)
    reply = ask(gateway, "POST", "/v1/recommend", json={"user_id": 100})
    assert (reply.status_code, reply.headers["content-type"]) == (500, "application/problem+json")
    assert "secret" not in reply.text


def test_a_stage_that_fails_is_left_out_and_the_order_of_the_one_before_it_stands(bundle: Bundle):
    reply = ask(gateway_of(bundle, ranker=Broken), "POST", "/v1/recommend", json={"user_id": 100}).json()
    before = recommend(bundle, trace=True).json()["trace"][-2]
    assert reply["items"] == before["items"][:KEEPS["ranker"]]
    assert (reply["degraded"], reply["degraded_at"], reply["reason"]) == (True, "ranker", "unavailable")


def test_readiness_names_the_stage_that_does_not_answer(bundle: Bundle):
    assert ask(gateway_of(bundle), "GET", "/readyz").json()["stages"] == dict.fromkeys(KEEPS, True)
    reply = ask(gateway_of(bundle, pre_ranker=Silent), "GET", "/readyz")
    assert reply.status_code == 503
    assert "pre_ranker" in reply.json()["detail"]
    assert ask(gateway_of(bundle, pre_ranker=Silent), "GET", "/healthz").status_code == 200


def test_the_model_is_described(bundle: Bundle):
    about = ask(gateway_of(bundle), "GET", "/v1/model").json()
    assert about["model"] == "tiny"
    assert [stage["keep"] for stage in about["stages"]] == list(KEEPS.values())
    assert about["items"] == bundle.items.num_items


def test_many_queries_at_once_get_their_own_answers(bundle: Bundle):
    gateway = gateway_of(bundle)

    async def all_users() -> list[list[int | str]]:
        answers = await asyncio.gather(*(gateway.recommend(Query(user_id=user)) for user in range(100, 112)))
        return [[item.item_id for item in answer.items] for answer in answers]

    assert asyncio.run(all_users()) == [expected(bundle, user)[0] for user in range(100, 112)]


def test_what_travels_between_stages_comes_back_as_it_was(bundle: Bundle):
    table = bundle.encode(pa.table({"user_id": [100, 101]}))
    assert unpack(pack(table)).equals(table)
    survivors = StageServer(bundle, "retriever").run(bundle.batch(table), None)
    assert (str(survivors.rows_QK.dtype), survivors.rows_QK.shape) == ("int32", (2, KEEPS["retriever"]))
