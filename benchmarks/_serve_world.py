"""The cascade that serving is clocked with: bundles with drawn weights over the catalogue of the simulated log.

The features are those of a published production log (`features: recflow`): ids, lists of ids, clocks, ages and the
history of 50 events. Stages have the default sizes of their models. Untrained weights answer as fast as trained ones.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from raycascade import selfcheck
from raycascade.bundle import load_bundle, save_bundle
from raycascade.cascade import Cascade
from raycascade.config import Config, parse_config
from raycascade.datasets import _world
from raycascade.datasets.simulated import LABELS, Simulated
from raycascade.features import FeatureState
from raycascade.fitting import FitPart
from raycascade.items import ItemTable

SEED = 7
DAYS = 8  # after them most users have as many events as a history holds
SPREAD = 0.3  # standard deviation of the weights: scores differ by more than rounding
MODELS = {"retriever": "two_tower", "pre_ranker": "mlp", "ranker": "din"}


@dataclass(frozen=True)
class Size:
    """`keeps`: of the cascade; `long_keeps`: of the one that ranks many candidates."""

    items: int
    users: int
    keeps: dict[str, int]
    long_keeps: dict[str, int]


FULL = Size(100_000, 2_000, {"retriever": 500, "pre_ranker": 100, "ranker": 20}, {"retriever": 1_000, "ranker": 20})
SMALL = Size(2_000, 256, {"retriever": 60, "pre_ranker": 20, "ranker": 5}, {"retriever": 100, "ranker": 5})


@dataclass(frozen=True)
class World:
    """What was made: the URIs of two bundles and the users whose history is full."""

    cascade: str
    long_ranking: str
    users: tuple[int, ...]


def make(folder: Path, size: Size) -> World:
    """Both bundles, with their self-checks, below a folder."""
    dataset = Simulated(Simulated.Config(num_items=size.items, num_users=size.users, num_days=DAYS, seed=SEED,
                                         features="recflow"))
    requests = pa.concat_tables([table for piece in dataset.slices() for table in dataset.read(piece)])
    part = FitPart(dataset.schema())
    part.add_requests(requests, where="benchmark")
    part.add_items(dataset.items(), where="benchmark")
    state = part.finish(dataset.items(), as_of_ms=_world.START_MS + DAYS * _world.DAY_MS)
    last = _last_of_each_user(requests)
    lengths_U = np.diff(last["history"].combine_chunks().offsets.to_numpy())
    users = last["user_id"].to_numpy()[lengths_U == dataset.config.history_len]
    encoded = state.encode_requests(last, where="benchmark", strict=False)
    for name, keeps in (("cascade", size.keeps), ("long_ranking", size.long_keeps)):
        _write_bundle(str(folder / name), dataset, state, encoded, keeps)
    return World(str(folder / "cascade"), str(folder / "long_ranking"), tuple(users.tolist()))


def _last_of_each_user(requests: pa.Table) -> pa.Table:
    """Every user's last request: what is known of them at the end of the log."""
    ordered = requests.sort_by([("user_id", "ascending"), ("time_ms", "ascending")])
    user_Q = ordered["user_id"].to_numpy()
    last = ordered.take(np.flatnonzero(np.append(user_Q[1:] != user_Q[:-1], True)))
    return last.drop_columns(["candidates", "reached", "rank", "exposed", *LABELS]).combine_chunks()


def _config(keeps: dict[str, int]) -> Config:
    stages = [{"name": name, "keep": keep, "model": {"name": MODELS[name]}} for name, keep in keeps.items()]
    return parse_config({"dataset": {"name": "simulated"}, "splits": {"test_from": "2024-01-08"}, "stages": stages},
                        where="benchmark")


def _write_bundle(
    uri: str, dataset: Simulated, state: FeatureState, users: pa.Table, keeps: dict[str, int]
) -> None:
    config, items = _config(keeps), state.encode_items(dataset.items(), where="benchmark")
    torch.manual_seed(SEED)
    cascade = Cascade(config, state.space)
    with torch.no_grad():
        for parameter in cascade.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, SPREAD)
        for module in cascade.modules():
            if isinstance(module, torch.nn.Embedding):
                module.weight[0] = 0.0  # padding
    save_bundle(uri, config=config, cascade=cascade, items=ItemTable.from_encoded(items, state), encoded_items=items,
                users=users, metrics={})
    selfcheck.record(uri)


class InProcess:
    """A bundle in this process. `answer` takes a raw query, as a server does; `rank` one that is encoded already."""

    def __init__(self, uri: str) -> None:
        self.bundle = load_bundle(uri)

    def encoded(self, user: int) -> pa.Table:
        """A user's query as the cascade takes it."""
        return self.bundle.encode(pa.table({"user_id": [user]}))

    def rank(self, encoded: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """Item rows and scores of the answer, best first."""
        final = self.bundle.recommend(encoded).final
        rows_QK, mask_QK = final.kept()
        return rows_QK[0][mask_QK[0]], final.scores_QC[0, :final.keep][mask_QK[0]]

    def answer(self, user: int) -> list[tuple[object, float]]:
        """Items and scores for a user, best first."""
        rows_K, scores_K = self.rank(self.encoded(user))
        return list(zip(self.bundle.items.ids_of(rows_K), scores_K.tolist(), strict=True))
