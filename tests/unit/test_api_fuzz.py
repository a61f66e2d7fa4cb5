"""Whatever is sent, the interface answers what its document promises: a few hundred cases here, thousands in
benchmarks/api_fuzz.py."""

from pathlib import Path
from typing import Any

import pytest

from raycascade.bundle import load_bundle
from raycascade.serving.keys import add_key
from raycascade.serving.options import ServeOptions
from tests.api_client import ToldGateway, api_over, gateway_over
from tests.api_fuzzing import fuzz_bytes, fuzz_depth, fuzz_document


@pytest.fixture
def api(tiny_bundle: str) -> Any:
    """A new one for each test: a gateway belongs to one event loop."""
    return api_over(gateway_over(load_bundle(tiny_bundle), options := ServeOptions(deadline_ms=60_000)), options)


def test_every_answer_is_as_the_document_says(api: Any):
    seen = fuzz_document(api, examples=7, seed_=1)
    assert sum(seen.values()) > 70
    assert {status for _, status in seen} <= {200, 404, 422}
    assert {label for label, status in seen if status == 200} >= {
        "POST /v1/recommend", "POST /v1/recommend:batch", "POST /v1/events", "GET /v1/model", "GET /readyz"}


def test_without_its_key_no_endpoint_of_the_document_answers(tmp_path: Path):
    path = str(tmp_path / "keys.json")
    key = add_key(path, "fuzz")
    options = ServeOptions.model_validate({"keys": {"file": path}})
    seen = fuzz_document(api_over(ToldGateway(), options), examples=5, seed_=2, key=key)
    assert sum(seen.values()) > 30
    assert 401 not in {status for _, status in seen}


def test_requests_close_to_what_the_bundle_knows_are_answered_whole_or_refused(api: Any):
    seen = fuzz_depth(api, examples=160, seed_=3)
    assert seen["/v1/recommend", 200] > 10
    assert {path for path, status in seen if status == 422} >= {"/v1/recommend", "/v1/events", "/v1/explain"}


def test_arbitrary_bytes_and_headers_never_break_the_server(api: Any):
    seen = fuzz_bytes(api, examples=200, seed_=4)
    assert len(seen) > 15
