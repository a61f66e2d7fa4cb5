"""Trains models of peers; runs in the peers' environment, without this project (see `_peers.PeerProcess`).

A line of standard input is one run as JSON: the exported table (.npz), the order of the training rows by epoch (.npz),
the peer, the model, its fields and the sizes. The answer is one line of JSON: the validation losses by epoch. Written
to `out` (.npz): the logits of the first label on the validation and the test rows. Every model trains with Adam in the
given order of rows; training stops at the first epoch without a lower log loss on the validation rows, and the epoch
before it counts.
"""

import copy
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Values = dict[str, Tensor]  # one batch by name of the field
EVALUATION_ROWS = 4096
LARGEST_PART = 1 - 1e-7


class Peer:
    """What the loop needs of any peer: a module, its predictions and what it adds to the loss.

    `fields` are those the model sees; a field is a dict of name, kind (id, dense, history), side, rows and, for a
    column of the history, `of`.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        self.sizes, self.fields, self.model = spec["sizes"], spec["fields"], spec["model"]
        self.num_tasks = spec["num_tasks"]
        self.ids = [f for f in self.fields if f["kind"] == "id"]
        self.numbers = [f for f in self.fields if f["kind"] == "dense"]
        self.history = [f for f in self.fields if f["kind"] == "history"]
        self.weight_decay = 0.0
        self.clip: float | None = None
        self.module: nn.Module = nn.Identity()
        self.predict: Callable[[Values], tuple[Tensor, Tensor | float]] = self.nothing

    def nothing(self, values: Values) -> tuple[Tensor, Tensor | float]:
        """Before a model is chosen there is none."""
        raise LookupError(f"{type(self).__name__} has no model called {self.model!r}")

    def penalty(self, rows: int) -> Tensor | float:
        """What the peer adds to the mean loss of so many rows by itself."""
        return 0.0


# ---------------------------------------------------------------- torch-rechub
class Rechub(Peer):
    """torch-rechub: its trainer's defaults are Adam with a weight decay of 1e-5."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self.weight_decay = 1e-5
        features = importlib.import_module("torch_rechub.basic.features")
        dim, padded = self.sizes["dim"], {f["of"] for f in self.history}
        self.sparse = [features.SparseFeature(f["name"], f["rows"], dim, padding_idx=0 if f["name"] in padded else None)
                       for f in self.ids]
        self.dense = [features.DenseFeature(f["name"]) for f in self.numbers]
        self.past, self.drawn = (
            [features.SequenceFeature(prefix + f["name"], f["rows"], dim, pooling="concat", shared_with=f["of"],
                                      padding_idx=0) for f in self.history] for prefix in ("", "neg_"))
        self.targets = [f for name in (f["of"] for f in self.history) for f in self.sparse if f.name == name]
        self.others = [f for f in self.sparse if f not in self.targets]
        self.mlp = {"dims": list(self.sizes["hidden"]), "dropout": 0, "activation": "relu"}
        self.module = self._ranker() or self._sequence_model() or self._multi_task_model() or self.module
        self.predict = self._predicted

    def _predicted(self, values: Values) -> tuple[Tensor, Tensor | float]:
        found = self.module(values)
        return found if isinstance(found, tuple) else (found, 0.0)

    def _ranker(self) -> nn.Module | None:
        models = importlib.import_module("torch_rechub.models.ranking")
        every, layers, dim = self.sparse + self.dense, self.sizes["layers"], self.sizes["dim"]
        attention = {"num_layers": layers, "num_heads": self.sizes["heads"]}
        makers: dict[str, Callable[[], nn.Module]] = {
            "wide_deep": lambda: models.WideDeep(every, every, self.mlp),
            "deepfm": lambda: models.DeepFM(every, self.sparse, self.mlp),
            "dcn": lambda: models.DCN(every, layers, self.mlp),
            "dcn_v2": lambda: models.DCNv2(every, layers, self.mlp, use_low_rank_mixture=False),
            "edcn": lambda: models.EDCN(every, layers, dict(self.mlp)),
            "fm": lambda: models.AFM(self.sparse, dim, t=self.sizes["attention"]),  # softmax over one entry: a is 1
            "fibinet": lambda: models.FiBiNet(self.sparse, self.mlp, bilinear_type="field_each"),
            "autoint": lambda: models.AutoInt(self.sparse, self.dense, **attention),
            "autoint_plus": lambda: models.AutoInt(self.sparse, self.dense, **attention, mlp_params=self.mlp),
        }
        return makers[self.model]() if self.model in makers else None

    def _sequence_model(self) -> nn.Module | None:
        models = importlib.import_module("torch_rechub.models.ranking")
        bare = {"dims": list(self.sizes["hidden"]), "dropout": 0}
        makers: dict[str, Callable[[], nn.Module]] = {
            "din": lambda: models.DIN(self.others, self.past, self.targets, bare,
                                      {"dims": [36], "activation": "dice", "use_softmax": False}),
            "dien": lambda: models.DIEN(self.others + self.dense, self.past, self.drawn, self.targets, bare, alpha=1.0),
            "bst": lambda: models.BST(self.others + self.dense, self.past, self.targets, self.mlp,
                                      nhead=self.sizes["heads"], dropout=0.0),
        }
        return makers[self.model]() if self.model in makers else None

    def _multi_task_model(self) -> nn.Module | None:
        every = self.sparse + self.dense
        kinds = ["classification"] * self.num_tasks
        expert = {"dims": list(self.sizes["expert_hidden"]), "dropout": 0, "activation": "relu"}
        towers = [{"dims": list(self.sizes["tower_hidden"]), "dropout": 0, "activation": "relu"}] * self.num_tasks
        if self.model == "two_tower":
            tower = {"dims": [*self.sizes["hidden"], self.sizes["vector"]], "dropout": 0, "activation": "relu"}
            item = {f["name"] for f in self.fields if f["side"] == "item"}
            matching = importlib.import_module("torch_rechub.models.matching")
            return matching.DSSM([f for f in every if f.name not in item], [f for f in every if f.name in item],
                                 tower, dict(tower))
        models = importlib.import_module("torch_rechub.models.multi_task")
        makers: dict[str, Callable[[], nn.Module]] = {
            "shared_bottom": lambda: models.SharedBottom(every, kinds, expert, towers),
            "mmoe": lambda: models.MMOE(every, kinds, self.sizes["experts"], expert, towers),
            "ple": lambda: models.PLE(every, kinds, 1, 2, 1, expert, towers),
        }
        return makers[self.model]() if self.model in makers else None


