"""index: the item vectors, the index and the encoded items of a bundle, built again into a new bundle."""

import hashlib
import json
import time
from typing import Any

from raycascade import __version__, selfcheck, storage
from raycascade.bundle import build_index, load_bundle, write_item_caches, write_manifest

MARK = "-index-"


def index(uri: str) -> dict[str, Any]:
    """Returns {"bundle", "items", "seconds"}. Bundles are immutable: the new one stands beside the old one.

    Its id is `<id>-index-<hash>`, where the hash follows from the old bundle's content and this version; a bundle of
    that id is the result already. Reports and evaluations of the old bundle are not copied.
    """
    started = time.monotonic()
    bundle = load_bundle(uri, served=())
    bundle.cascade.require_search()
    parent, _, name = bundle.uri.rstrip("/").rpartition("/")
    files: dict[str, str] = bundle.manifest["files"]
    content = json.dumps([files, bundle.config.index, __version__], sort_keys=True).encode()
    target = storage.join(parent, f"{name.partition(MARK)[0]}{MARK}{hashlib.sha256(content).hexdigest()[:8]}")
    if not storage.exists(storage.join(target, "manifest.json")):
        storage.remove_folder(target)  # of a run that did not finish
        built = ("index/", f"{selfcheck.FOLDER}/", *(f"stages/{stage}/items/" for stage in bundle.cascade.names))
        for file in files:
            if not file.startswith(built):
                storage.copy_file(storage.join(bundle.uri, file), storage.join(target, file))
        build_index(bundle.config, bundle.cascade, bundle.items).save(storage.join(target, "index"))
        write_item_caches(target, bundle.cascade, bundle.items)
        write_manifest(target, fingerprint=bundle.manifest["fingerprint"])
        selfcheck.record(target)
    return {"bundle": target, "items": bundle.items.num_items, "seconds": round(time.monotonic() - started, 2)}
