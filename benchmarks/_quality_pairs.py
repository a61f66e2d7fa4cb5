"""Which model of ours is compared with which of a peer, on which inputs, and the sizes that both have."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

SIZES: dict[str, Any] = {"dim": 16, "hidden": [64, 32], "batch": 256, "epochs": 5, "attention": 16, "layers": 2,
                         "experts": 4, "expert_hidden": [32], "tower_hidden": [16], "vector": 32, "heads": 2,
                         "embedding_std": 0.01}
EMBEDDED = {"dim": SIZES["dim"], "embedding_std": SIZES["embedding_std"]}
MLP = {**EMBEDDED, "hidden": SIZES["hidden"], "norm": "batch"}
EXPERTS = {**EMBEDDED, "norm": "batch", "hidden": SIZES["expert_hidden"], "tower_hidden": SIZES["tower_hidden"]}
LAYERS = {"num_layers": SIZES["layers"]}
DEEP_INTEREST = {**MLP, "activation": "dice", "attention_hidden": [36], "attention_activation": "dice"}
TASKS = ("shared_bottom", "mmoe", "ple")

OURS: dict[str, dict[str, Any]] = {
    "lr": {"name": "lr"},
    "wide_deep": {"name": "wide_deep", **MLP},
    "deepfm": {"name": "deepfm", **MLP},
    "dcn": {"name": "dcn", **MLP, **LAYERS},
    "dcn_v2": {"name": "dcn_v2", **MLP, **LAYERS},
    "edcn": {"name": "edcn", **EMBEDDED, **LAYERS, "gate_scale": "fields"},
    "afm": {"name": "afm", **EMBEDDED, "attention_dim": SIZES["attention"]},
    "fibinet": {"name": "fibinet", **MLP, "bilinear": "each"},
    "autoint": {"name": "autoint", **EMBEDDED, **LAYERS, "heads": SIZES["heads"],
                "head_dim": SIZES["dim"] // SIZES["heads"]},
    "autoint_plus": {"name": "autoint", **MLP, **LAYERS, "heads": SIZES["heads"], "dense_std": None,
                     "head_dim": SIZES["dim"] // SIZES["heads"]},
    "din": {"name": "din", **DEEP_INTEREST},
    "dien": {"name": "dien", **MLP, "activation": "dice"},
    "din_fields": {"name": "din", **DEEP_INTEREST, "dense": "field", "dense_std": 0.25},
    "dien_alone": {"name": "dien", **MLP, "activation": "dice", "alpha": 0.0},
    "fm": {"name": "deepfm", **EMBEDDED, "hidden": []},
    "bst": {"name": "bst", **MLP, "heads": SIZES["heads"]},
    "shared_bottom": {"name": "shared_bottom", **EXPERTS},
    "mmoe": {"name": "mmoe", **EXPERTS, "experts": SIZES["experts"]},
    "ple": {"name": "ple", **EXPERTS, "levels": 1, "own_experts": 2, "shared_experts": 1},
    "two_tower": {"name": "two_tower", **MLP, "vector_dim": SIZES["vector"]},
    "mlp": {"name": "mlp", **MLP},
    "dlrm": {"name": "dlrm", **MLP, "bottom_hidden": [32]},
    "deepffm": {"name": "deepffm", **MLP, "dim": 4},
    "fat_deepffm": {"name": "fat_deepffm", **MLP, "dim": 4},
    "gbdt": {"name": "gbdt"},
}


@dataclass(frozen=True)
class Inputs:
    """Which columns of the table a run sees."""

    dense: bool = True
    history: bool = False
    towers: bool = False  # without counts of the item or its author, which stand on the side of the context

    def sees(self, described: dict[str, Any]) -> bool:
        """Whether a field of `describe` is one of them."""
        if described["kind"] == "history":
            return self.history
        if described["kind"] == "dense" and not self.dense:
            return False
        return not (self.towers and described["name"].startswith(("item_", "author_"))
                    and described["kind"] == "dense")

    def excluded(self, fields: Sequence[dict[str, Any]]) -> list[str]:
        """What our stage has to exclude."""
        hidden = [f["name"] for f in fields if f["kind"] != "history" and not self.sees(f)]
        return hidden if self.history else [*hidden, "history"]


INPUTS = {"ids": Inputs(dense=False), "all": Inputs(), "ids+history": Inputs(dense=False, history=True),
          "all+history": Inputs(history=True), "towers": Inputs(towers=True)}


@dataclass(frozen=True)
class Pair:
    """One row of the comparison; `note` says what the peer cannot take or does otherwise."""

    peer: str
    model: str
    inputs: str
    note: str = field(default="", compare=False)


RECHUB, DEEPCTR, FUXI = "torch-rechub", "DeepCTR-Torch", "FuxiCTR"
PAIRS = (
    Pair(RECHUB, "wide_deep", "all"),
    Pair(RECHUB, "deepfm", "all"),
    Pair(RECHUB, "dcn", "all"),
    Pair(RECHUB, "dcn_v2", "all"),
    Pair(RECHUB, "edcn", "all"),
    Pair(RECHUB, "fm", "ids", "takes no numbers; called AFM there, but its attention is the constant 1"),
    Pair(RECHUB, "fibinet", "ids", "takes no numbers"),
    Pair(RECHUB, "autoint", "all"),
    Pair(RECHUB, "autoint_plus", "all"),
    Pair(RECHUB, "din", "ids+history", "takes no numbers"),
    Pair(RECHUB, "dien", "all+history"),
    Pair(RECHUB, "bst", "all+history"),
    Pair(RECHUB, "shared_bottom", "all"),
    Pair(RECHUB, "mmoe", "all"),
    Pair(RECHUB, "ple", "all"),
    Pair(RECHUB, "two_tower", "towers"),
    Pair(DEEPCTR, "lr", "all"),
    Pair(DEEPCTR, "wide_deep", "all"),
    Pair(DEEPCTR, "deepfm", "all"),
    Pair(DEEPCTR, "dcn", "all"),
    Pair(DEEPCTR, "dcn_v2", "all"),
    Pair(DEEPCTR, "afm", "all", "numbers in the linear part only"),
    Pair(DEEPCTR, "fibinet", "all", "numbers past the pairs"),
    Pair(DEEPCTR, "autoint", "all", "numbers in the linear part only"),
    Pair(DEEPCTR, "autoint_plus", "all", "numbers past the attention"),
    Pair(DEEPCTR, "din", "all+history"),
    Pair(DEEPCTR, "dien", "all+history"),
    Pair(DEEPCTR, "shared_bottom", "all"),
    Pair(DEEPCTR, "mmoe", "all"),
    Pair(DEEPCTR, "ple", "all"),
    Pair(FUXI, "lr", "all"),
    Pair(FUXI, "dcn_v2", "all+history"),
    Pair(FUXI, "din_fields", "all+history", "numbers as vectors, on both sides"),
    Pair(FUXI, "dien_alone", "all+history", "no auxiliary loss, on both sides"),
)
ALONE = ("mlp", "dlrm", "deepffm", "fat_deepffm", "gbdt")  # no peer has them; on the inputs "all"
