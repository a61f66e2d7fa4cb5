"""The bundle: everything scoring and serving need, immutable, verified on load, without pickle.

    <bundles>/<id>/manifest.json   config.yaml   features/   items/   users/   stages/<name>/weights.safetensors
                   index/   metrics.json   report.html   stages/<name>/items/   semantic_ids/<name>/

A stage of trees has model.ubj and columns.json in place of its weights; where no stage searches there is no index.
Stages whose model encodes items alone have those encoded items.
Only the bundle crosses from training to scoring and serving. This file owns its format.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
import yaml

from raycascade import __version__, plugins, storage
from raycascade.batch import Batch, collate
from raycascade.cascade import Cascade, Ranking
from raycascade.config import Config, parse_config
from raycascade.errors import BundleError, DataError
from raycascade.features import FeatureState
from raycascade.indexes import ItemIndex
from raycascade.item_cache import read_item_cache, write_item_cache
from raycascade.items import ItemTable
from raycascade.keys import to_keys
from raycascade.past import moments
from raycascade.ragged import Ragged
from raycascade.schema import FIRST_ROW
from raycascade.semantic_ids.artefact import SemanticIds, version_of
from raycascade.semantic_ids.columns import require_versions, with_tokens
from raycascade.variants import warm_up, with_variants

FORMAT_VERSION = 1
WEIGHTS = "weights.safetensors"
ITEMS = "items/items.parquet"
MUTABLE = ("manifest.json", "report.html")  # written after the rest, so not under its hashes
SERVED_COLUMNS = ("request_id", "user_key", "time_ms")


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle. `cascade` is in evaluation mode; there is no index where its first stage cannot search."""

    uri: str
    manifest: Mapping[str, Any]
    config: Config
    items: ItemTable
    cascade: Cascade
    index: ItemIndex | None
    semantic_ids: Mapping[str, SemanticIds] = field(default_factory=dict)

    @property
    def state(self) -> FeatureState:
        """The fitted features."""
        return self.items.state

    @cached_property
    def version(self) -> str:
        """16 hexadecimal digits that change whenever any file does; copies of a bundle have the same."""
        return _content_version(self.manifest["files"])

    @cached_property
    def excludes_seen(self) -> bool:
        """Whether requests of the training log exclude all that their users were shown before."""
        plugin, options = plugins.options("datasets", self.config.dataset, "dataset")
        dataset = plugin(options, raw=self.config.paths.raw)
        return dataset.form == "impressions" and dataset.exclude_seen

    @cached_property
    def users(self) -> "Users":
        """The users' encoded features and histories as of the end of the training log."""
        filesystem, path = storage.resolve(storage.join(self.uri, "users/users.parquet"))
        return Users(pq.read_table(path, filesystem=filesystem).combine_chunks())

    def batch(self, requests: pa.Table) -> Batch:
        """Encoded requests -> a batch ready for `recommend`: without candidates where the first stage searches."""
        about_candidates = {"reached", "rank", "relevance", *self.state.schema.labels}
        about_candidates |= {"candidates"} if self.cascade.searches else set()
        kept = [name for name in requests.column_names if name not in about_candidates]
        return collate(requests.select(kept), self.items)

    def recommend(self, requests: pa.Table) -> Ranking:
        """Encoded requests -> what each stage kept, from the whole catalogue."""
        return self.cascade.recommend(self.batch(requests), self.index, self.items)

    def encode(self, requests: pa.Table) -> pa.Table:
        """Raw requests (canonical columns, candidates not needed) -> encoded, users completed from the users table.

        Only `user_id` is required. What a request itself brings (features, history) wins over the users table, null
        brings nothing; what it excludes adds to the users table. `time_ms` defaults to the end of the training log, or
        to right behind the newest event that a request brings, if that is later.
        """
        count = len(requests)
        if "user_id" not in requests.column_names:
            raise DataError("requests: column 'user_id' is missing; give the user of each request")
        defaults = {"request_id": pa.array([str(i) for i in range(count)]),
                    "time_ms": pa.array(moments(requests, self.state.as_of_ms))}
        for name, column in defaults.items():
            if name not in requests.column_names:
                requests = requests.append_column(name, column)
        encoded = self.state.encode_requests(requests, where="requests", strict=False)
        known = self.users.rows(requests["user_id"])
        for name in self.users.table.column_names:
            if name in SERVED_COLUMNS:
                continue
            stands_in = (known >= 0) & ~_brought(requests, name)
            stored = self.users.table[name].combine_chunks().take(pa.array(known, mask=~stands_in))
            if name not in encoded.column_names:
                encoded = encoded.append_column(name, stored)
                continue
            filler = encoded[name].combine_chunks()
            both = _joined(stored, filler) if name == "exclude" else _coalesce(stored, filler, stands_in)
            encoded = encoded.set_column(encoded.column_names.index(name), name, both)
        return encoded

    def encode_items(self, items: pa.Table) -> pa.Table:
        """Raw items, as the data set has them, -> encoded, tokens of semantic ids included; nothing is trained.

        New items get the rows that they would have had in the catalogue (`ItemTable.with_items` puts them behind it).
        DataError for a column that is missing, and for a content vector of another width, or with NaN or infinity.
        """
        return with_tokens(self.state.encode_items(items, where="items"), self.state, self.semantic_ids)


