"""What a request may say, strictly: JSON without ambiguity, unknown fields refused by name, numbers that are numbers.

Fields here differ from DRF's in one way: they never convert. ``"5"`` is not a number and ``1`` is not a text.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

import orjson
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers
from rest_framework.validators import ProhibitSurrogateCharactersValidator

from api.errors import BadRequest

MAX_DEPTH = 64
VALUES_MAX = 100_000
"""Values in one body. Each costs the process ten times and more what it costs the sender."""
NAMED_MAX = 10
"""Unknown fields that an error names."""
METADATA_KEYS_MAX = 64
METADATA_VALUE_MAX = 1024
_METADATA_KEY = re.compile(r"[A-Za-z0-9_./-]{1,128}")
INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1


def parse_json(raw: bytes) -> Any:
    """The JSON value in ``raw``.

    Raises BadRequest for anything but UTF-8 JSON: NaN and Infinity, lone surrogates, NUL characters anywhere, nesting
    deeper than MAX_DEPTH, more than VALUES_MAX values.
    """
    if len(raw) > 2 * VALUES_MAX and _has_more_values(raw, VALUES_MAX):
        raise BadRequest(f"the body has more than {VALUES_MAX} values")
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from None
    if b"\\u0000" in raw:
        _refuse_nul(value)
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH:
        _refuse_depth(value, MAX_DEPTH)
    return value


def parse_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in ``raw``; an empty body and ``null`` are an empty object. Raises BadRequest."""
    if not raw.strip():
        return {}
    value = parse_json(raw)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BadRequest("the body must be a JSON object")
    return value


def _has_more_values(raw: bytes, most: int) -> bool:
    """Whether there are more than about ``most`` values in JSON, told without making them: by what separates them.

    Texts count by their quotes, so what is no JSON is bounded as well. Quick on a long text, which a file's body is.
    """
    if b"\\" in raw:
        raw = raw.replace(b"\\\\", b"").replace(b'\\"', b"")  # now every quote begins or ends a text
    pieces = raw.split(b'"', 2 * most + 1)
    if len(pieces) > 2 * most + 1:
        return True
    return sum(piece.count(mark) for piece in pieces[::2] for mark in (b",", b"[", b"{")) > most


