"""The page over made-up servers: errors, keys, degraded answers, markup in ids, other endpoints, other cascades."""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence

import pytest

pytest.importorskip("selenium", reason="needs selenium (pip install -e '.[dev]')")

from fastapi import FastAPI

from tests.page_accessibility import violations
from tests.page_server import World, served, world_api
from tests.page_visitor import Visitor

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # selenium leaves a socket to the garbage collector
SMALL = {"retriever": 12, "pre_ranker": 6, "ranker": 3}
MARKUP = ("<img src=x onerror=\"document.title='owned'\">", "<script>document.title='owned'</script>",
          "&lt;b&gt; \"quoted\" 'twice'")
DRAWN = "const box = document.querySelector('#funnel'); return box.clientWidth === box.firstChild.clientWidth"
Open = Callable[..., str]
Peers = Callable[[World, World], list[str]]


@pytest.fixture
def opened(visitor: Visitor) -> Iterator[Open]:
    """Serves a world and opens its page."""
    with contextlib.ExitStack() as servers:
        def serve(world: World, *, path: str = "/", peers: Sequence[str] = ()) -> str:
            url = servers.enter_context(served(world_api(world, peers=peers)))
            visitor.open(url + path)
            return url

        yield serve
        visitor.driver.get("about:blank")  # before the servers end


@pytest.fixture
def peers(visitor: Visitor) -> Iterator[Peers]:
    """Serves two worlds that may ask each other."""
    with contextlib.ExitStack() as servers:
        def serve(first: World, second: World) -> list[str]:
            apis = [FastAPI(), FastAPI()]
            urls = [servers.enter_context(served(api)) for api in apis]
            for api, world, other in zip(apis, (first, second), reversed(urls), strict=True):
                api.mount("/", world_api(world, peers=[other]))
            return urls

        yield serve
        visitor.driver.get("about:blank")  # before the servers end


def small(**options: object) -> World:
    return World(**{"num_items": 200, "keeps": SMALL, **options})  # pyright: ignore[reportArgumentType]


def final(world: World, user: str) -> list[str]:
    return [str(item["item_id"]) for item in world.answer({"user_id": user})["items"]]


# ---------------------------------------------------------------- the rules themselves
def test_the_rules_of_accessibility_find_what_is_planted(visitor: Visitor, opened: Open):
    opened(small())
    assert violations(visitor) == []
    for planted, rule in {
        "document.querySelector('label[for=user]').remove()": "a control without a label",
        "document.querySelector('#user').id = 'k'": "two elements have id k",
        "document.querySelector('.main').textContent = ''": "nothing to read on it",
        "document.querySelector('#about').style.color = '#ccc'": "contrast of text",
        "document.querySelector('#k').style.borderColor = '#ddd'": "contrast of border",
        "document.querySelector('#funnel .soft').setAttribute('x', -40)": "cut off",
        "document.querySelector('#said').style.width = '3000px'": "the page is",
        "document.querySelector('h2').outerHTML = '<h4>Deep</h4>'": "heading of level 4 skips one",
        "document.querySelector('.main').style.cssText = 'min-height:0;height:12px;padding:0'": "too small to hit",
    }.items():
        visitor.driver.refresh()
        visitor.until(lambda: visitor.all("#funnel svg"), "there is a funnel")
        # The policy of the page allows no markup from text; the test is not bound by it.
        visitor.driver.execute_cdp_cmd("Page.setBypassCSP", {"enabled": True})
        visitor.script(planted)
        assert [found for found in violations(visitor) if found.startswith(rule)], rule
    visitor.driver.execute_cdp_cmd("Page.setBypassCSP", {"enabled": False})


# ---------------------------------------------------------------- what goes wrong
@pytest.mark.parametrize(("status", "body", "line"), [
    (429, {"title": "Too many requests", "detail": "wait"}, "Too many requests (429): wait Try again in 3 s."),
    (503, {"title": "Not ready", "detail": "no answer from: ranker"}, "Not ready (503): no answer from: ranker"),
    (422, {"title": MARKUP[0], "detail": MARKUP[1]}, f"{MARKUP[0]} (422): {MARKUP[1]}"),
])
def test_an_error_is_shown_as_its_problem_document_says(
    visitor: Visitor, opened: Open, status: int, body: dict[str, str], line: str
):
    opened(small(problem=(status, body)))
    visitor.fill("User id", "1")
    visitor.press("Show the funnel")
    visitor.until(visitor.errors, "there is an error")
    assert visitor.text("#ask-error") == line
    assert not visitor.seen("#survivors")


