"""Runs one peer's model; started by `_peers.PeerProcess` in the peers' environment, so it imports nothing of ours.

Reads one JSON request a line and answers with one line:
    {"do": "open", "library": ..., "model": ..., "table": PATH.npz, "own_loader": false, "spec": {...}}
                                   -> {"parameters": count}
    {"do": "train", "steps": n}    -> {"seconds": ..., "processor": ..., "steps": n}, the peer's own training loop
    {"do": "score", "steps": n}    -> the same, forward passes in evaluation mode

The table: ids [N, F], dense [N, D], label [N] and, for din, history [N, L, H] and length [N]. The spec: names of the
columns, vocabulary size, dim, hidden, batch. Batches are tensors in each library's own form before the clock starts,
or come from the library's own loader.
"""

# The peers are not installed where types are checked.
# pyright: reportMissingImports=false

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Answer = dict[str, Any]


class Meter:
    """A loader of the next so many batches, without end; it clocks from the first demand to the last return."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.endless = self._batches()
        self.steps, self.seconds, self.processor = 0, 0.0, 0.0

    def _batches(self) -> Iterator[Any]:
        while True:
            yield from self.loader

    def take(self, steps: int) -> "Meter":
        """The loader of the next so many steps."""
        self.steps = steps
        return self

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        clock, processor = time.perf_counter(), time.process_time()
        for _ in range(self.steps):
            yield next(self.endless)
        self.seconds, self.processor = time.perf_counter() - clock, time.process_time() - processor

    def answer(self) -> Answer:
        """What was clocked."""
        return {"seconds": self.seconds, "processor": self.processor, "steps": self.steps}


class TorchRechub:
    """torch-rechub: `CTRTrainer.train_one_epoch` over a loader of our batches; its Adam without weight decay."""

    def __init__(self, name: str, spec: Answer) -> None:
        from torch_rechub.basic.features import DenseFeature, SequenceFeature, SparseFeature
        from torch_rechub.models import ranking
        from torch_rechub.trainers import CTRTrainer
        self.spec, rows, dim = spec, spec["num_rows"], spec["dim"]
        sparse = [SparseFeature(n, vocab_size=rows, embed_dim=dim) for n in spec["ids"]]
        dense = [DenseFeature(n) for n in spec["dense"]]
        mlp, both = {"dims": spec["hidden"]}, [*sparse, *dense]
        if name == "deepfm":
            model: Any = ranking.DeepFM(both, sparse, mlp)
        elif name == "wide_deep":
            model = ranking.WideDeep(both, both, mlp)
        elif name == "dcn_v2":
            model = ranking.DCNv2(both, spec["layers"], mlp, use_low_rank_mixture=False)
        elif name == "dcn":
            model = ranking.DCN(both, spec["layers"], mlp)
        elif name == "autoint":
            model = ranking.AutoInt(sparse, dense, num_layers=spec["layers"], num_heads=2)
        elif name == "fibinet":
            model = ranking.FiBiNet(sparse, mlp)
        elif name == "afm":
            model = ranking.AFM(sparse, dim, t=spec["attention"])
        else:
            assert name == "din", name
            self.behaviours = [SequenceFeature(f"past_{n}", vocab_size=rows, embed_dim=dim, pooling="concat",
                                               shared_with=n) for n in spec["history"]]
            targets = [f for f in sparse if f.name in spec["history"]]
            rest = [f for f in sparse if f.name not in spec["history"]]
            model = ranking.DIN(rest, self.behaviours, targets, mlp, {"dims": [spec["attention"]]})
        self.model = model
        self.trainer = CTRTrainer(model, optimizer_params={"lr": 1e-3, "weight_decay": 0.0}, n_epoch=1)

    def batch(self, part: Answer) -> Any:
        """(inputs, labels)."""
        return _by_name(part, self.spec, history=True), part["label"]

    def loader(self, table: Answer) -> Iterable[Any]:
        """Its generator over named columns of numpy."""
        from torch_rechub.utils.data import DataGenerator
        x = {name: values.numpy() for name, values in _by_name(table, self.spec, history=True).items()}
        y = table["label"].numpy()
        return DataGenerator(x, y).generate_dataloader(x, y, x, y, batch_size=self.spec["batch"])[0]

    def train(self, loader: Meter) -> None:
        """The trainer's own epoch."""
        self.trainer.train_one_epoch(loader)

    def score(self, batch: Any) -> Any:
        """Probabilities."""
        return self.model(batch[0])