# ---------------------------------------------------------------- DeepCTR-Torch
class DeepCtr(Peer):
    """DeepCTR-Torch: its models' defaults penalise the embeddings by 1e-5 (1e-6 with a history), added to the sum of
    the losses of a batch."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        inputs = importlib.import_module("deepctr_torch.inputs")
        dim = self.sizes["dim"]
        self.sparse = [inputs.SparseFeat(f["name"], f["rows"], embedding_dim=dim) for f in self.ids]
        self.dense = [inputs.DenseFeat(f["name"], 1) for f in self.numbers]
        self.past = [inputs.VarLenSparseFeat(
            inputs.SparseFeat(prefix + f["name"], f["rows"], embedding_dim=dim, embedding_name=f["of"]),
            spec["history_len"], length_name="history_len") for prefix in ("", "neg_") for f in self.history]
        seed = {"seed": spec["seed"]}
        self.module = self._ranker(seed) or self._other(seed) or self.module
        self.predict = self._predicted

    def _ranker(self, seed: dict[str, Any]) -> nn.Module | None:
        models = importlib.import_module("deepctr_torch.models")
        every, hidden, layers = self.sparse + self.dense, tuple(self.sizes["hidden"]), self.sizes["layers"]
        norm = {"dnn_use_bn": True, "dnn_hidden_units": hidden, **seed}
        attention = {"att_layer_num": layers, "att_head_num": self.sizes["heads"]}
        makers: dict[str, Callable[[], nn.Module]] = {
            "lr": lambda: models.WDL(every, [], dnn_hidden_units=(), **seed),
            "wide_deep": lambda: models.WDL(every, every, **norm),
            "deepfm": lambda: models.DeepFM(every, every, **norm),
            "dcn": lambda: models.DCN(every, every, cross_num=layers, **norm),
            "dcn_v2": lambda: models.DCN(every, every, cross_num=layers, cross_parameterization="matrix", **norm),
            "afm": lambda: models.AFM(every, self.sparse, attention_factor=self.sizes["attention"], **seed),
            "fibinet": lambda: models.FiBiNET(every, every, bilinear_type="each", dnn_hidden_units=hidden, **seed),
            "autoint": lambda: models.AutoInt(every, every, **attention, dnn_hidden_units=(), **seed),
            "autoint_plus": lambda: models.AutoInt(every, every, **attention, **norm),
        }
        return makers[self.model]() if self.model in makers else None

    def _other(self, seed: dict[str, Any]) -> nn.Module | None:
        models = importlib.import_module("deepctr_torch.models")
        every, names = self.sparse + self.dense, [f["of"] for f in self.history]
        hidden, tower = tuple(self.sizes["hidden"]), {"tower_dnn_hidden_units": tuple(self.sizes["tower_hidden"])}
        tasks = {"task_types": ["binary"] * self.num_tasks, "task_names": [str(n) for n in range(self.num_tasks)]}
        expert, gate = tuple(self.sizes["expert_hidden"]), {"gate_dnn_hidden_units": ()}
        makers: dict[str, Callable[[], nn.Module]] = {
            "din": lambda: models.DIN(every + self.past[:len(names)], names, dnn_use_bn=True, dnn_hidden_units=hidden,
                                      att_hidden_size=(36,), **seed),
            "dien": lambda: models.DIEN(every + self.past, names, gru_type="AUGRU", use_negsampling=True, use_bn=True,
                                        dnn_hidden_units=hidden, **seed),
            "shared_bottom": lambda: models.SharedBottom(every, bottom_dnn_hidden_units=expert, **tower, **tasks,
                                                         **seed),
            "mmoe": lambda: models.MMOE(every, num_experts=self.sizes["experts"], expert_dnn_hidden_units=expert,
                                        **gate, **tower, **tasks, **seed),
            "ple": lambda: models.PLE(every, shared_expert_num=1, specific_expert_num=2, num_levels=1,
                                      expert_dnn_hidden_units=expert, **gate, **tower, **tasks, **seed),
        }
        return makers[self.model]() if self.model in makers else None

    def _predicted(self, values: Values) -> tuple[Tensor, Tensor | float]:
        columns = []
        for name in self.module.feature_index:  # type: ignore[union-attr]
            column = values[name]
            columns.append(column.float() if column.ndim > 1 else column.float().unsqueeze(1))
        predicted = self.module(torch.cat(columns, 1))
        return (predicted if self.num_tasks > 1 else predicted[:, 0]), self.module.aux_loss  # type: ignore[return-value]

    def penalty(self, rows: int) -> Tensor | float:
        return self.module.get_regularization_loss().sum() / rows  # type: ignore[operator]


# ---------------------------------------------------------------- FuxiCTR
class Fuxi(Peer):
    """FuxiCTR: no penalty by default, gradients clipped to a norm of 10."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self.clip = 10.0
        kinds = {"id": "categorical", "dense": "numeric"}
        self.targets = [f["of"] for f in self.history]
        feature_map = importlib.import_module("fuxictr.features").FeatureMap("table", str(Path(spec["out"]).parent))
        for f in [*self.ids, *self.numbers]:
            own = {"padding_idx": 0} if f["name"] in self.targets else {}
            feature_map.features[f["name"]] = {
                "type": kinds[f["kind"]], "source": "item" if f["name"] in self.targets else "",
                "vocab_size": f["rows"], **own}
        feature_map.labels, feature_map.default_emb_dim = ["label"], self.sizes["dim"]
        feature_map.num_fields = feature_map.get_num_fields()
        if self.model == "lr":
            blocks = importlib.import_module("fuxictr.pytorch.layers")
            self.module = blocks.LogisticRegression(feature_map)
            self.predict = lambda values: (torch.sigmoid(self.module(self._of_request(values)))[:, 0], 0.0)
            return
        name = {'dcn_v2': 'DCNv2', 'din_fields': 'DIN', 'dien_alone': 'DIEN'}[self.model]
        zoo = importlib.import_module(f'model_zoo.LongCTR.{name}')
        own = {"dcn_v2": {"parallel_dnn_hidden_units": list(self.sizes["hidden"]),
                          "num_cross_layers": self.sizes["layers"]},
               "din_fields": {"dnn_hidden_units": list(self.sizes["hidden"]), "attention_hidden_units": [36],
                              "dnn_activations": "Dice"},
               "dien_alone": {"dnn_hidden_units": list(self.sizes["hidden"])}}[self.model]
        maker = getattr(zoo, name)
        self.module = maker(feature_map, embedding_dim=self.sizes["dim"], batch_norm=True, **own, optimizer="adam",
                            loss="binary_crossentropy", metrics=["AUC"], verbose=0, task="binary_classification",
                            model_root=str(Path(spec["out"]).parent))
        self.predict = self._predicted

    def _of_request(self, values: Values) -> Values:
        return {f["name"]: values[f["name"]] for f in [*self.ids, *self.numbers]}

    def _predicted(self, values: Values) -> tuple[Tensor, Tensor | float]:
        own = {f["name"]: values[f["name"]] for f in [*self.ids, *self.numbers] if f["name"] not in self.targets}
        rows = {f["of"]: torch.cat([values[f["name"]], values[f["of"]][:, None]], 1).flatten() for f in self.history}
        mask = (values[self.history[0]["name"]] > 0).float()
        return self.module((own, rows, mask))["y_pred"][:, 0], 0.0