def test_an_error_goes_when_the_next_request_is_answered(visitor: Visitor, opened: Open):
    world = small(problem=(503, {"title": "Not ready", "detail": "wait"}))
    opened(world)
    visitor.fill("User id", "1")
    visitor.press("Show the funnel")
    visitor.until(visitor.errors, "there is an error")
    world.problem = None
    visitor.ask("1")
    assert visitor.errors() == []


def test_a_server_that_is_gone_is_said_to_be_gone(visitor: Visitor):
    with served(world_api(small())) as url:
        visitor.open(url)
    visitor.fill("User id", "1")
    visitor.press("Show the funnel")
    visitor.until(visitor.errors, "there is an error")
    gone = "cannot be reached from here; is it up, and one of page.peers?"
    assert visitor.text("#ask-error") == f"No answer: {url}/ {gone}"


def test_an_empty_field_is_said_before_anything_is_sent(visitor: Visitor, opened: Open):
    world = small()
    opened(world)
    visitor.press("Show the funnel")
    visitor.until(visitor.errors, "there is an error")
    assert visitor.errors() == ["User id: give the id of a user; one that nobody knows is served as well"]
    visitor.fill("User id", "1")
    visitor.fill("Items", "-3")
    visitor.press("Show the funnel")
    visitor.until(lambda: visitor.errors() == ["Items: -3 is no whole number above 0"], "the number is refused")
    assert world.seen == []


def test_the_form_is_there_before_the_server_has_said_anything(visitor: Visitor, opened: Open):
    world = small()
    url = opened(world)
    world.silent.set()
    try:
        visitor.driver.get("about:blank")
        visitor.driver.get(url)
        assert visitor.text("#about").startswith("Asking the server")
        assert visitor.field("User id").is_enabled()
        painted = "return performance.getEntriesByName('first-contentful-paint').length"
        visitor.until(lambda: visitor.script(painted), "something is painted")
    finally:
        world.silent.clear()
    visitor.until(lambda: world.model in visitor.text("#about"), "the server has said what it serves")


# ---------------------------------------------------------------- keys
def test_the_key_is_sent_as_a_header_and_kept_in_the_session_alone(visitor: Visitor, opened: Open):
    opened(small(key="rck_secret"))
    assert visitor.text("#about") == "A valid API key is needed (401): no API key; send it"
    visitor.fill("API key", "rck_secret\n")
    visitor.until(lambda: "200 items" in visitor.text("#about"), "the key is accepted")
    visitor.ask("5")
    kept = visitor.script("return [Object.values(sessionStorage), localStorage.length, document.cookie, location.href]")
    assert kept[:3] == [["rck_secret"], 0, ""]
    assert "rck_secret" not in kept[3]
    visitor.driver.refresh()
    visitor.until(lambda: visitor.all("#ranks tbody tr"), "the key is still known, and the link asks again")
    visitor.fill("API key", "\n")
    visitor.until(lambda: "401" in visitor.text("#about"), "the key is forgotten")


def test_the_key_of_this_server_is_not_sent_to_another_one(visitor: Visitor, peers: Peers):
    here, there = peers(small(key="rck_secret"), other := small(key="rck_other"))
    visitor.open(here)
    visitor.fill("API key", "rck_secret\n")
    visitor.until(lambda: "200 items" in visitor.text("#about"), "the key is accepted")
    visitor.ask("5")
    visitor.press("another endpoint")
    visitor.fill("Endpoint (B)", there)
    visitor.press("Compare")
    visitor.until(visitor.errors, "there is an error")
    assert "A valid API key is needed (401)" in visitor.text("#against-error")
    visitor.fill("Its API key", "rck_other")
    visitor.press("Compare")
    visitor.until(lambda: visitor.text("#differs"), "there is a comparison")
    assert set(other.shown) == {"", "Bearer rck_other"}


