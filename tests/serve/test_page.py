"""The page in a real browser, over a gateway with stages in this process: it shows what the API says, and nothing else.

What no hand-made bundle can show (errors, degraded answers, ids that are markup) is in test_page_elsewhere.py.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

pytest.importorskip("selenium", reason="needs selenium (pip install -e '.[dev]')")

from selenium.webdriver.common.keys import Keys

from raycascade.bundle import load_bundle
from raycascade.serving.api import build_api
from raycascade.serving.gateway import Gateway
from raycascade.serving.stages import LocalStage, StageServer
from tests.page_accessibility import landmarks, violations
from tests.page_server import served
from tests.page_visitor import Visitor
from tests.tiny_world import KEEPS, NUM_ITEMS, item_id

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # selenium leaves a socket to the garbage collector
USER = "107"


@pytest.fixture(scope="module")
def url(tiny_bundle: str) -> Iterator[str]:
    bundle = load_bundle(tiny_bundle)
    stages = {name: LocalStage(StageServer(bundle, name)) for name in bundle.cascade.names}
    with served(build_api(Gateway(bundle, stages))) as address:
        yield address


@pytest.fixture
def page(visitor: Visitor, url: str) -> Visitor:
    visitor.open(url)
    return visitor


def post(url: str, path: str, **body: Any) -> dict[str, Any]:
    reply = httpx.post(f"{url}/v1/{path}", json=body, timeout=30.0)
    assert reply.status_code == 200, reply.text
    return reply.json()


def score(value: float) -> str:
    """As the page writes it; the tiny world has none that is so small that it would need a power of ten."""
    return f"{value:.4f}".replace("-", "\u2212")


def number(text: str) -> float:
    return float(text.replace("\u2212", "-"))


# ---------------------------------------------------------------- the funnel
def test_before_anybody_asks_the_page_shows_the_planned_funnel(page: Visitor):
    assert "tiny" in page.text("#about")
    assert f"{NUM_ITEMS} items" in page.text("#about")
    assert page.text("#funnel desc") == ("120 items came in; retriever saw 120 and kept 40; pre_ranker saw 40 and kept "
                                         "15; ranker saw 15 and kept 5.")
    assert not page.seen("#survivors")


def test_the_funnel_shows_the_counts_of_the_trace(page: Visitor, url: str):
    trace = post(url, "recommend", user_id=int(USER), trace=True)["trace"]
    page.ask(USER)
    saw = NUM_ITEMS
    for stage, (name, shown_saw, shown_kept, latency) in zip(trace, page.rows("#stages"), strict=True):
        assert name.split()[0] == stage["stage"]
        assert int(shown_saw) == saw
        assert int(shown_kept.split()[0]) == len(stage["items"])
        assert latency.endswith(" ms")
        assert f"{stage['stage']} saw {saw} and kept {len(stage['items'])} in " in page.text("#funnel desc")
        saw = len(stage["items"])
    assert page.text("#said") == f"User {USER}: 5 items of 120."


def test_the_latencies_are_those_of_the_answer(page: Visitor):
    page.ask(USER)
    page.find("#raw summary").click()
    answer = json.loads(page.until(lambda: page.text("#raw pre"), "the answer is there as JSON"))
    for name, _, _, latency in page.rows("#stages"):
        taken = answer["timings_ms"][name.split()[0]]
        assert latency == (f"{taken:.1f} ms" if taken < 9.95 else f"{round(taken)} ms")
    assert f"request {answer['request_id']}" in page.text("#facts")


def test_the_table_holds_every_survivor_with_rank_and_score_of_every_stage(page: Visitor, url: str):
    answer = post(url, "recommend", user_id=int(USER), trace=True)
    page.ask(USER)
    shown = {row[1]: row for row in page.rows("#ranks")}
    assert len(shown) == KEEPS["retriever"]
    for at, stage in enumerate(answer["trace"]):
        kept = {str(item["item_id"]): (rank, item["score"]) for rank, item in enumerate(stage["items"], start=1)}
        before = {str(item["item_id"]): rank for rank, item in enumerate(answer["trace"][at - 1]["items"], start=1)}
        for item, row in shown.items():
            if item not in kept:
                assert row[at + 2] in ("lost", "·")
                continue
            rank, value = kept[item]
            up = before[item] - rank if at else 0
            moved = "" if at == 0 else f"▲{up}" if up > 0 else f"▼{-up}" if up < 0 else "="
            assert row[at + 2] == f"{rank}{moved}{score(value)}"
    final = [str(item["item_id"]) for item in answer["items"]]
    assert [row[1] for row in page.rows("#ranks") if row[0]] == final
    assert [row[0] for row in page.rows("#ranks")][:6] == ["1", "2", "3", "4", "5", ""]


def test_an_item_is_marked_lost_at_the_one_stage_that_dropped_it(page: Visitor, url: str):
    trace = post(url, "recommend", user_id=int(USER), trace=True)["trace"]
    page.ask(USER)
    for row in page.rows("#ranks"):
        kept = [stage["stage"] for stage in trace if row[1] in {str(item["item_id"]) for item in stage["items"]}]
        wanted = [] if len(kept) == len(trace) else [list(KEEPS)[len(kept)]]
        assert [name for name, cell in zip(KEEPS, row[2:], strict=True) if cell == "lost"] == wanted


def test_lines_run_through_the_stages_of_the_picture_for_the_items_that_came_through(page: Visitor):
    page.ask(USER)
    assert len(page.all("#funnel .line")) == KEEPS["pre_ranker"] + KEEPS["ranker"]
    assert len(page.all("#funnel .line.final")) == 2 * KEEPS["ranker"]


# ---------------------------------------------------------------- filters
def test_filters_narrow_the_table_by_stage_and_by_text(page: Visitor, url: str):
    trace = post(url, "recommend", user_id=int(USER), trace=True)["trace"]
    kept = [{str(item["item_id"]) for item in stage["items"]} for stage in trace]
    page.ask(USER)
    for label, wanted in {"all survivors": kept[0], "in the answer": kept[2], "kept by pre_ranker": kept[1],
                          "lost at pre_ranker": kept[0] - kept[1], "lost at ranker": kept[1] - kept[2]}.items():
        page.choose("Show", f"{label} ({len(wanted)})")
        assert {row[1] for row in page.rows("#ranks")} == wanted, label
    page.choose("Show", "all survivors (40)")
    page.fill("Item id contains", "52")
    wanted = {item for item in kept[0] if "52" in item}
    assert 0 < len(wanted) < len(kept[0])
    assert {row[1] for row in page.rows("#ranks")} == wanted
    assert page.text("#count") == f"{len(wanted)} of 40 items"


def test_a_stage_orders_the_table_by_its_own_rank(page: Visitor, url: str):
    trace = post(url, "recommend", user_id=int(USER), trace=True)["trace"]
    page.ask(USER)
    page.press("retriever")
    assert [row[1] for row in page.rows("#ranks")] == [str(item["item_id"]) for item in trace[0]["items"]]
    assert [one.text for one in page.all("#ranks [aria-sort=ascending]")] == ["retriever"]
    assert page.focused() == "retriever"


# ---------------------------------------------------------------- one item
@pytest.mark.parametrize("place", ["kept", "ranker", "pre_ranker", "retriever"])
def test_the_search_for_an_item_says_what_the_api_says(page: Visitor, url: str, place: str):
    trace = post(url, "recommend", user_id=int(USER), trace=True)["trace"]
    kept = [[item["item_id"] for item in stage["items"]] for stage in trace]
    gone = [item_id(p) for p in range(NUM_ITEMS) if item_id(p) not in kept[0]]
    item = {"kept": kept[2][1], "ranker": next(i for i in kept[1] if i not in kept[2]),
            "pre_ranker": next(i for i in kept[0] if i not in kept[1]), "retriever": gone[3]}[place]
    found = post(url, "explain", user_id=int(USER), item_id=item)
    page.ask(USER)
    page.explain(str(item))
    assert found.get("lost_at") == (None if place == "kept" else place)
    for fate, (name, rank, value, cut, margin) in zip(found["stages"], page.rows("#margins"), strict=True):
        assert name.split()[0] == fate["stage"]
        assert [int(word) for word in re.findall(r"\d+", rank)] == [
            fate["rank"], {"retriever": 120, "pre_ranker": 40, "ranker": 15}[fate["stage"]], fate["keep"]]
        assert (value, cut) == (score(fate["score"]), score(fate["cut"]))
        assert number(margin) == pytest.approx(fate["score"] - fate["cut"], abs=1e-4)
    verdict = page.text("#verdict")
    if place == "kept":
        assert verdict == f"Item {item} is recommended: rank 2 at ranker."
    else:
        fate = next(fate for fate in found["stages"] if fate["stage"] == place)
        ranks = f"rank {fate['rank']}, where {fate['keep']} are kept"
        assert verdict.startswith(f"Item {item} was lost at {place}: {ranks}")
        assert verdict.endswith(f"its score is {score(fate['cut'] - fate['score'])} below the cut.")
    assert len(page.all("#funnel .way .cross")) == (place != "kept")


def test_an_excluded_item_is_said_to_be_excluded(page: Visitor):
    page.ask("103")  # the log says that this user must not get the first five items
    page.explain(str(item_id(0)))
    assert page.text("#verdict").startswith(f"Item {item_id(0)} is excluded")


def test_the_details_are_those_of_the_catalogue(page: Visitor, url: str):
    item = httpx.get(f"{url}/v1/items/{item_id(4)}").json()
    page.ask(USER)
    page.explain(str(item_id(4)))
    names = [one.text for one in page.all("#details dt")]
    assert names == [*item["features"], *item["counts"]]
    assert page.all("#details dd")[names.index("author")].text == item["features"]["author"]


def test_an_item_nobody_knows_is_the_problem_that_the_api_says(page: Visitor, url: str):
    problem = httpx.post(f"{url}/v1/explain", json={"user_id": 107, "item_id": "none"}).json()
    page.ask(USER)
    page.fill("Item id", "none")
    page.press("Explain")
    page.until(page.errors, "there is an error")
    assert page.errors() == [f"{problem['title']} (422): {problem['detail']}"]


# ---------------------------------------------------------------- requests
def test_a_request_may_be_pasted_as_json(page: Visitor, url: str):
    body = {"user_id": 107, "k": 2, "context": {"device": "desk"}, "history": [item_id(3), item_id(9)]}
    wanted = post(url, "recommend", **body)["items"]
    page.press("JSON")
    page.fill("Request as JSON", json.dumps(body))
    page.press("Show the funnel")
    page.until(lambda: page.all("#ranks tbody tr"), "there is an answer")
    assert [row[1] for row in page.rows("#ranks") if row[0]] == [str(item["item_id"]) for item in wanted]
    page.explain(str(item_id(3)))
    found = post(url, "explain", **body, item_id=item_id(3))
    assert [row[2] for row in page.rows("#margins")] == [score(fate["score"]) for fate in found["stages"]]


@pytest.mark.parametrize(("body", "says"), [
    ('{"user_id": 107, "k": 99}', "k: 99 is more than the last stage keeps; ask for at most 5"),
    ('{"user_id": 107, "features": {"citty": 1}}', "did you mean 'city'"), ("{", "Not valid JSON"),
    ("[1]", "Not a request: give a JSON object"), ('{"user_id": 107, "trace": false}', 'ask with "trace": true'),
])
def test_a_request_that_does_not_fit_is_said_beside_it(page: Visitor, body: str, says: str):
    page.press("JSON")
    page.fill("Request as JSON", body)
    page.press("Show the funnel")
    page.until(page.errors, "there is an error")
    assert says in page.text("#ask-error")


def test_a_link_leads_to_what_was_seen(page: Visitor, url: str):
    page.ask(USER, Items="3")
    page.explain(str(item_id(4)))
    link, verdict = page.driver.current_url, page.text("#verdict")
    assert link == f"{url}/#user={USER}&k=3&item={item_id(4)}"
    page.open(link)
    page.until(lambda: page.all("#details dt"), "the item is explained again")
    assert (page.text("#verdict"), page.text("#said")) == (verdict, f"User {USER}: 3 items of 120.")


def test_the_page_asks_its_own_server_only(page: Visitor, url: str):
    page.ask(USER)
    page.explain(str(item_id(4)))
    assert page.hosts_asked() == {url.removeprefix("http://")}


# ---------------------------------------------------------------- without a mouse, without eyes
def test_everything_can_be_done_with_the_keyboard(page: Visitor):
    page.type(Keys.TAB)
    assert page.focused() == "Skip to the answer"
    page.tab_to("User id")
    page.type(USER, Keys.ENTER)
    page.until(lambda: page.all("#ranks tbody tr"), "there is an answer")
    page.tab_to("Item id")
    page.type(str(item_id(4)), Keys.ENTER)
    page.until(lambda: page.text("#verdict"), "the item is explained")
    page.tab_to("Item id contains")
    page.type("5")
    first = page.rows("#ranks")[0][1]
    page.tab_to(first)
    page.type(Keys.ENTER)
    page.until(lambda: page.text("#verdict").startswith(f"Item {first} is recommended"), "the first item is explained")
    page.until(lambda: page.script("return document.activeElement.id") == "verdict", "the focus is on what was found")
    page.type(Keys.ESCAPE)
    assert page.focused() == first
    page.tab_to("Compare")
    page.type(Keys.ENTER)
    page.until(lambda: page.text("#differs"), "there is a comparison")
    assert page.text("#differs") == "Both answers hold the same items in the same order."


def test_the_focus_goes_through_the_page_in_reading_order_and_can_be_seen(page: Visitor):
    page.ask(USER)
    page.script("document.activeElement.blur(); scrollTo(0, 0)")
    stops: list[int] = []
    for _ in range(30):
        page.type(Keys.TAB)
        place, outline = page.script("""
            const one = document.activeElement, style = getComputedStyle(one);
            const every = [...document.querySelectorAll('*')];
            return [every.indexOf(one), style.outlineStyle === 'none' ? 0 : parseFloat(style.outlineWidth)]""")
        stops.append(place)
        assert outline >= 1, page.focused()
    assert stops == sorted(set(stops))


def test_a_screen_reader_finds_its_way(page: Visitor):
    page.ask(USER)
    assert sorted(landmarks(page)) == sorted([
        ("banner", ""), ("main", ""), ("region", "Request"), ("region", "Funnel"),
        ("region", "Where was an item lost?"), ("region", "Survivors"), ("search", "Filter the survivors"),
        ("region", "Compare"), ("contentinfo", "")])
    for place in ("#said", "#count", "#about", "#verdict", "#differs"):
        assert page.find(place).aria_role == "status", place
    for place in ("#ask-error", "#find-error", "#against-error"):
        assert page.script("return document.querySelector(arguments[0]).getAttribute('role')", place) == "alert"
    cell = page.script("return document.querySelector('#ranks tbody td:nth-child(4)').textContent")
    assert cell.startswith("rank ")
    assert ", score " in cell


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1000, 1600])
def test_every_rule_of_accessibility_holds_and_everything_fits(page: Visitor, url: str, width: int, scheme: str):
    page.size(width)
    page.prefer(scheme)
    page.open(url)
    assert violations(page) == []
    page.ask(USER)
    page.explain(str(item_id(4)))
    page.find("#raw summary").click()
    page.press("Compare")
    page.until(lambda: page.text("#differs"), "there is a comparison")
    assert violations(page) == []
    page.press("JSON")
    page.press("another endpoint")
    page.press("Compare")
    page.until(page.errors, "there is an error")
    assert violations(page) == []
