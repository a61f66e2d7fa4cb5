"""What may stand for an item: a hashed id, its content vector, tokens of a semantic id, or both; at equal tables."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from raycascade.features import FeatureState
from raycascade.keys import fold, to_keys
from raycascade.ragged import Ragged
from raycascade.schema import FIRST_ROW, IdsFeature
from raycascade.semantic_ids.artefact import ItemContent, SemanticIds
from raycascade.semantic_ids.rqvae import RQVAE
from raycascade.semantic_ids.tokenizers import Tokenizer
from raycascade.semantic_ids.training import RQVAETraining

FIELD = "sid"
LEVELS, FINE, COARSE = 4, 256, 64  # codes of a level: unigram's table is then as large as all others
ROWS = FIRST_ROW + LEVELS * FINE
ARMS = {
    "hash": f"the id, hashed into {ROWS - FIRST_ROW:,} rows",
    "content": "the content vector through a linear map, no table",
    "unigram": f"a row for each of {LEVELS} x {FINE} codes",
    "bigram": f"two pairs of {LEVELS} x {COARSE} codes, hashed",
    "pieces": f"pieces of {LEVELS} x {COARSE} codes",
    "add": "half of the rows for a hash of the id, half for pieces, added up",
    "none": "nothing",
    "hash x10": "the id, hashed into ten times the rows (a larger table)",
}


@dataclass(frozen=True)
class Tokens:
    """Rows of a table for every item."""

    rows: int
    values: Ragged

    def appended(self, state: FeatureState, items: pa.Table) -> tuple[FeatureState, pa.Table]:
        """The state and the encoded items with the field."""
        most = int(self.values.lengths_Q.max(initial=1))
        feature = IdsFeature(name=FIELD, side="item", max_len=most, pool="sum", given=True)
        return state.with_given(feature, self.rows), items.append_column(FIELD, self.values.to_arrow())


@dataclass
class TokenMaker:
    """Tokens of every arm for one table and seed; a model of one number of codes is trained once."""

    content: ItemContent
    end_ms: int
    seed: int
    steps: int
    models: dict[int, RQVAE] = field(default_factory=dict)
    reports: dict[str, Mapping[str, object]] = field(default_factory=dict)

    def of(self, arm: str) -> Tokens | None:
        """None where the arm has no table."""
        if arm in ("content", "none"):
            return None
        if arm.startswith("hash"):
            return self.hashed(FIRST_ROW + (ROWS - FIRST_ROW) * (10 if arm == "hash x10" else 1))
        if arm != "add":
            return self.semantic(arm, ROWS)
        pieces, ids = self.semantic("pieces", ROWS // 2), self.hashed(ROWS - ROWS // 2 + FIRST_ROW)
        offset = pieces.rows - FIRST_ROW
        owner = np.concatenate([np.repeat(np.arange(len(part.values.lengths_Q)), part.values.lengths_Q)
                                for part in (pieces, ids)])
        rows = np.concatenate([pieces.values.values.to_numpy(), ids.values.values.to_numpy() + np.int32(offset)])
        values = pa.array(rows[np.argsort(owner, kind="stable")].astype(np.int32))
        return Tokens(offset + ids.rows, Ragged(values, pieces.values.lengths_Q + ids.values.lengths_Q))

    def hashed(self, rows: int) -> Tokens:
        """One row per item, the same in every run of a seed."""
        keys = fold([to_keys(self.content.item_ids)], seed=self.seed) % np.uint64(rows - FIRST_ROW)
        values = pa.array((keys.astype(np.int64) + FIRST_ROW).astype(np.int32))
        return Tokens(rows, Ragged(values, np.ones(len(values), np.int64)))

    def semantic(self, kind: str, rows: int) -> Tokens:
        """Tokens of a tokenizer; what the model learns from was shown in training."""
        codes = FINE if kind == "unigram" else COARSE
        if codes not in self.models:
            config = RQVAE.Config(levels=LEVELS, codes=codes, hidden=(128,), dim=16, steps=self.steps, batch=1024,
                                  seed=self.seed)
            self.models[codes] = RQVAETraining(config, *self.content.training_rows()).run()
        config = Tokenizer.Config.model_validate(
            {"kind": kind, "seed": self.seed, **({} if kind == "unigram" else {"rows": rows})})
        ids = SemanticIds.build(self.models[codes], config, self.content, period_ms=(0, self.end_ms))
        self.reports[kind] = ids.report
        return Tokens(ids.num_rows, ids.tokens(self.content.vectors_NV))
