"""Frozen semantic ids as a folder: everything that turns a content vector into tokens, now and for items to come.

    semantic_ids/<name>/rqvae.safetensors   rqvae.json   tokenizer.json   pieces.model   codes.parquet   report.json
                        manifest.json       sha256 of the others, and `sid_version`; written last

`sid_version` is a hash of what decides about tokens (model, its facts, tokenizer). Tokens of another version mean
something else: whoever holds tokens keeps the version beside them, and `require_version` refuses to mix. No pickle.

Shapes: N items, V numbers of a content vector, L levels.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
from pydantic import ValidationError

from raycascade import storage
from raycascade.counters import Counters
from raycascade.errors import BundleError, DataError
from raycascade.ragged import Ragged
from raycascade.schema import FIRST_ROW
from raycascade.semantic_ids.report import quality
from raycascade.semantic_ids.rqvae import RQVAE
from raycascade.semantic_ids.tokenizers import MISSING, Bigram, Pieces, Tokenizer, Unigram, train_tokenizer

FORMAT_VERSION = 1
DECISIVE = ("rqvae.safetensors", "rqvae.json", "tokenizer.json")  # the bytes of pieces.model record threads, too
LATER = 1 << 62  # after every moment of a log


@dataclass(frozen=True)
class ItemContent:
    """The catalogue as semantic ids see it: ids, content vectors (zero: no content) and the impressions of the training
    period. Items without such an impression are new: nothing is learned from them."""

    item_ids: pa.Array
    vectors_NV: np.ndarray
    impressions_N: np.ndarray

    @classmethod
    def of(cls, items: pa.Table, column: str, counters: Counters) -> "ItemContent":
        """From the encoded items table (a vector feature, position p is item row p + 2) and the counts of a fitted
        state, which hold the training split alone."""
        if column not in items.column_names or not pa.types.is_fixed_size_list(items[column].type):
            raise DataError(f"semantic ids: {column!r} is not a vector feature of the items; declare one "
                            "({kind: vector, side: item, dim: ...}) and name it in semantic_ids")
        rows = np.arange(FIRST_ROW, FIRST_ROW + len(items))
        return cls(items["item_key"].combine_chunks(), vectors_of(items, column),
                   np.rint(counters.as_of(rows, LATER, "exposure")).astype(np.int64))

    @cached_property
    def has_content_N(self) -> np.ndarray:
        """Which items have a vector other than zero."""
        return (self.vectors_NV != 0).any(axis=1)

    @cached_property
    def training_N(self) -> np.ndarray:
        """Which items the model may learn from: with content, and shown in the training period."""
        return self.has_content_N & (self.impressions_N > 0)

    def training_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Vectors and impressions of these, as `RQVAETraining` takes them."""
        return self.vectors_NV[self.training_N], self.impressions_N[self.training_N]

    def fingerprint(self) -> str:
        """16 hexadecimal digits of what is learned from; new items do not change it."""
        vectors_NV, impressions_N = self.training_rows()
        ids = self.item_ids.filter(pa.array(self.training_N)).to_pylist()
        digest = hashlib.sha256(json.dumps(ids).encode())
        for array in (vectors_NV, impressions_N):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class SemanticIds:
    """A frozen model and its tokenizer. `facts`: training period [from, until) in Unix ms, and what was learned from;
    `codes_NL` of the items in `item_ids`, -1 for those without content."""

    model: RQVAE
    tokenizer: Tokenizer
    item_ids: pa.Array
    codes_NL: np.ndarray
    facts: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    curves: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def build(
        cls, model: RQVAE, config: Tokenizer.Config, content: ItemContent, *, period_ms: tuple[int, int],
        curves: Mapping[str, Any] | None = None, threads: int = 1,
    ) -> "SemanticIds":
        """Encodes all items with a trained model, learns the tokenizer from the training period's impressions, and
        reports on items with content."""
        model.freeze()
        codes_NL, known_N = encoded(model, content.vectors_NV), content.has_content_N
        shown_N, codes = content.impressions_N, model.config.codes
        tokenizer = train_tokenizer(config, codes_NL, np.where(known_N, shown_N, 0), codes=codes, threads=threads)
        report = quality(
            content.vectors_NV[known_N], codes_NL[known_N], shown_N[known_N], codes=codes,
            errors=model.errors(content.vectors_NV[known_N]), tokens=tokenizer.tokens(codes_NL[known_N]),
            rows=tokenizer.num_rows)
        facts = {"period_ms": list(period_ms), "fingerprint": content.fingerprint()}
        return cls(model, tokenizer, content.item_ids, codes_NL, facts, report, curves or {})

    # ---- tokens
    @property
    def num_rows(self) -> int:
        """Rows of the tokens' table, padding and unknown included."""
        return self.tokenizer.num_rows

    def tokens(self, vectors_NV: np.ndarray) -> Ragged:
        """Rows (int32) of the tokens of content vectors [N, V]; none for a zero vector. DataError for vectors of
        another width, or with NaN or infinity. Known and new items go the same way."""
        return self.tokenizer.tokens(encoded(self.model, vectors_NV))

    @cached_property
    def version(self) -> str:
        """`sid_version`: 16 hexadecimal digits."""
        return _version(self._files())

    def require_version(self, expected: str, *, where: str) -> None:
        """BundleError where tokens of another version are to be used with these."""
        if self.version != expected:
            raise BundleError(f"{where}: tokens of semantic ids {expected}, but these are {self.version}; "
                              "run prepare and train again")

    # ---- files
    def _files(self) -> dict[str, bytes]:
        """What the tokens depend on, as file contents by name."""
        weights = {name: value.detach().cpu().contiguous() for name, value in self.model.state_dict().items()}
        about = {"format_version": FORMAT_VERSION, "width": self.model.width, **self.facts,
                 "config": self.model.config.model_dump(mode="json")}
        files = {"rqvae.safetensors": safetensors.torch.save(weights), "rqvae.json": _json(about),
                 "tokenizer.json": _json(self.tokenizer.facts())}
        return files | ({"pieces.model": self.tokenizer.model} if isinstance(self.tokenizer, Pieces) else {})

    def save(self, uri: str) -> str:
        """Writes the folder, its manifest last; returns the version."""
        files = self._files() | {"report.json": _json({**self.report, "curves": self.curves})}
        for name, content in files.items():
            storage.write_bytes(storage.join(uri, name), content)
        _write_codes(storage.join(uri, "codes.parquet"), self.item_ids, self.codes_NL)
        names = sorted([*files, "codes.parquet"])
        storage.write_json(storage.join(uri, "manifest.json"), {
            "format_version": FORMAT_VERSION, "sid_version": self.version,
            "files": {name: storage.sha256(storage.join(uri, name)) for name in names}})
        return self.version

    @classmethod
    def load(cls, uri: str) -> "SemanticIds":
        """The inverse of `save`, its files compared with their hashes; BundleError says which one is wrong."""
        files = _verified(uri)
        try:
            about, kind = json.loads(files["rqvae.json"]), json.loads(files["tokenizer.json"])
            report = json.loads(files["report.json"])
            model = RQVAE(RQVAE.Config.model_validate(about["config"]), about["width"])
            model.load_state_dict(safetensors.torch.load(files["rqvae.safetensors"]))
            tokenizer = _tokenizer(kind, files)
            facts = {name: about[name] for name in ("period_ms", "fingerprint")}
        except (ValueError, KeyError, TypeError, RuntimeError, ValidationError) as error:
            reason = str(error).splitlines()[0]
            raise BundleError(f"{uri}: the files do not fit one another ({type(error).__name__}: {reason}); "
                              "run `raycascade semantic-ids` again") from None
        ids, codes_NL = _read_codes(storage.join(uri, "codes.parquet"), model.config.levels)
        curves = report.pop("curves", {})
        return cls(model.freeze(), tokenizer, ids, codes_NL, facts, report, curves)