def _refuse_nul(value: Any) -> None:
    if isinstance(value, str):
        if "\0" in value:
            raise BadRequest("the body contains a NUL character (\\u0000)")
    elif isinstance(value, list):
        for item in value:
            _refuse_nul(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            _refuse_nul(key)
            _refuse_nul(item)


def _refuse_depth(value: Any, left: int) -> None:
    if isinstance(value, list | dict):
        if left == 0:
            raise BadRequest(f"the body is nested deeper than {MAX_DEPTH} levels")
        for item in value.values() if isinstance(value, dict) else value:
            _refuse_depth(item, left - 1)


def refuse_unknown(data: Mapping[str, Any], known: set[str] | frozenset[str]) -> None:
    """Raises BadRequest naming the fields of ``data`` that are not among ``known``."""
    unknown = sorted(set(data) - known)
    if unknown:
        raise BadRequest(
            f"unknown field{'s' if len(unknown) > 1 else ''}: {', '.join(name[:80] for name in unknown[:NAMED_MAX])}"
        )


class StrictSerializer(serializers.Serializer[Any]):
    """A serializer that refuses fields it does not know, by name."""

    def to_internal_value(self, data: Any) -> Any:
        if isinstance(data, Mapping):
            known = self.fields
            unknown = itertools.islice((str(name)[:80] for name in data if name not in known), NAMED_MAX)
            if named := {name: ["unknown field"] for name in unknown}:
                raise serializers.ValidationError(named)
        return super().to_internal_value(data)


@functools.cache
def _checker(serializer: type[serializers.Serializer[Any]]) -> serializers.Serializer[Any]:
    return serializer()


def validated(serializer: type[serializers.Serializer[Any]], data: Any) -> dict[str, Any]:
    """What the body says. Raises serializers.ValidationError.

    One instance serves all requests, since to check changes nothing in it, and to make one copies every field.
    """
    given: dict[str, Any] = _checker(serializer).run_validation(data)
    return dict(given)


class TextField(serializers.CharField):
    """A text as it was given: not trimmed, may be empty, never converted from something else."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("allow_blank", True)
        options.setdefault("trim_whitespace", False)
        super().__init__(**options)
        # It looks at each character in Python, seconds for a file's text, and for what no JSON body can bring in.
        self.validators = [one for one in self.validators if not isinstance(one, ProhibitSurrogateCharactersValidator)]

    def to_internal_value(self, data: Any) -> str:
        if not isinstance(data, str):
            self.fail("invalid")
        return data


class WholeField(serializers.IntegerField):
    """A whole number: ``5`` and ``5.0``, not ``"5"`` and not ``true``. Bounds are errors; 32 bits unless told more."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("max_value", INT32_MAX)
        options.setdefault("min_value", -INT32_MAX - 1)
        super().__init__(**options)

    def to_internal_value(self, data: Any) -> int:
        if isinstance(data, bool) or not isinstance(data, int | float) or data != data or data in (math.inf, -math.inf):
            self.fail("invalid")
        if int(data) != data:
            self.fail("invalid")
        return int(data)


class FlagField(serializers.BooleanField):
    """``true`` or ``false`` and nothing that looks like them."""

    def to_internal_value(self, data: Any) -> bool:
        if not isinstance(data, bool):
            self.fail("invalid", input=data)
        return data


@extend_schema_field({"anyOf": [{"type": "integer"}, {"type": "number"}]})
class NumberField(serializers.Field[Any, Any, Any, Any]):
    """A number, whole or not, declared ``anyOf: [integer, number]``. Values over ``most`` are clamped to it."""

    default_error_messages = {"invalid": "A number is required.", "low": "May not be less than {least}."}

    def __init__(self, *, least: float = 0, most: float = INT64_MAX, **options: Any) -> None:
        self.least, self.most = least, most
        super().__init__(**options)

    def to_internal_value(self, data: Any) -> float | int:
        if isinstance(data, bool) or not isinstance(data, int | float) or not math.isfinite(data):
            self.fail("invalid")
        if data < self.least:
            self.fail("low", least=self.least)
        return min(data, self.most)

    def to_representation(self, value: Any) -> Any:
        return value


class SecondsField(NumberField):
    """A duration in seconds."""


def check_metadata_key(key: str) -> bool:
    """Whether ``key`` may be a metadata key: 1 to 128 characters of ``[A-Za-z0-9_./-]``."""
    return _METADATA_KEY.fullmatch(key) is not None


def check_metadata(value: Any) -> dict[str, str]:
    """``value`` as metadata. Raises serializers.ValidationError naming the rule that it breaks."""
    if not isinstance(value, dict):
        raise serializers.ValidationError("Must be an object of texts.")
    if len(value) > METADATA_KEYS_MAX:
        raise serializers.ValidationError(f"At most {METADATA_KEYS_MAX} keys are allowed.")
    for key, text in value.items():
        if not check_metadata_key(key):
            raise serializers.ValidationError(
                f"Key {key[:140]!r}: 1 to 128 characters of A-Z a-z 0-9 _ . / - are allowed."
            )
        if not isinstance(text, str):
            raise serializers.ValidationError(f"Key {key!r}: the value must be a text.")
        if len(text) > METADATA_VALUE_MAX:
            raise serializers.ValidationError(f"Key {key!r}: the value is longer than {METADATA_VALUE_MAX} characters.")
    return value


@extend_schema_field({"type": "object", "additionalProperties": {"type": "string"}})
class MetadataField(serializers.Field[Any, Any, Any, Any]):
    """User metadata: texts by key, under the rule of ``check_metadata``."""

    def to_internal_value(self, data: Any) -> dict[str, str]:
        return check_metadata(data)

    def to_representation(self, value: Any) -> Any:
        return value


MILLISECONDS = OpenApiTypes.INT64
