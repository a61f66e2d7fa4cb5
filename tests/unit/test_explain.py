"""explain, held against a funnel that is replayed by hand: every stage scores the whole catalogue."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from raycascade.bundle import Bundle, load_bundle
from raycascade.errors import DataError
from raycascade.explain import explain, explain_item
from tests.tiny_world import KEEPS, NUM_USERS, item_id

USER = 107


@pytest.fixture(scope="module")
def bundle(tiny_bundle: str) -> Bundle:
    return load_bundle(tiny_bundle)


@torch.no_grad()
def brute_force(bundle: Bundle, user: int) -> dict[str, dict[int, float]]:
    """Scores by raw item id of every stage over what reaches it, computed without the index and without the funnel."""
    batch = bundle.batch(bundle.encode(pa.table({"user_id": [user]})))
    rows = bundle.items.all_rows
    if batch.exclude:
        rows = np.setdiff1d(rows, batch.exclude[0])
    everything = torch.from_numpy(rows)[None, :]
    full = batch.with_candidates(everything, torch.ones_like(everything, dtype=torch.bool), bundle.items)
    scores = {name: scores_QC[0].numpy() for name, scores_QC in bundle.cascade(full).items()}
    seen, reaching = {}, np.arange(len(rows))
    for name in bundle.cascade.names:
        seen[name] = {int(bundle.items.keys[int(rows[i]) - 2].as_py()): float(scores[name][i]) for i in reaching}
        reaching = reaching[np.argsort(-scores[name][reaching], kind="stable")][:KEEPS[name]]
    return seen


def best(scores: dict[int, float]) -> list[int]:
    return sorted(scores, key=lambda item: -scores[item])


def test_a_recommended_item_is_lost_nowhere(bundle: Bundle):
    ranker = brute_force(bundle, USER)["ranker"]
    found = explain_item(bundle, user=str(USER), item=str(best(ranker)[0]))
    assert found["lost_at"] is None
    assert all(stage["survives"] for stage in found["stages"].values())
    assert found["stages"]["ranker"]["rank"] == 1


def test_an_item_that_the_pre_ranker_drops_stands_below_its_cut(bundle: Bundle):
    order = best(brute_force(bundle, USER)["pre_ranker"])
    dropped = order[KEEPS["pre_ranker"]]
    found = explain_item(bundle, user=str(USER), item=str(dropped))
    stage = found["stages"]["pre_ranker"]
    assert found["lost_at"] == "pre_ranker"
    assert found["stages"]["retriever"]["survives"]
    assert stage["rank"] == KEEPS["pre_ranker"] + 1
    assert stage["score"] < stage["cut"]
    assert not stage["survives"]


def test_ranks_scores_and_cuts_are_those_of_brute_force_for_every_item_of_the_catalogue(bundle: Bundle):
    seen = brute_force(bundle, USER)
    for item in list(seen["retriever"])[::9]:
        found = explain_item(bundle, user=str(USER), item=str(item))["stages"]
        for name, scores in seen.items():
            if item not in scores:
                continue
            order = best(scores)
            assert found[name]["rank"] == order.index(item) + 1, (name, item)
            assert found[name]["score"] == pytest.approx(scores[item], rel=1e-4, abs=1e-4)
            assert found[name]["cut"] == pytest.approx(scores[order[KEEPS[name] - 1]], rel=1e-4, abs=1e-4)


def test_the_stage_of_the_loss_is_the_first_that_does_not_keep_the_item(bundle: Bundle):
    seen = brute_force(bundle, USER)
    kept = {name: set(best(scores)[:KEEPS[name]]) for name, scores in seen.items()}
    for item in list(seen["retriever"])[::7]:
        expected = next((name for name in KEEPS if item not in kept[name]), None)
        assert explain_item(bundle, user=str(USER), item=str(item))["lost_at"] == expected


def test_an_item_that_the_user_must_not_get_is_lost_before_the_first_stage(bundle: Bundle):
    found = explain_item(bundle, user="103", item=str(item_id(0)))
    assert found["lost_at"] == "excluded"
    assert not found["stages"]["retriever"]["survives"]


@pytest.mark.parametrize(("user", "item", "what"), [
    (str(100 + NUM_USERS), "5000", "user"), ("100", "17", "item"), ("100", "x", "item"),
])
def test_what_the_bundle_does_not_know_is_an_error_that_names_it(tiny_bundle: str, user: str, item: str, what: str):
    with pytest.raises(DataError, match=f"{what} '"):
        explain(tiny_bundle, user=user, item=item)