def version_of(uri: str) -> str:
    """The `sid_version` that a folder of frozen semantic ids claims; `SemanticIds.load` checks it."""
    return storage.read_json(storage.join(uri, "manifest.json"))["sid_version"]


def vectors_of(items: pa.Table, column: str) -> np.ndarray:
    """A vector feature of encoded items, float32 [N, V]."""
    vectors = items[column].combine_chunks()
    flat = vectors.flatten().to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    return flat.reshape(len(items), vectors.type.list_size)


def encoded(model: RQVAE, vectors_NV: np.ndarray) -> np.ndarray:
    """Codes [N, L] of content vectors; -1 for zero vectors, which stand for no content."""
    codes_NL = model.encode(vectors_NV)
    codes_NL[~(vectors_NV != 0).any(axis=1)] = MISSING
    return codes_NL


def _tokenizer(facts: Mapping[str, Any], files: Mapping[str, bytes]) -> Tokenizer:
    """The tokenizer of a tokenizer.json."""
    if facts["kind"] == "unigram":
        return Unigram(facts["levels"], facts["codes"])
    if facts["kind"] == "bigram":
        return Bigram(facts["levels"], facts["codes"], hashed=facts["hashed"])
    return Pieces(facts["levels"], facts["codes"], files["pieces.model"])