# ---------------------------------------------------------------- markup
def test_markup_stays_text_wherever_it_comes_from(visitor: Visitor, opened: Open):
    opened(small(names=MARKUP * 70, num_items=200, model=MARKUP[0]))
    assert MARKUP[0] in visitor.text("#about")
    visitor.ask(MARKUP[1])
    assert visitor.text("#said") == f"User {MARKUP[1]}: 3 items of 200."
    assert {row[1] for row in visitor.rows("#ranks")} <= set(MARKUP)
    visitor.explain(MARKUP[0])
    assert "<b>local</b>" in visitor.text("#details")
    visitor.find("#raw summary").click()
    visitor.press("Compare")
    visitor.until(lambda: visitor.text("#differs"), "there is a comparison")
    assert visitor.driver.title == "raycascade: the funnel of a request"
    assert visitor.all("img, main script, b") == []


def test_an_id_of_sixty_four_bits_stays_exact(visitor: Visitor, opened: Open):
    big = 9_007_199_254_740_993  # a double cannot hold it
    world = small(names=tuple(big + 2 * n for n in range(200)))
    opened(world)
    visitor.press("JSON")
    visitor.fill("Request as JSON", json.dumps({"user_id": big}))
    visitor.press("Show the funnel")
    visitor.until(lambda: visitor.all("#ranks tbody tr"), "there is an answer")
    assert world.seen[-1] == {"trace": True, "user_id": big}
    shown = [row[1] for row in visitor.rows("#ranks") if row[0]]
    assert shown == final(world, str(big))
    visitor.explain(shown[0])
    assert world.seen[-1]["item_id"] == shown[0]


# ---------------------------------------------------------------- degraded answers
@pytest.mark.parametrize(("stage", "ran"), [("ranker", 2), ("pre_ranker", 1), ("retriever", 0)])
def test_stages_that_were_left_out_are_marked_in_words(visitor: Visitor, opened: Open, stage: str, ran: int):
    opened(small(degraded_at=stage))
    visitor.ask("5")
    names = list(SMALL)
    assert visitor.text("#said").endswith(f"Degraded: {', '.join(names[ran:])} left out (deadline).")
    marked = [row[2].startswith("left out: deadline") for row in visitor.rows("#stages")]
    assert marked == [False] * ran + [True] * (3 - ran)
    assert len(visitor.all("#funnel .body.left")) == 3 - ran
    assert f"{stage} was left out: deadline" in visitor.text("#funnel desc")
    assert violations(visitor) == []


# ---------------------------------------------------------------- two answers
def overlap(visitor: Visitor) -> list[tuple[str, int, int, int]]:
    return [(name, int(a.split()[0]), int(b.split()[0]), int(both))
            for name, a, b, both in visitor.rows("#overlap")]


def expected(world_a: World, user_a: str, world_b: World, user_b: str) -> list[tuple[str, int, int, int]]:
    kept_a, kept_b = ([{p for p, _ in stage} for stage in world.funnel(user).values()]
                      for world, user in ((world_a, user_a), (world_b, user_b)))
    rows = [(name, len(a), len(b), len(a & b)) for name, a, b in zip(SMALL, kept_a, kept_b, strict=True)]
    return [("the answer", *rows[-1][1:]), *rows]


def test_two_requests_are_compared_side_by_side(visitor: Visitor, opened: Open):
    world = small()
    opened(world)
    visitor.ask("5")
    visitor.fill("Other request as JSON (B)", '{"user_id": "6"}')
    visitor.press("Compare")
    visitor.until(lambda: visitor.text("#differs"), "there is a comparison")
    assert overlap(visitor) == expected(world, "5", world, "6")
    assert len(visitor.all("#difference svg")) == 2


def test_two_models_are_compared_by_the_paths_of_their_endpoints(visitor: Visitor):
    first, second = small(), small(drift=0.2, model="candidate")
    both = FastAPI()
    both.mount("/candidate", world_api(second))
    both.mount("/", world_api(first))
    with served(both) as url:
        visitor.open(url)
        visitor.ask("5")
        visitor.press("another endpoint")
        visitor.fill("Endpoint (B)", "/candidate")
        visitor.press("Compare")
        visitor.until(lambda: visitor.text("#differs"), "there is a comparison")
        assert overlap(visitor) == expected(first, "5", second, "5")
        assert "candidate" in visitor.text("#name-b")
        check_moves(visitor, first, second)
        visitor.open(f"{url}/candidate/")
        visitor.ask("5")
        assert [row[1] for row in visitor.rows("#ranks") if row[0]] == final(second, "5")


