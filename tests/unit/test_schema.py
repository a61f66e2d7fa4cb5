"""Declarations of features: what contradicts itself is refused in one line, what is declared has a fingerprint."""

from typing import Any

import pytest
from pydantic import ValidationError

from raycascade.errors import ConfigError
from raycascade.schema import FeatureSchema, FeatureSpace, Field, near_miss

ITEM_ID = {"kind": "id", "name": "item_id", "side": "item"}
AUTHOR = {"kind": "id", "name": "author", "side": "item"}
CITY = {"kind": "id", "name": "city", "side": "user"}
AGE = {"kind": "dense", "name": "age", "side": "user"}
HISTORY = {"kind": "history", "max_len": 3}
ACTION = {"kind": "id", "name": "action", "side": "event"}


def schema(*features: dict[str, Any], **options: Any) -> FeatureSchema:
    return FeatureSchema.model_validate({"features": features, **options})


@pytest.mark.parametrize(("features", "options", "expected"), [
    ([CITY, CITY], {}, "'city' is declared twice"),
    ([CITY], {"labels": ["city"]}, "'city' is declared twice"),
    ([{**CITY, "name": "rank"}], {}, "'rank' is a reserved column"),
    ([{**CITY, "name": "candidates"}], {}, "'candidates' is a reserved column"),
    ([CITY], {"labels": ["click"], "positive": "like"}, r"positive 'like' is not a label; labels are \['click'\]"),
    ([CITY, AUTHOR, {"kind": "cross", "name": "x", "parts": ["city", "autor"]}], {},
     "feature 'x' refers to 'autor', which is not there; did you mean 'author'"),
    ([CITY, AGE, {"kind": "cross", "name": "x", "parts": ["city", "age"]}], {}, "refers to 'age'"),
    ([CITY, HISTORY, ACTION, {"kind": "cross", "name": "x", "parts": ["city", "action"]}], {}, "refers to 'action'"),
    ([ITEM_ID, {"kind": "count", "name": "c", "label": "clik"}], {"labels": ["click"]}, "did you mean 'click'"),
    ([ITEM_ID, HISTORY, {"kind": "match", "name": "m", "field": "autor"}], {}, "refers to 'autor'"),
    ([CITY, HISTORY, {"kind": "match", "name": "m", "field": "city"}], {}, "refers to 'city'"),
    ([AUTHOR, HISTORY, {"kind": "match", "name": "m", "field": "author", "action": "acton"}], {}, "refers to 'acton'"),
    ([AUTHOR, {"kind": "history", "fields": ["autor"]}], {}, "did you mean 'author'"),
    ([AUTHOR, {"kind": "match", "name": "m", "field": "author"}], {}, "'m' reads the history, which is not there"),
    ([ACTION], {}, "'action' reads the history, which is not there; add a feature of kind history"),
    ([{**CITY, "vocabulary": "v"}, {**AUTHOR, "vocabulary": "v", "min_count": 2}], {},
     "'city' and 'author' share a vocabulary but differ in min_count"),
    ([{**CITY, "vocabulary": "v"}, {**AUTHOR, "vocabulary": "v", "buckets": 9}], {}, "differ in buckets"),
])
def test_a_schema_that_contradicts_itself_is_refused_in_one_line(features: list, options: dict, expected: str):
    with pytest.raises(ConfigError, match=expected) as caught:
        schema(*features, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("feature", [
    {"kind": "idd", "name": "city", "side": "user"}, {**CITY, "side": "itm"}, {**CITY, "max_value": 3},
    {**AGE, "normalise": "minmax"}, {"kind": "vector", "name": "v", "side": "item"},
    {"kind": "cross", "name": "x", "parts": ["city"]}, {**CITY, "buckets": 0},
])
def test_an_unknown_kind_option_or_choice_is_refused(feature: dict):
    with pytest.raises(ValidationError):
        schema(CITY | {"name": "other"}, feature)


def test_the_fingerprint_changes_with_every_declaration_and_with_nothing_else():
    base = schema(CITY, AGE, labels=["click"])
    assert base.fingerprint() == schema(CITY, AGE, labels=["click"]).fingerprint()
    assert base.fingerprint() == FeatureSchema.model_validate(base.model_dump(mode="json")).fingerprint()
    others = [schema(AGE, CITY, labels=["click"]), schema(CITY, AGE),
              schema({**CITY, "min_count": 2}, AGE, labels=["click"]),
              schema(CITY, AGE, labels=["click"], count_bucket_hours=1),
              schema(CITY, AGE, labels=["click"], positive="click"),
              schema(CITY, AGE, labels=["click"], utc_offset_hours=8)]
    assert len({base.fingerprint(), *(other.fingerprint() for other in others)}) == len(others) + 1


def test_sides_keep_the_declared_order_and_a_cross_has_none():
    cross = {"kind": "cross", "name": "x", "parts": ["city", "author"]}
    log = schema(AUTHOR, HISTORY, CITY, cross, ITEM_ID, ACTION)
    assert [f.name for f in log.side("item")] == ["author", "item_id"]
    assert [f.name for f in log.side("user", "item")] == ["author", "history", "city", "item_id"]
    everything = [f.name for f in log.side("user", "context", "item", "event")]
    assert everything == ["author", "history", "city", "item_id", "action"]


def test_a_near_miss_is_one_name_and_without_one_all_are_known():
    assert near_miss("clik", {"click", "like"}) == "; did you mean 'click'?"
    assert near_miss("zzz", {"b", "a"}) == "; known: a, b"
    assert near_miss("zzz", set()) == "; known: none"


SPACE = FeatureSpace(
    fields=(
        Field(name="city", side="request", form="id", table="city", num_rows=5),
        Field(name="author", side="item", form="id", table="author", num_rows=5),
        Field(name="x", side="pair", form="id", table="x", num_rows=9),
        Field(name="same", side="pair", form="dense"),
        Field(name="action", side="event", form="id", table="action", num_rows=4),
    ),
    history_len=7, history_fields=("author",), labels=("click",),
)


def test_fields_can_be_left_out_by_name_by_pair_and_with_the_history():
    assert [f.name for f in SPACE.without(("x", "city")).fields] == ["author", "same", "action"]
    assert [f.name for f in SPACE.without(("pair",)).fields] == ["city", "author", "action"]
    bare = SPACE.without(("history",))
    assert (bare.history_len, bare.history_fields) == (0, ())
    assert [f.name for f in bare.fields] == ["city", "author", "x", "same"]
    assert SPACE.without(("author",)).history_fields == ()
    assert SPACE.without(()) == SPACE
    with pytest.raises(ConfigError, match="exclude: 'autor' is not a feature; did you mean 'author'"):
        SPACE.without(("autor",))
