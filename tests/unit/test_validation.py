"""Strict JSON and strict fields: what is ambiguous is refused, and the message names it."""

import orjson
import pytest
from rest_framework.exceptions import ValidationError

from api.errors import BadRequest, to_api_error
from api.pages import MAX_LIMIT, parse_page
from api.validation import (
    MAX_DEPTH,
    NAMED_MAX,
    VALUES_MAX,
    FlagField,
    MetadataField,
    NumberField,
    SecondsField,
    StrictSerializer,
    TextField,
    WholeField,
    parse_object,
)


@pytest.mark.parametrize("raw", [b"", b"  \n", b"null", b"{}"])
def test_an_empty_body_is_an_empty_object(raw):
    assert parse_object(raw) == {}


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (b"{", "not valid JSON"),
        (b"[1]", "object"),
        (b'"x"', "object"),
        (b'{"a": NaN}', "not valid JSON"),
        (b'{"a": Infinity}', "not valid JSON"),
        (b'{"a": "\\ud800"}', "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b'{"a": "x\\u0000y"}', "NUL"),
        (b'{"a": [{"b\\u0000": 1}]}', "NUL"),
        (b'{"a": ' * (MAX_DEPTH + 1) + b"1" + b"}" * (MAX_DEPTH + 1), "nested"),
        (b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}", "JSON|nested"),
        (b'{"a": 1} x', "not valid JSON"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_refused(raw, word):
    with pytest.raises(BadRequest, match=word):
        parse_object(raw)


def test_an_escaped_backslash_is_no_nul():
    assert parse_object(b'{"a": "\\\\u0000"}') == {"a": "\\u0000"}


def test_depth_is_counted_not_brackets():
    wide = b'{"a": [' + b",".join([b"[]"] * 500) + b"]}"
    assert len(parse_object(wide)["a"]) == 500


class Inner(StrictSerializer):
    count = WholeField(required=False, allow_null=True)


class Outer(StrictSerializer):
    name = TextField(required=False, max_length=5)
    sure = FlagField(required=False)
    seconds = SecondsField(required=False, most=30)
    cores = NumberField(required=False, least=0.5)
    inner = Inner(required=False)
    several = Inner(required=False, many=True)
    metadata = MetadataField(required=False)


def checked(**data):
    serializer = Outer(data=data)
    serializer.is_valid(raise_exception=True)
    return serializer.validated_data


def test_what_is_accepted_is_kept_as_it_was():
    data = {
        "name": " a ",
        "sure": False,
        "seconds": 6.9,
        "cores": 2,
        "inner": {"count": 5},
        "several": [{}, {"count": None}],
    }
    assert checked(**data) == data
    assert checked(seconds=1e9) == {"seconds": 30}
    assert checked(inner={"count": 5.0}) == {"inner": {"count": 5}}
    assert checked(seconds=0.0999) == {"seconds": 0.0999}


@pytest.mark.parametrize(
    ("data", "names"),
    [
        ({"nmae": "x"}, "nmae: unknown field"),
        ({"inner": {"x": 1}}, "inner.x: unknown field"),
        ({"several": [{}, {"y": 1}]}, "several[1].y: unknown field"),
        ({"name": 5}, "name: "),
        ({"name": "123456"}, "name: "),
        ({"name": None}, "name: "),
        ({"sure": "true"}, "sure: "),
        ({"sure": 1}, "sure: "),
        ({"inner": {"count": "5"}}, "inner.count: "),
        ({"inner": {"count": True}}, "inner.count: "),
        ({"inner": {"count": 5.5}}, "inner.count: "),
        ({"inner": {"count": 2**31}}, "inner.count: "),
        ({"inner": []}, "inner: "),
        ({"seconds": "5"}, "seconds: "),
        ({"seconds": True}, "seconds: "),
        ({"seconds": -1}, "seconds: "),
        ({"cores": 0.4}, "cores: "),
        ({"metadata": {"a b": "x"}}, "metadata: "),
        ({"metadata": {"": "x"}}, "metadata: "),
        ({"metadata": {"a" * 129: "x"}}, "metadata: "),
        ({"metadata": {"a": 1}}, "metadata: "),
        ({"metadata": {"a": "x" * 1025}}, "metadata: "),
        ({"metadata": {str(n): "x" for n in range(65)}}, "metadata: "),
        ({"metadata": "x"}, "metadata: "),
    ],
)
def test_what_a_field_refuses_names_the_field(data, names):
    with pytest.raises(ValidationError) as refused:
        checked(**data)
    answer = to_api_error(refused.value)
    assert answer.status == 400
    assert answer.message.startswith(names), answer.message


@pytest.mark.parametrize(
    ("query", "page"),
    [
        ({}, (20, None, True)),
        ({"limit": "", "starting_after": "", "include_total_count": ""}, (20, None, True)),
        ({"limit": "0"}, (1, None, True)),
        ({"limit": "-7"}, (1, None, True)),
        ({"limit": "999999"}, (MAX_LIMIT, None, True)),
        ({"limit": "7", "starting_after": "dbx_1", "include_total_count": "false"}, (7, "dbx_1", False)),
    ],
)
def test_pages(query, page):
    assert tuple(parse_page(query)) == page


@pytest.mark.parametrize("query", [{"limit": "ten"}, {"limit": "1.5"}, {"include_total_count": "perhaps"}])
def test_pages_refuse_junk(query):
    with pytest.raises(BadRequest, match=next(iter(query))):
        parse_page(query)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a": [' + b"[]," * VALUES_MAX + b"[]]}",
        b'["' + b'\\\\","' * VALUES_MAX + b'"]',
        b"{" + b",".join(b'"%d":1' % number for number in range(VALUES_MAX + 1)) + b"}",
        b'"' * (4 * VALUES_MAX),
    ],
    ids=["lists", "texts", "keys", "quotes"],
)
def test_more_values_than_the_limit_are_refused_before_they_are_made(raw: bytes) -> None:
    with pytest.raises(BadRequest, match=f"more than {VALUES_MAX} values"):
        parse_object(raw)


@pytest.mark.parametrize(
    "text",
    [",[{" * VALUES_MAX, '"\\' * VALUES_MAX, "\\" * VALUES_MAX, '\\",' * VALUES_MAX],
    ids=["marks", "quotes", "backslashes", "both"],
)
def test_a_long_text_is_one_value_whatever_is_in_it(text: str) -> None:
    assert parse_object(orjson.dumps({"a": text})) == {"a": text}


def test_unknown_fields_are_named_up_to_a_bound() -> None:
    serializer = Many(data={f"x{number}": 1 for number in range(1000)})
    assert not serializer.is_valid()
    assert len(serializer.errors) == NAMED_MAX


class Many(StrictSerializer):
    pass