PEERS: dict[str, type[Peer]] = {"torch-rechub": Rechub, "DeepCTR-Torch": DeepCtr, "FuxiCTR": Fuxi}


# ---------------------------------------------------------------- the loop
class Table:
    """The exported rows as tensors, and batches of them."""

    def __init__(self, path: str, fields: list[dict[str, Any]], labels: list[str], seed: int) -> None:
        with np.load(path) as arrays:
            self.columns = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        self.names, self.labels = [f["name"] for f in fields], labels
        self.history = {f["name"]: f["of"] for f in fields if f["kind"] == "history"}
        self.generator = torch.Generator().manual_seed(seed)

    def rows(self, split: str) -> int:
        return len(self.columns[f"{split}/label:{self.labels[0]}"])

    def truth(self, split: str, chosen: Tensor) -> Tensor:
        """[B], or [B, T] of several labels."""
        found = [self.columns[f"{split}/label:{name}"][chosen] for name in self.labels]
        return found[0] if len(found) == 1 else torch.stack(found, 1)

    def batch(self, split: str, chosen: Tensor) -> Values:
        """The fields, and of a history its length and as many random items of the catalogue."""
        values = {name: self.columns[f"{split}/{name}"][chosen] for name in self.names}
        if self.history:
            first = values[next(iter(self.history))]
            values["history_len"] = (first > 0).sum(1)
            catalogue = len(self.columns[f"items/{next(iter(self.history.values()))}"])
            drawn = torch.randint(catalogue, first.shape, generator=self.generator)
            for name, of in self.history.items():
                values[f"neg_{name}"] = torch.where(first > 0, self.columns[f"items/{of}"][drawn], 0)
        return values