def check_moves(visitor: Visitor, first: World, second: World) -> None:
    ranks = [{item: rank for rank, item in enumerate(final(world, "5"), start=1)} for world in (first, second)]
    shown = visitor.rows("#moves")
    assert {row[0] for row in shown} == ranks[0].keys() | ranks[1].keys()
    for item, _, _, moved in shown:
        a, b = (rank.get(item) for rank in ranks)
        up = (a or 0) - (b or 0)
        wanted = f"only in {'A' if a else 'B'}" if not (a and b) else f"▲{up}" if up > 0 else f"▼{-up}" if up else "="
        assert moved == wanted
    differing = {item for item in ranks[0].keys() | ranks[1].keys() if ranks[0].get(item) != ranks[1].get(item)}
    visitor.press("only what differs")
    assert {row[0] for row in visitor.rows("#moves")} == differing


def test_an_endpoint_of_another_origin_is_asked_where_both_sides_allow_it(visitor: Visitor, peers: Peers):
    here, there = peers(first := small(), second := small(seed=2, model="candidate"))
    visitor.open(here)
    visitor.ask("5")
    visitor.press("another endpoint")
    visitor.fill("Endpoint (B)", there)
    visitor.press("Compare")
    visitor.until(lambda: visitor.text("#differs"), "there is a comparison")
    assert overlap(visitor) == expected(first, "5", second, "5")


def test_an_endpoint_that_is_no_peer_is_not_asked(visitor: Visitor, opened: Open):
    with served(world_api(other := small())) as there:
        opened(small())
        visitor.ask("5")
        visitor.press("another endpoint")
        visitor.fill("Endpoint (B)", there)
        visitor.press("Compare")
        visitor.until(visitor.errors, "there is an error")
        assert "cannot be reached from here; is it up, and one of page.peers?" in visitor.text("#against-error")
        assert other.seen == []
        visitor.driver.get_log("browser")  # the browser says that its policy forbade it


def test_an_earlier_answer_and_a_saved_one_can_be_compared(visitor: Visitor, opened: Open):
    before = small()
    opened(before)
    visitor.ask("5")
    assert not visitor.field("an earlier answer").is_enabled()
    visitor.ask("6")
    visitor.press("an earlier answer")
    visitor.press("Compare")
    visitor.until(lambda: visitor.text("#differs"), "there is a comparison")
    assert overlap(visitor) == expected(before, "6", before, "5")
    after = small(drift=0.2)
    visitor.press("a saved answer")
    visitor.paste("Answer as JSON, asked with trace (B)", json.dumps(after.answer({"user_id": "6"})))
    visitor.press("Compare")
    visitor.until(lambda: visitor.text("#name-b").startswith("B: saved answer"), "there is another comparison")
    assert overlap(visitor) == expected(before, "6", after, "6")


def test_a_model_that_was_swapped_meanwhile_is_named(visitor: Visitor, opened: Open):
    world = small()
    opened(world)
    visitor.ask("5")
    world.model, world.seed = "next", 9
    visitor.ask("5")
    assert "next" in visitor.text("#about")
    assert world.version in visitor.text("#about")


# ---------------------------------------------------------------- other cascades
@pytest.mark.parametrize("keeps", [
    {"only": 20}, {"retriever": 1, "ranker": 1}, {"a": 5000, "b": 900, "c": 120, "d": 40, "e": 10},
    {"a_stage_with_a_rather_long_name_of_its_own": 30, "another_one_with_a_name_that_is_long": 10},
])
def test_cascades_of_any_depth_fit_any_window(visitor: Visitor, opened: Open, keeps: dict[str, int]):
    opened(World(num_items=20_000, keeps=keeps))
    visitor.ask("5")
    assert [row[0].split()[0] for row in visitor.rows("#stages")] == list(keeps)
    for width in (360, 700, 1000, 1600):
        visitor.size(width)
        visitor.until(lambda: visitor.script(DRAWN), "the funnel is drawn anew")
        assert len(visitor.all("#funnel .body")) == len(keeps)
        assert violations(visitor) == []


def test_a_long_list_comes_in_parts(visitor: Visitor, opened: Open):
    opened(World(num_items=20_000, keeps={"retriever": 750, "ranker": 20}))
    visitor.ask("5")
    for rows, label in ((100, "Show 500 more"), (600, "Show 150 more"), (750, "")):
        assert len(visitor.rows("#ranks")) == rows
        if label:
            visitor.press(label)
    assert not visitor.seen("#more")
    assert len({row[1] for row in visitor.rows("#ranks")}) == 750