def _verified(uri: str) -> dict[str, bytes]:
    """All files but the codes, after every one was compared with its hash."""
    file = storage.join(uri, "manifest.json")
    if not storage.exists(file):
        raise BundleError(f"{uri}: no manifest.json, so no finished semantic ids; run `raycascade semantic-ids`")
    try:
        manifest = storage.read_json(file)
        version, hashes, expected = manifest["format_version"], manifest["files"], manifest["sid_version"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise BundleError(f"{file}: damaged; restore it or run `raycascade semantic-ids` again") from None
    if version != FORMAT_VERSION:
        raise BundleError(f"{file}: format {version}, this version reads {FORMAT_VERSION}; run `raycascade "
                          "semantic-ids` again or use the other version")
    files = {}
    for name, digest in hashes.items():
        path = storage.join(uri, name)
        if not storage.exists(path):
            raise BundleError(f"{path}: missing; restore it or run `raycascade semantic-ids` again")
        content = storage.read_bytes(path)
        if hashlib.sha256(content).hexdigest() != digest:
            raise BundleError(f"{path}: changed since it was written; restore it or run `raycascade semantic-ids` "
                              "again")
        files[name] = content
    if any(name not in files for name in DECISIVE) or _version(files) != expected:
        raise BundleError(f"{file}: does not list the files of version {expected}; run `raycascade semantic-ids` again")
    return files


def _version(files: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name in DECISIVE:
        digest.update(hashlib.sha256(files[name]).digest())
    return digest.hexdigest()[:16]


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def _write_codes(uri: str, item_ids: pa.Array, codes_NL: np.ndarray) -> None:
    """item_id, codes: a list of L numbers, null for an item without content."""
    flat = pa.array(codes_NL.reshape(-1).astype(np.int32))
    missing = pa.array(codes_NL[:, 0] == MISSING)
    codes = pa.FixedSizeListArray.from_arrays(flat, codes_NL.shape[1], mask=missing)
    filesystem, path = storage.resolve(uri)
    pq.write_table(pa.table({"item_id": item_ids, "codes": codes}), path, filesystem=filesystem, compression="zstd")


def _read_codes(uri: str, levels: int) -> tuple[pa.Array, np.ndarray]:
    filesystem, path = storage.resolve(uri)
    table = pq.read_table(path, filesystem=filesystem)
    known = table["codes"].is_valid().to_numpy()
    codes_NL = np.full((len(table), levels), MISSING, np.int64)
    flat = table["codes"].combine_chunks().drop_null().flatten().to_numpy(zero_copy_only=False)
    codes_NL[known] = flat.reshape(-1, levels)
    return table["item_id"].combine_chunks(), codes_NL
