"""The pure parts of the benchmarks against peers: sizes that both sides get, and the rows behind every figure."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch):
    """Imports a file of the benchmarks by name, as the scripts do of each other."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name: str) -> ModuleType:
        for known in ("_ctr_table", "_peer_worker", "_peers", "_rates", "_shards"):
            monkeypatch.delitem(sys.modules, known, raising=False)
        return importlib.import_module(name)

    return load


def test_the_environment_lies_in_the_users_cache_folder(module, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert module("_peers").cache_folder() == tmp_path / "raycascade" / "peers"


def test_a_finished_environment_is_not_installed_again(module, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    peers = module("_peers")
    monkeypatch.setattr(peers.subprocess, "run", lambda *a, **k: pytest.fail("pip was started"))
    folder = tmp_path / "raycascade" / "peers"
    folder.mkdir(parents=True)
    (folder / "installed.txt").write_text("\n".join(peers.requirements()))
    assert peers.peer_python() == folder / "bin" / "python"


def test_the_peers_get_the_callers_build_of_torch(module) -> None:
    import torch

    assert module("_peers").requirements()[0] == f"torch=={torch.__version__}"


def test_the_ratio_is_taken_against_the_fastest_peer(module) -> None:
    rates = {"a": 10.0, "b": 30.0, "raycascade": 60.0, "c": 20.0}
    assert module("_rates").ratio_to_best(rates) == ("b", 2.0)
    assert module("_rates").ratio_to_best({"raycascade": 60.0}) is None


def test_a_row_says_medians_of_rows_a_second_and_whether_the_clock_meets_the_bar(module) -> None:
    rates = module("_rates").Rates(rows=100)
    for ours, peer in ((0.5, 1.0), (0.1, 4.0), (0.4, 2.0)):  # medians .4 and 2 seconds, half of them processor time
        rates.add("raycascade", ours, ours / 2)
        rates.add("b", peer, peer / 2)
    line, met = rates.row(["deepfm"], ["a", "b"], 5.0)
    assert line == "| deepfm | 250 (500) | - | 50 (100) | 5.00 (b) | 5.00 (b) | 5: met |"
    assert met
    assert rates.row(["deepfm"], ["a", "b"], 5.1)[1] is False
    assert line.count("|") == module("_rates").header(["model"], ["a", "b"]).splitlines()[0].count("|")


def test_a_peer_without_the_model_is_not_asked(module) -> None:
    peers = module("_peers")
    assert peers.models_of("deepfm", ["fuxictr", "torch-rechub"]) == ["torch-rechub"]
    assert peers.models_of("dcn_v2", ["fuxictr", "torch-rechub"]) == ["fuxictr", "torch-rechub"]


@pytest.mark.parametrize(("share", "expected"), [(0.5, 50.0), (0.99, 99.0), (1.0, 100.0), (0.001, 1.0)])
def test_a_quantile_is_the_least_value_with_that_share_at_or_below_it(module, share, expected) -> None:
    assert module("_rates").quantile([float(n) for n in range(100, 0, -1)], share) == expected


def test_the_meter_hands_out_batches_round_and_round_and_goes_on_where_it_stopped(module) -> None:
    meter = module("_peer_worker").Meter(["a", "b", "c"])
    assert list(meter.take(2)) == ["a", "b"]
    assert list(meter.take(4)) == ["c", "a", "b", "c"]
    assert meter.answer()["steps"] == 4


def test_the_peers_rows_hold_the_same_values_as_our_batches(module, tmp_path) -> None:
    ctr = module("_ctr_table")
    table = ctr.Table(rows=50, requests=6, items=9, history=3)
    batches = ctr.batches_of(ctr.write_table(str(tmp_path), table, candidates=2), 4)
    arrays = ctr.arrays_of(batches, table)
    assert arrays["ids"].shape == (12, 26)
    assert arrays["dense"].shape == (12, 13)
    assert arrays["history"].shape == (12, 3, 2)
    assert arrays["length"].tolist() == [3] * 12
    # Row 9 is the second candidate of the fifth request, which is the first of the second batch.
    second = batches[1]
    assert arrays["ids"][9, 0] == second.user["u00"][0]
    assert arrays["ids"][9, 13] == second.item["i00"][0, 1]
    assert arrays["dense"][9, 12] == second.item["y05"][0, 1]
    assert arrays["label"][9] == second.targets.labels["click"][0, 1]
    assert np.array_equal(arrays["history"][9, :, 1], second.history["i01"][0].numpy())


def test_both_sides_are_told_the_same_sizes(module) -> None:
    ctr = module("_ctr_table")
    spec = ctr.Table(rows=50, requests=1, items=1).spec(dim=16, hidden=[8, 4], batch=2, model="dcn_v2")
    ours = ctr.model_options("dcn_v2", dim=16, hidden=[8, 4])
    assert (len(spec["ids"]), len(spec["dense"]), spec["num_rows"]) == (26, 13, 52)
    assert ours == {"name": "dcn_v2", "dim": spec["dim"], "hidden": spec["hidden"], "num_layers": spec["layers"]}