def _brought(requests: pa.Table, name: str) -> np.ndarray:
    """Which requests bring an encoded column themselves: bool [Q]."""
    columns = set(requests.column_names)
    raw = "history" if name.startswith("history") else name if name in columns else name.removesuffix("_missing")
    if raw not in columns or name == "exclude":
        return np.zeros(len(requests), bool)
    return requests[raw].is_valid().to_numpy()


def _coalesce(stored: pa.Array, filler: pa.Array, stands_in: np.ndarray) -> pa.Array:
    """Rows of `stored` where it stands in, of `filler` elsewhere (lists and numbers alike)."""
    joined = pa.concat_arrays([stored.cast(filler.type) if stored.type != filler.type else stored, filler])
    count = len(stands_in)
    return joined.take(pa.array(np.where(stands_in, np.arange(count), count + np.arange(count))))


def _joined(first: pa.Array, second: pa.Array) -> pa.Array:
    """Lists with the values of both."""
    parts = [Ragged.from_arrow(first), Ragged.from_arrow(second)]
    owner = np.concatenate([np.repeat(np.arange(len(first)), part.lengths_Q) for part in parts])
    values = pa.concat_arrays([part.values.cast(pa.int32()) for part in parts]).take(np.argsort(owner, kind="stable"))
    return Ragged(values, parts[0].lengths_Q + parts[1].lengths_Q).to_arrow()


@dataclass(frozen=True)
class Users:
    """Encoded users with a look-up by raw id."""

    table: pa.Table

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        keys = to_keys(self.table["user_key"])
        order = np.argsort(keys, kind="stable")
        return keys[order], order

    def rows(self, user_ids: "pa.Array | pa.ChunkedArray") -> np.ndarray:
        """Row of each user in the table, -1 for a user that is not known. Ids are compared as the table's type; null,
        and what is not of that type, is nobody."""
        keys, order = self._sorted
        same_type = _cast_where_possible(user_ids, self.table["user_key"].type)
        wanted = to_keys(same_type)
        if len(keys) == 0:
            return np.full(len(wanted), -1)
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where((keys[at] == wanted) & same_type.is_valid().to_numpy(zero_copy_only=False), order[at], -1)


def _cast_where_possible(values: "pa.Array | pa.ChunkedArray", kind: pa.DataType) -> pa.Array:
    """The values as another type, null where that cannot be."""
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    try:
        return values.cast(kind)
    except pa.ArrowInvalid:
        if len(values) == 1:
            return pa.nulls(1, kind)
    half = len(values) // 2
    return pa.concat_arrays([_cast_where_possible(part, kind) for part in (values[:half], values[half:])])


def build_index(config: Config, cascade: Cascade, items: ItemTable) -> ItemIndex:
    """The config's index over the catalogue's item vectors."""
    plugin, options = plugins.options("indexes", config.index, "index")
    index = plugin(options)
    chunks = list(cascade.embed_catalogue(items))
    index.build(np.concatenate([rows for rows, _ in chunks]), np.concatenate([vectors for _, vectors in chunks]))
    return index