class DeepCTR:
    """DeepCTR-Torch: `fit`, whose loader of single rows is replaced by our batches; its Adam, no regularisation."""

    def __init__(self, name: str, spec: Answer) -> None:
        import requests
        requests.get = _refuse  # it asks the network for its newest version while it is imported
        from deepctr_torch import models
        from deepctr_torch.inputs import DenseFeat, SparseFeat, VarLenSparseFeat
        self.spec, rows, dim, hidden = spec, spec["num_rows"], spec["dim"], tuple(spec["hidden"])
        sparse = [SparseFeat(n, rows, embedding_dim=dim) for n in spec["ids"]]
        dense = [DenseFeat(n, 1) for n in spec["dense"]]
        both: list[Any] = [*sparse, *dense]
        plain = {"l2_reg_linear": 0, "l2_reg_embedding": 0}
        if name == "deepfm":
            model: Any = models.DeepFM(both, both, dnn_hidden_units=hidden, **plain)
        elif name == "wide_deep":
            model = models.WDL(both, both, dnn_hidden_units=hidden, **plain)
        elif name in ("dcn", "dcn_v2"):
            kind = "matrix" if name == "dcn_v2" else "vector"
            model = models.DCN(both, both, cross_num=spec["layers"], cross_parameterization=kind,
                               dnn_hidden_units=hidden, l2_reg_cross=0, **plain)
        elif name == "autoint":
            model = models.AutoInt(both, both, att_layer_num=spec["layers"], dnn_hidden_units=(), l2_reg_embedding=0)
        elif name == "fibinet":
            model = models.FiBiNET(both, both, dnn_hidden_units=hidden, **plain)
        elif name == "afm":
            model = models.AFM(both, sparse, attention_factor=spec["attention"], l2_reg_att=0, **plain)
        else:
            assert name == "din", name
            past = [VarLenSparseFeat(SparseFeat(f"hist_{n}", rows, embedding_dim=dim, embedding_name=n),
                                     spec["history_len"], length_name="length") for n in spec["history"]]
            model = models.DIN([*both, *past], spec["history"], dnn_hidden_units=hidden,
                               att_hidden_size=(spec["attention"],), l2_reg_embedding=0)  # its Dice fails after them
        model.compile("adam", "binary_crossentropy")
        self.model = model

    def batch(self, part: Answer) -> Any:
        """(one float matrix in the model's order of columns, labels)."""
        import torch
        columns = _by_name(part, self.spec, history=True)
        columns = {name.replace("past_", "hist_"): values for name, values in columns.items()}
        columns["length"] = part.get("length")
        parts = [columns[name].reshape(len(part["label"]), -1).float() for name in self.model.feature_index]
        return torch.cat(parts, 1), part["label"]

    def loader(self, table: Answer) -> Iterable[Any]:
        """The loader that its `fit` makes."""
        from torch.utils.data import DataLoader, TensorDataset
        return DataLoader(TensorDataset(*self.batch(table)), shuffle=True, batch_size=self.spec["batch"])

    def train(self, loader: Meter) -> None:
        """Its `fit` for one epoch."""
        import numpy as np
        from deepctr_torch.models import basemodel
        basemodel.DataLoader = lambda **options: loader
        self.model.fit([np.zeros((1, 1), np.float32)], np.zeros(1, np.float32), epochs=1, verbose=0)

    def score(self, batch: Any) -> Any:
        """Probabilities."""
        return self.model(batch[0])


