"""Traffic logged in one run trains the next cascade: gateway -> log and events -> prepare -> train -> a bundle that
answers, with labels held against what the users of the test did."""

import asyncio
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from raycascade.bundle import Bundle, load_bundle
from raycascade.config import Config, load_config
from raycascade.flows.evaluate import evaluate
from raycascade.flows.prepare import prepare
from raycascade.flows.train import train
from raycascade.ragged import Ragged
from raycascade.serving.api import build_api
from raycascade.serving.gateway import Gateway
from raycascade.serving.stages import LocalStage, StageServer
from raycascade.serving.traffic import TrafficLog
from raycascade.shards import Shards
from tests.served import patient
from tests.tiny_world import DAY_MS, KEEPS, SCHEMA, START_MS, raw_items

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FIRST_MS = START_MS + 8 * DAY_MS  # 2024-01-09, after the training log of the bundle that serves
DAYS, USERS, SHOWN = 4, tuple(range(100, 124)), 4
UNKNOWN_USER = 7


@dataclass
class Traffic:
    """What was asked and answered, and who clicked what, as the test saw it."""

    folder: Path
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    moments: dict[str, int] = field(default_factory=dict)
    clicks: set[tuple[str, int]] = field(default_factory=set)  # request, item


@pytest.fixture(scope="module")
def traffic(tiny_bundle: str, tmp_path_factory: pytest.TempPathFactory) -> Traffic:
    """Four days over HTTP: every user asks twice a day and clicks on short items, a minute after they were shown."""
    seen = Traffic(tmp_path_factory.mktemp("traffic"))
    pq.write_table(raw_items(), seen.folder / "items.parquet")
    bundle, options = load_bundle(tiny_bundle), patient(deadline_ms=60_000)
    log = TrafficLog(str(seen.folder / "log"), rotate_rows=50)
    stages = {name: LocalStage(StageServer(bundle, name), options.stage(name)) for name in bundle.cascade.names}
    asyncio.run(_days(Gateway(bundle, stages, options, traffic=log), seen))
    assert log.close()
    assert log.count("requests", "written") == len(seen.answers) == DAYS * 2 * (len(USERS) + 1)
    return seen


async def _days(gateway: Gateway, seen: Traffic) -> None:
    length = dict(zip(raw_items()["item_id"].to_pylist(), raw_items()["length"].to_pylist(), strict=True))
    transport = httpx.ASGITransport(app=build_api(gateway))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for turn in range(2 * DAYS):
            for place, user in enumerate((*USERS, UNKNOWN_USER)):
                moment = FIRST_MS + turn * DAY_MS // 2 + place * 60_000
                body = {"user_id": user, "k": SHOWN, "time_ms": moment, "trace": True,
                        "context": {"device": ["phone", "desk"][turn % 2]}}
                answer = (await client.post("/v1/recommend", json=body)).raise_for_status().json()
                seen.answers[answer["request_id"]], seen.moments[answer["request_id"]] = answer, moment
                liked = [item["item_id"] for item in answer["items"] if length[item["item_id"]] < 8]
                events = [{"event_id": f"{answer['request_id']}-{item}", "user_id": user, "item_id": item,
                           "time_ms": moment + 60_000, "features": {"action": "click"}} for item in liked]
                if events:
                    (await client.post("/v1/events", json={"events": events})).raise_for_status()
                seen.clicks |= {(answer["request_id"], item) for item in liked}