def save_bundle(
    uri: str, *, config: Config, cascade: Cascade, items: ItemTable, encoded_items: pa.Table, users: pa.Table,
    metrics: Mapping[str, Any], semantic_ids: Mapping[str, str] | None = None, index: ItemIndex | None = None,
) -> str:
    """Writes a whole bundle; the manifest comes last, so that an unfinished one cannot be loaded. `semantic_ids`:
    folders of those whose tokens the items have, by name; `index`: the one over the items' vectors, if it is built
    already. Weights are written as they were trained, in float32, whatever they are served in."""
    if storage.exists(storage.join(uri, "manifest.json")):
        raise BundleError(f"{uri}: there is a bundle already; bundles are immutable: choose another train.run")
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    storage.write_bytes(storage.join(uri, "config.yaml"), text.encode())
    items.state.save(storage.join(uri, "features"))
    _write_parquet(storage.join(uri, ITEMS), encoded_items)
    _write_parquet(storage.join(uri, "users/users.parquet"), users)
    for name, folder in (semantic_ids or {}).items():
        for file in storage.list_files(folder):
            storage.copy_file(storage.join(folder, file), storage.join(uri, "semantic_ids", name, file))
    for name in cascade.names:
        for file, content in _stage_files(cascade, name).items():
            storage.write_bytes(storage.join(uri, "stages", name, file), content)
    if cascade.eval().searches:
        (index or build_index(config, cascade, items)).save(storage.join(uri, "index"))
    write_item_caches(uri, cascade, items)
    storage.write_json(storage.join(uri, "metrics.json"), metrics)
    write_manifest(uri, fingerprint=items.state.schema.fingerprint())
    return uri


def write_item_caches(uri: str, cascade: Cascade, items: ItemTable) -> None:
    """Writes what the stages' models encode of every item, where that follows from the item alone. Everything else that
    it follows from must be in the bundle already. The cascade must be in evaluation mode."""
    for name in cascade.names:
        precision = cascade.stages[name].item_cache
        if precision is None or not cascade.caches_items(name, items):
            continue
        files = {file: storage.sha256(storage.join(uri, file)) for file in storage.list_files(uri)
                 if _shapes_items(file, name)}
        write_item_cache(item_cache_folder(uri, name), cascade.encode_items(name, items), made_of=files,
                         num_rows=items.num_items + FIRST_ROW, precision=precision)


def item_cache_folder(uri: str, name: str) -> str:
    """Where a stage's encoded items are."""
    return storage.join(uri, "stages", name, "items")


def _shapes_items(file: str, name: str) -> bool:
    """Whether what a stage's model encodes of items follows from a file of the bundle."""
    return file in ("config.yaml", ITEMS, f"stages/{name}/{WEIGHTS}") or file.startswith("features/")


def _load_item_caches(uri: str, cascade: Cascade, files: Mapping[str, str]) -> None:
    for name in cascade.names:
        if any(file.startswith(f"stages/{name}/items/") for file in files):
            made_of = {file: digest for file, digest in files.items() if _shapes_items(file, name)}
            cascade.item_caches[name] = read_item_cache(item_cache_folder(uri, name), made_of=made_of)


def _stage_files(cascade: Cascade, name: str) -> dict[str, bytes]:
    """What a stage has learned, as file contents by name."""
    if name in cascade.fitted:
        return cascade.fitted[name].to_files()
    weights = {key: value.detach().cpu().contiguous() for key, value in cascade.stage_state(name).items()}
    return {WEIGHTS: safetensors.torch.save(weights)}


def _load_stage(uri: str, cascade: Cascade, name: str, files: Iterable[str]) -> None:
    """The inverse of `_stage_files`; BundleError where a stage does not fit the config."""
    folder = storage.join("stages", name) + "/"
    try:
        if name in cascade.fitted:
            own = [file for file in files if file.startswith(folder)]
            cascade.fitted[name].from_files({f.removeprefix(folder): storage.read_bytes(storage.join(uri, f))
                                             for f in own})
            return
        folder += WEIGHTS
        cascade.load_stage_state(name, safetensors.torch.load(storage.read_bytes(storage.join(uri, folder))))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise BundleError(f"{uri}/{folder.rstrip('/')}: they do not fit the config ({reason}); train again") from None


def write_manifest(uri: str, *, fingerprint: str) -> None:
    """Hashes every file of the bundle and publishes the manifest."""
    names = [name for name in storage.list_files(uri) if name not in MUTABLE]
    frozen = [name.split("/")[1] for name in names if re.fullmatch(r"semantic_ids/[^/]+/manifest\.json", name)]
    storage.write_json(storage.join(uri, "manifest.json"), {
        "format_version": FORMAT_VERSION, "fingerprint": fingerprint,
        "versions": {"raycascade": __version__, "torch": torch.__version__},
        "semantic_ids": {name: version_of(storage.join(uri, "semantic_ids", name)) for name in frozen},
        "files": {name: storage.sha256(storage.join(uri, name)) for name in names},
    })


def add_to_manifest(uri: str, names: Iterable[str]) -> None:
    """Notes more files of a bundle that was finished just now, before anyone was told of it."""
    file = storage.join(uri, "manifest.json")
    manifest = storage.read_json(file)
    manifest["files"] |= {name: storage.sha256(storage.join(uri, name)) for name in names}
    storage.write_json(file, manifest)


