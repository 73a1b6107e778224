"""The form that a request asks for is refused where nothing can be made of it."""

from __future__ import annotations

from typing import Any

import pytest

from kt_sglang.edge.formats import require_form
from kt_sglang.edge.requests import Refused

NO_SCHEMA = "response_format: the schema in its json_schema is missing, expected an object, as in {"
WRONG: list[tuple[Any, str]] = [
    ("json_object", 'response_format: expected an object, such as {"type": "json_object"}, but got \'json_object\''),
    ([1], "but got [1]"),
    ({"type": "json_schema"}, "response_format: its json_schema is missing, expected an object, as in {"),
    ({"type": "json_schema", "json_schema": 5}, "its json_schema is 5, expected an object"),
    ({"type": "json_schema", "json_schema": {"name": "x"}}, NO_SCHEMA),
    ({"type": "json_schema", "json_schema": {"name": "x", "schema": None}}, NO_SCHEMA),
    ({"type": "json_schema", "json_schema": {"name": "x", "schema": []}}, "the schema in its json_schema is []"),
    ({"type": "json_schema", "json_schema": {"name": "x", "schema": False}}, "the schema in its json_schema is False"),
]
FINE: list[Any] = [
    None,
    {"type": "text"},
    {"type": "json_object"},
    {"type": "structural_tag"},
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},
]


@pytest.mark.parametrize(("form", "said"), WRONG, ids=str)
def test_a_form_without_a_schema_is_refused(form: Any, said: str) -> None:
    with pytest.raises(Refused) as refused:
        require_form({"response_format": form})
    assert (refused.value.status, refused.value.param, said in str(refused.value)) == (400, "response_format", True)


@pytest.mark.parametrize("form", FINE, ids=str)
def test_other_forms_are_sglangs_to_read(form: Any) -> None:
    require_form({"response_format": form})
    require_form({})