def train_epoch(peer: Peer, table: Table, order: Tensor, optimiser: torch.optim.Optimizer, batch: int) -> None:
    peer.module.train()
    for chosen in order.split(batch):
        optimiser.zero_grad()
        predicted, extra = peer.predict(table.batch("train", chosen))
        truth = table.truth("train", chosen)
        loss = nn.functional.binary_cross_entropy(predicted, truth) * peer.num_tasks
        total = loss + extra + peer.penalty(len(chosen))
        total.sum().backward()
        if peer.clip is not None:
            nn.utils.clip_grad_norm_(peer.module.parameters(), peer.clip)
        optimiser.step()


@torch.no_grad()
def scores(peer: Peer, table: Table, split: str) -> tuple[np.ndarray, float]:
    """Logits of the first label, and the log loss summed over the labels."""
    peer.module.eval()
    found, loss = [], 0.0
    for chosen in torch.arange(table.rows(split)).split(EVALUATION_ROWS):
        predicted = peer.predict(table.batch(split, chosen))[0].double().clamp(1 - LARGEST_PART, LARGEST_PART)
        truth = table.truth(split, chosen).double()
        loss += float(nn.functional.binary_cross_entropy(predicted, truth)) * peer.num_tasks * len(chosen)
        found.append(torch.logit(predicted if predicted.ndim == 1 else predicted[:, 0]))
    return torch.cat(found).numpy(), loss / table.rows(split)


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Trains one model and writes its logits."""
    torch.manual_seed(spec["seed"])
    peer = PEERS[spec["peer"]](spec)
    table = Table(spec["table"], spec["fields"], spec["labels"], spec["seed"])
    optimiser = torch.optim.Adam(peer.module.parameters(), lr=spec["lr"], weight_decay=peer.weight_decay)
    losses: list[float] = []
    best: dict[str, Tensor] = {}
    with np.load(spec["orders"]) as orders:
        for epoch in range(spec["sizes"]["epochs"]):
            train_epoch(peer, table, torch.from_numpy(orders[str(epoch)]), optimiser, spec["sizes"]["batch"])
            losses.append(scores(peer, table, "valid")[1])
            if losses[-1] > min(losses):
                break
            best = copy.deepcopy(peer.module.state_dict())
    peer.module.load_state_dict(best)
    np.savez(spec["out"], valid=scores(peer, table, "valid")[0], test=scores(peer, table, "test")[0])
    return {"losses": losses}


def refuse(*args: object, **options: object) -> None:
    """In place of a request to the network: DeepCTR-Torch asks for its newest version when it is imported."""
    raise OSError("the network is not used")


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # peers print
    torch.set_num_threads(1)
    importlib.import_module("requests").get = refuse  # type: ignore[attr-defined]
    for line in sys.stdin:
        try:
            answer = run(json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