def stated_version(uri: str) -> str:
    """The version (`Bundle.version`) of a finished bundle by its manifest alone; its files are not looked at."""
    require_finished(uri)
    try:
        return _content_version(storage.read_json(storage.join(uri, "manifest.json"))["files"])
    except (json.JSONDecodeError, KeyError, TypeError):
        raise BundleError(f"{uri}/manifest.json: damaged; restore the bundle or train again") from None


def _content_version(files: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]


def remember_latest(bundles: str, uri: str) -> None:
    """Notes the newest bundle of a folder, so that a config can stand for it on the command line."""
    storage.write_json(storage.join(bundles, "latest.json"), {"bundle": uri})


def latest(config: Config) -> str:
    """The newest bundle that was trained into the config's `paths.bundles`; BundleError if there is none."""
    note = storage.join(config.paths.bundles, "latest.json")
    if not storage.exists(note):
        raise BundleError(f"{config.paths.bundles}: no bundle was trained into this folder; "
                          "run `raycascade train` first")
    return storage.read_json(note)["bundle"]


def require_finished(uri: str) -> None:
    """BundleError unless a bundle was finished there."""
    if not storage.exists(storage.join(uri, "manifest.json")):
        raise BundleError(f"{uri}: no manifest.json, so no finished bundle; "
                          "give the URI that `raycascade train` printed")


def verify(uri: str) -> dict[str, Any]:
    """The manifest, after every file was compared with its hash; BundleError says which file is wrong."""
    require_finished(uri)
    file = storage.join(uri, "manifest.json")
    try:
        manifest = storage.read_json(file)
        version, files = manifest["format_version"], manifest["files"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise BundleError(f"{file}: damaged; restore the bundle or train again") from None
    if version != FORMAT_VERSION:
        raise BundleError(f"{file}: format {version}, this version reads {FORMAT_VERSION}; "
                          "train again or use the other version")
    for name, expected in files.items():
        path = storage.join(uri, name)
        if not storage.exists(path):
            raise BundleError(f"{path}: missing; restore the bundle or train again")
        if (seen := storage.sha256(path)) != expected:
            raise BundleError(f"{path}: changed since it was written (sha256 {seen[:12]}, expected {expected[:12]}); "
                              "restore the bundle or train again")
    return manifest


def load_bundle(uri: str, *, device: str = "cpu", served: Collection[str] | None = None) -> Bundle:
    """A verified bundle, its cascade in evaluation mode. The stages `served` (None: all) are what their config serves
    them as, and compiled ones have run; the others are as they were trained."""
    uri = storage.absolute(uri)
    manifest = verify(uri)
    tree = yaml.safe_load(storage.read_bytes(storage.join(uri, "config.yaml")))
    config = parse_config(tree, where=f"{uri}/config.yaml")
    state = FeatureState.load(storage.join(uri, "features"))
    if state.schema.fingerprint() != manifest["fingerprint"]:
        raise BundleError(f"{uri}/features/schema.json: schema {state.schema.fingerprint()}, but the bundle was made "
                          f"for {manifest['fingerprint']}; train again")
    filesystem, path = storage.resolve(storage.join(uri, ITEMS))
    encoded = pq.read_table(path, filesystem=filesystem)
    frozen = {name: SemanticIds.load(storage.join(uri, "semantic_ids", name))
              for name in manifest.get("semantic_ids", {})}
    require_versions(encoded, state, frozen, where=f"{uri}/{ITEMS}")
    items = ItemTable.from_encoded(encoded, state)
    cascade = Cascade(config, state.space)
    for name in cascade.names:
        _load_stage(uri, cascade, name, manifest["files"])
    _load_item_caches(uri, cascade, manifest["files"])
    index = None
    if cascade.searches:
        plugin, options = plugins.options("indexes", config.index, "index")
        index = plugin(options)
        index.load(storage.join(uri, "index"))
    cascade = with_variants(cascade.to(device).eval(), history_len=state.space.history_len, names=served)
    bundle = Bundle(uri, manifest, config, items, cascade, index, frozen)
    if any(stage.compile for stage in config.stages) and len(bundle.users.table):
        warm_up(cascade, bundle.batch(bundle.users.table.slice(0, 2)), items, names=served)
    return bundle


def _write_parquet(uri: str, table: pa.Table) -> None:
    filesystem, path = storage.resolve(uri)
    storage.make_folder(uri.rsplit("/", 1)[0])
    pq.write_table(table, path, filesystem=filesystem, compression="zstd")