@pytest.fixture(scope="module")
def config(traffic: Traffic) -> Config:
    features = [feature.model_dump(mode="json") for feature in SCHEMA.features]
    tree = {
        "paths": {"raw": str(traffic.folder / "log"), "shards": str(traffic.folder / "shards"),
                  "bundles": str(traffic.folder / "bundles")},
        "dataset": {"name": "traffic", "items": str(traffic.folder / "items.parquet"), "features": features,
                    "labels": {"click": {"feature": "action", "values": ["click"]}}, "positive": "click",
                    "window_minutes": 120, "per_level": 5, "gains": {"click": 2.0}},
        "splits": {"test_from": "2024-01-12"},
        "stages": [
            {"name": "retriever", "keep": 40, "exclude": ["pair"],
             "model": {"name": "two_tower", "dim": 4, "hidden": [8], "vector_dim": 4}},
            {"name": "pre_ranker", "keep": 15, "model": {"name": "mlp", "dim": 4, "hidden": [8]}},
            {"name": "ranker", "keep": 5, "model": {"name": "din", "dim": 4, "hidden": [8]}}],
        "loss": {"name": "lcron"}, "lists": {"k": 2, "quotas": [12, 6, 3]},
        "train": {"batch_size": 16, "lr": 0.02, "epochs": 3, "gpu": False, "run": "next"},
    }
    (traffic.folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return load_config(str(traffic.folder / "config.yaml"))


@pytest.fixture(scope="module")
def shards(ray_cluster: None, config: Config) -> Shards:
    prepare(config)
    return Shards.open(config.paths.shards)


@pytest.fixture(scope="module")
def bundle(shards: Shards, config: Config) -> Bundle:
    return load_bundle(train(config)["bundle"])


def requests_of(shards: Shards, split: str) -> list[dict[str, Any]]:
    """Prepared requests with raw item ids."""
    keys = raw_items()["item_id"].to_pylist()
    rows = shards.table(f"requests/{split}").to_pylist()
    for row in rows:
        row["items"] = [keys[place - 2] for place in row["candidates"]]
    return rows


def test_every_answer_is_prepared_with_the_candidates_of_all_stages_and_the_clicks(traffic: Traffic, shards: Shards):
    rows = requests_of(shards, "train") + requests_of(shards, "test")
    last_turn_ms = max(traffic.moments.values()) - 60 * 60_000  # the window of those requests is not over
    whole = {name for name, moment in traffic.moments.items()
             if moment < last_turn_ms and not traffic.answers[name]["degraded"]}  # a busy machine may miss a deadline
    assert {row["request_id"] for row in rows} == whole
    num_clicks = 0
    for row in rows:
        answer = traffic.answers[row["request_id"]]
        reached = dict(zip(row["items"], row["reached"], strict=True))
        assert {item for item, level in reached.items() if level == 4} == {i["item_id"] for i in answer["items"]}
        for level, stage in enumerate(answer["trace"], start=1):
            let_through = {item["item_id"] for item in stage["items"]}
            assert {item for item, deepest in reached.items() if deepest >= level} <= let_through
        assert [list(reached.values()).count(level) for level in (1, 2, 3, 4)] == [5, 5, 1, SHOWN]
        clicked = {item for item, click in zip(row["items"], row["click"], strict=True) if click}
        assert clicked == {item for request, item in traffic.clicks if request == row["request_id"]}
        observed = {item for item, click in zip(row["items"], row["click"], strict=True) if click is not None}
        assert observed == {item for item, level in reached.items() if level == 4}
        num_clicks += len(clicked)
    assert num_clicks > 50


def test_histories_of_the_log_hold_the_clicks_that_came_before(traffic: Traffic, shards: Shards):
    keys = raw_items()["item_id"].to_pylist()
    for row in requests_of(shards, "test"):
        user = traffic.answers[row["request_id"]]["user_id"]
        before = [(traffic.moments[request] + 60_000, item) for request, item in traffic.clicks
                  if traffic.answers[request]["user_id"] == user
                  and traffic.moments[request] + 60_000 < traffic.moments[row["request_id"]]]
        held = set(zip(row["history_time_ms"], [keys[place - 2] for place in row["history"]], strict=True))
        newest = sorted(before)[-10:]  # what the models see
        assert {event for event in newest if event[0] > newest[0][0]} <= held


def test_the_next_cascade_learns_from_it_and_answers(traffic: Traffic, shards: Shards, bundle: Bundle, config: Config):
    curve = json.loads(Path(bundle.uri, "metrics.json").read_text())["curves"]["loss"]
    assert curve[-1][1] < curve[0][1]
    measured = evaluate(bundle.uri)
    assert all(math.isfinite(value) for value in measured["metrics"].values())
    joint = "joint_recall@2@3"  # how often what was shown and clicked passes all stages, on the last day
    assert measured["metrics"][joint] > 2 * measured["baselines"]["random"][joint]
    users = pa.table({"user_id": [*USERS[:5], 999]})
    rows, mask = bundle.recommend(bundle.encode(users)).final.kept()
    assert mask.all()
    assert rows.shape == (6, KEEPS["ranker"])
    assert len({tuple(row) for row in rows.tolist()}) > 1
    known = bundle.encode(users)
    assert Ragged.from_arrow(known["history"]).lengths_Q[:5].min() > 0
