"""Every model as the last of three stages through the real verbs, one after the other, as a table.

    PYTHONPATH=platform:. python -m tests.every_model [CASCADE ...]

A cascade is named by its last stage, such as din or mmoe-two-tasks; the default is all of them.

Trained by Ray Train, scored in batch by Ray Data, served by Ray Serve with a deployment for each stage and asked over
HTTP. `batch` and `HTTP` are the greatest differences to the scores of the loaded bundle in this process, `spread` those
within an answer; items that are not the same in the same order end the run. Some twenty seconds a cascade on two cores
that have nothing else to do; `tests/serve/test_every_model.py` is the short way.
"""

import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow.parquet as pq

from tests import conftest, three_stages as three
from tests.served import patient

assert conftest.ROOT  # its import has set the environment of Ray

TOLERANCE = 1e-5
HEAD = f"{'last stage':24}{'train s':>9}{'score s':>9}{'serve s':>9}{'spread':>9}{'batch':>10}{'HTTP':>10}"


def run(folder: Path, wanted: list[str]) -> None:
    """Prints a line as each cascade ends; AssertionError where the ways differ."""
    from raycascade.flows import serving

    shards = three.world(folder)
    print(HEAD, flush=True)
    before, port = "", 0
    for model, tasks in three.CASES:
        name = three.case_name(model, tasks=tasks)
        if wanted and name not in wanted:
            continue
        line, url = one(folder, shards, model, tasks=tasks, port=port)
        port = urlsplit(url).port or 0
        if before:
            serving.stop(before)
        before = name
        print(line, flush=True)
    if before:
        serving.stop(before)


def one(folder: Path, shards: str, model: str, *, tasks: bool, port: int) -> tuple[str, str]:
    """The line of a cascade, and the URL where it is served."""
    from raycascade.bundle import load_bundle
    from raycascade.flows import serving
    from raycascade.flows.score import score
    from raycascade.flows.train import train

    name, times = three.case_name(model, tasks=tasks), [time.monotonic()]
    uri = train(three.config_of(shards, model, tasks=tasks))["bundle"]
    times.append(time.monotonic())
    bundle = load_bundle(uri)
    asked = three.queries(bundle)
    requests, out = folder / f"{name}.parquet", folder / f"out-{name}"
    expected = three.answers_of(bundle, three.requests_of(asked))
    pq.write_table(three.requests_of(asked), requests)
    score(uri, requests=str(requests), out=str(out))
    times.append(time.monotonic())
    url = serving.start(uri, patient(port=port), name=name, route_prefix=f"/{name}")
    found = [three.read_answers(out), three.served_over_http(url, asked)]
    times.append(time.monotonic())
    differences = [three.greatest_difference(answers, expected) for answers in found]
    assert max(differences) <= TOLERANCE, (name, differences)
    spread = max(scores[0] - scores[-1] for _, scores in expected)
    seconds = "".join(f"{after - before:9.1f}" for before, after in pairwise(times))
    return f"{name:24}{seconds}{spread:9.3f}{''.join(f'{value:10.1e}' for value in differences)}", url


if __name__ == "__main__":
    from raycascade.flows._cluster import connect

    connect()
    with tempfile.TemporaryDirectory() as place:
        run(Path(place), sys.argv[1:])
