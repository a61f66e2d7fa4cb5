"""Thousands of requests that nobody would send: whether the interface ever answers other than its document promises.

    PYTHONPATH=platform:. python benchmarks/api_fuzz.py --cases 2000 --seed 1

Three kinds: cases that schemathesis makes of the OpenAPI document, valid and invalid (answers must have a documented
status, media type, headers and schema, and invalid data a 4xx); requests close to what the bundle knows (answered by
the whole cascade, or refused with a problem); arbitrary paths, headers and bytes. The bundle is that of the tests, in
this process; `--url` asks a running server in its place, with the first kind alone. Exit status 1: a broken promise.
"""

import logging
import sys
import tempfile
import time
import traceback
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any


def kinds(url: str, key: str, folder: str) -> dict[str, Callable[[int, int], Counter[tuple[str, int]]]]:
    """What takes a number of cases and a seed, by name. Each has a gateway of its own: it belongs to one event loop."""
    from raycascade.bundle import load_bundle
    from raycascade.serving.options import ServeOptions
    from tests.api_client import api_over, gateway_over
    from tests.api_fuzzing import fuzz_bytes, fuzz_depth, fuzz_document
    from tests.tiny_world import write_bundle

    if url:
        return {"document": lambda cases, seed: fuzz_document(url, examples=cases, seed_=seed, key=key)}
    bundle = load_bundle(write_bundle(f"{folder}/tiny"))

    def api() -> Any:
        options = ServeOptions(deadline_ms=60_000)
        return api_over(gateway_over(bundle, options), options)

    return {"document": lambda cases, seed: fuzz_document(api(), examples=cases, seed_=seed),
            "depth": lambda cases, seed: fuzz_depth(api(), examples=5 * cases, seed_=seed),
            "bytes": lambda cases, seed: fuzz_bytes(api(), examples=5 * cases, seed_=seed)}


def main() -> int:
    parser = ArgumentParser(description="Fuzz the HTTP interface.")
    parser.add_argument("--cases", type=int, default=300, help="for every operation and mode; the others five times")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--url", default="", help="a running server, such as http://127.0.0.1:8000")
    parser.add_argument("--key", default="", help="an API key of that server")
    given = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the strategies stand beside the tests
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        kept = [keeps_its_promise(name, fuzz, given.cases, given.seed)
                for name, fuzz in kinds(given.url, given.key, folder).items()]
    return 0 if all(kept) else 1


def keeps_its_promise(name: str, fuzz: Callable[[int, int], Counter[tuple[str, int]]], cases: int, seed: int) -> bool:
    started = time.monotonic()
    try:
        seen = fuzz(cases, seed)
    except (Exception, BaseExceptionGroup) as error:
        what = "".join(traceback.format_exception_only(error)) + "\n".join(getattr(error, "__notes__", ()))
        sys.stdout.write(f"{name}: BROKEN after {time.monotonic() - started:.0f} s\n{what}\n")
        return False
    sys.stdout.write(f"{name}: {sum(seen.values())} requests in {time.monotonic() - started:.0f} s, all as promised\n")
    for (place, status), count in sorted(seen.items()):
        sys.stdout.write(f"    {place:32} {status} {count:7}\n")
    return True


if __name__ == "__main__":
    sys.exit(main())