class FuxiCTR:
    """FuxiCTR: `train_epoch` of the models of its wheel, which read a sequence of item fields beside the others.

    Without a history one id field is the item field, with a sequence of length 0.
    """

    def __init__(self, name: str, spec: Answer) -> None:
        from fuxictr.features import FeatureMap
        from model_zoo.LongCTR.DCNv2.DCNv2 import DCNv2
        from model_zoo.LongCTR.DIN.DIN import DIN
        self.spec = spec
        self.items = spec["history"] if name == "din" else spec["ids"][-1:]
        space = FeatureMap("table", "")
        for field in spec["ids"]:
            space.features[field] = {"type": "categorical", "vocab_size": spec["num_rows"], "padding_idx": 0,
                                     "source": "item" if field in self.items else "user"}
        for field in spec["dense"]:
            space.features[field] = {"type": "numeric", "source": "user"}
        space.labels, space.default_emb_dim = ["label"], spec["dim"]
        options = {"embedding_dim": spec["dim"], "optimizer": "adam", "loss": "binary_crossentropy", "verbose": 0,
                   "metrics": ["AUC"], "model_root": ""}
        if name == "dcn_v2":
            model: Any = DCNv2(space, num_cross_layers=spec["layers"], parallel_dnn_hidden_units=spec["hidden"],
                               **options)
        else:
            assert name == "din", name
            model = DIN(space, dnn_hidden_units=spec["hidden"], dnn_activations="Dice",
                        attention_hidden_units=[spec["attention"]], **options)
        model._max_gradient_norm, model._eval_steps, model._total_steps = 10.0, 1 << 60, 0  # as its `fit` sets them
        model._stop_training = False
        self.model = model

    def batch(self, part: Answer) -> Any:
        """(fields of the row, fields of the events and the item, mask)."""
        import torch
        columns = _by_name(part, self.spec, history=False)
        count = len(part["label"])
        past = part.get("history", torch.zeros(count, 0, len(self.items), dtype=torch.long))
        items = {n: torch.cat([past[:, :, i], columns.pop(n)[:, None]], 1).flatten() for i, n in enumerate(self.items)}
        return {**columns, "label": part["label"]}, items, (past[:, :, 0] > 0).float()

    def loader(self, table: Answer) -> Iterable[Any]:
        """Batches in memory: its own loaders read files of its own preparation alone."""
        return _in_memory(self, table)

    def train(self, loader: Meter) -> None:
        """The model's own epoch."""
        self.model.train_epoch(loader)

    def score(self, batch: Any) -> Any:
        """Probabilities."""
        return self.model(batch)["y_pred"]


LIBRARIES = {"torch-rechub": TorchRechub, "deepctr-torch": DeepCTR, "fuxictr": FuxiCTR}


def _in_memory(peer: Any, table: Answer) -> list[Any]:
    size = peer.spec["batch"]
    starts = range(0, len(table["label"]), size)
    return [peer.batch({name: values[first:first + size] for name, values in table.items()}) for first in starts]


def _by_name(part: Answer, spec: Answer, *, history: bool) -> dict[str, Any]:
    columns = {name: part["ids"][:, i].contiguous() for i, name in enumerate(spec["ids"])}
    columns |= {name: part["dense"][:, i].contiguous() for i, name in enumerate(spec["dense"])}
    if history and "history" in part:
        columns |= {f"past_{name}": part["history"][:, :, i].contiguous() for i, name in enumerate(spec["history"])}
    return columns


def _refuse(*place: Any, **options: Any) -> None:
    raise OSError("no network in a benchmark")


class Worker:
    """The open model and its batches."""

    def __init__(self) -> None:
        self.peer: Any = None
        self.meter = Meter([])

    def open(self, request: Answer) -> Answer:
        """Builds a model and its batches."""
        import numpy as np
        import torch
        torch.manual_seed(7)
        self.peer, self.meter = None, Meter([])  # the model before is let go first
        spec = request["spec"]
        with np.load(request["table"], allow_pickle=False) as file:
            table = {name: torch.from_numpy(file[name]) for name in file.files}
        if request["model"] != "din":
            table = {name: values for name, values in table.items() if name not in ("history", "length")}
        self.peer = LIBRARIES[request["library"]](request["model"], spec)
        self.meter = Meter(self.peer.loader(table) if request["own_loader"] else _in_memory(self.peer, table))
        return {"parameters": sum(p.numel() for p in self.peer.model.parameters())}

    def train(self, request: Answer) -> Answer:
        """Some steps of training."""
        self.peer.train(self.meter.take(request["steps"]))
        return self.meter.answer()

    def score(self, request: Answer) -> Answer:
        """Forward passes in evaluation mode."""
        import torch
        self.peer.model.eval()
        with torch.inference_mode():
            for batch in self.meter.take(request["steps"]):
                self.peer.score(batch)
        return self.meter.answer()


def main() -> None:
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the libraries print
    sys.path.remove(str(Path(__file__).parent))  # scripts here may be called what a library calls its own
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"open": worker.open, "train": worker.train, "score": worker.score}[request["do"]](request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        lines.write(json.dumps(answer) + "\n")
        lines.flush()


if __name__ == "__main__":
    main()
