"""What a request asks for by its names, and what SGLang is given instead."""

from __future__ import annotations

from typing import Any

import pytest

from kt_sglang.edge.names import Meaning, Names
from kt_sglang.edge.requests import Model, Refused, Route, count_prompts, require_plain_name, understand

NAMES = Names("demo", ["west", "chef"])
BASE, WEST = Meaning("demo", None), Meaning("demo:west", "west")
OPTIONAL, REQUIRED, ABSENT = Route(Model.OPTIONAL), Route(Model.REQUIRED), Route(Model.ABSENT)
THREE: dict[str, Any] = {"text": ["a", "b", "c"]}
INSIDE = Route(Model.ABSENT, inside="parameters")


@pytest.mark.parametrize(
    ("route", "body", "given", "asked"),
    [
        (OPTIONAL, {"model": "demo"}, {"model": "demo"}, BASE),
        (OPTIONAL, {"model": "west"}, {"model": "demo:west"}, WEST),
        (OPTIONAL, {}, {"model": "demo"}, BASE),
        (OPTIONAL, {"model": None}, {"model": "demo"}, BASE),
        (OPTIONAL, {"model": "demo", "lora_path": "west"}, {"model": "demo:west", "lora_path": "west"}, WEST),
        (OPTIONAL, {"model": "west", "lora_path": "demo:west"}, {"model": "demo:west", "lora_path": "west"}, WEST),
        (OPTIONAL, {"lora_path": ["west"]}, {"model": "demo:west", "lora_path": "west"}, WEST),
        (OPTIONAL, {"lora_path": [None]}, {"model": "demo", "lora_path": None}, BASE),
        (REQUIRED, {"model": "west"}, {"model": "demo:west"}, WEST),
        (REQUIRED, {}, {}, BASE),
        (ABSENT, {"text": "a"}, {"text": "a"}, BASE),
        (ABSENT, {"text": "a", "model": "west"}, {"text": "a"}, WEST),
        (ABSENT, {"lora_path": "demo:west"}, {"lora_path": "west"}, WEST),
        (ABSENT, {"lora_path": "demo"}, {"lora_path": None}, BASE),
        (ABSENT, THREE | {"lora_path": ["west", None, "demo"]}, THREE | {"lora_path": ["west", None, None]}, None),
        (ABSENT, THREE | {"lora_path": ["west"] * 3}, THREE | {"lora_path": "west"}, WEST),
        (INSIDE, {"parameters": {"lora_path": "west"}}, {"parameters": {"lora_path": "west"}}, WEST),
        (INSIDE, {"model": "west", "instances": []}, {"instances": [], "parameters": {}}, WEST),
        (INSIDE, {"instances": []}, {"instances": []}, BASE),
    ],
)  # fmt: skip
def test_names_become_ids_and_adapters(
    route: Route, body: dict[str, Any], given: dict[str, Any], asked: Meaning | None
) -> None:
    before = dict(body)
    understood = understand(route, body, NAMES)
    assert (understood.body, understood.asked) == (given, asked)
    assert body == before


def test_what_is_null_is_absent_in_tools_too() -> None:
    """OpenAI's own type of a tool has null for `strict` and `parameters`."""
    route = Route(Model.OPTIONAL, nulls_are_absent=True)
    body = {"tools": [{"name": "f", "strict": None, "parameters": {"a": None}}, 5], "stream": None}
    assert understand(route, body, NAMES).body == {
        "tools": [{"name": "f", "parameters": {"a": None}}, 5], "model": "demo"
    }  # fmt: skip
    assert understand(
        Route(Model.REQUIRED, nulls_are_absent=True, empty={"prompt": ""}), {"prompt": None}, NAMES
    ).body == {"prompt": ""}


@pytest.mark.parametrize(
    ("route", "body", "status", "param", "problem"),
    [
        (OPTIONAL, {"model": "wset"}, 404, "model", "there is no model named 'wset'. Did you mean 'demo:west'?"),
        (OPTIONAL, {"model": 5}, 400, "model", "expected a name, but got 5"),
        (ABSENT, {"lora_path": "/adapters/west"}, 404, "lora_path", "Did you mean 'demo:west'?"),
        (ABSENT, {"text": "a", "lora_path": ["west", "west"]}, 400, "lora_path", "2 names for 1 prompts"),
        (ABSENT, THREE | {"lora_path": ["west", None]}, 400, "lora_path", "2 names for 3 prompts"),
        (INSIDE, {"instances": [{}, {}], "lora_path": ["west"]}, 400, "lora_path", "1 names for 2 prompts"),
        (ABSENT, {"lora_path": ["west", ""]}, 404, "lora_path", "there is no model named ''"),
        (ABSENT, {"lora_path": {"west": 1}}, 400, "lora_path", "expected a name"),
        (OPTIONAL, {"model": "west", "lora_path": "chef"}, 400, "lora_path", "names demo:chef, but model"),
        (OPTIONAL, {"model": "west", "lora_path": "demo"}, 400, "lora_path", "names demo, but model names demo:west"),
        (OPTIONAL, {"prompt": ["a", "b"], "lora_path": ["west", None]}, 400, "lora_path", "names one model"),
        (INSIDE, {"model": "no"}, 404, "model", "there is no model named 'no'"),
    ],
)  # fmt: skip
def test_what_names_nobody_or_two_is_refused(
    route: Route, body: dict[str, Any], status: int, param: str, problem: str
) -> None:
    with pytest.raises(Refused) as refused:
        understand(route, body, NAMES)
    assert (refused.value.status, refused.value.param) == (status, param)
    assert refused.value.code == ("model_not_found" if status == 404 else None)
    assert problem in str(refused.value)


@pytest.mark.parametrize(
    ("body", "count"),
    [
        ({"text": "a"}, 1),
        ({"text": ["a", "b"]}, 2),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": [[1, 2], [3]]}, 2),
        ({"text": None, "input_ids": [[1], [2]]}, 2),
        ({"input_embeds": [[0.5, 1.0], [0.5, 1.0], [0.5, 1.0]]}, 1),
        ({"input_embeds": [[[0.5, 1.0]], [[0.5, 1.0]]]}, 2),
        ({"messages": []}, 1),
        ({"text": []}, 1),
    ],
)
def test_prompts_are_counted(body: dict[str, Any], count: int) -> None:
    assert count_prompts(body) == count


@pytest.mark.parametrize("name", ["", " west", "a b", "demo:west", "../west"])
def test_a_name_that_could_not_stand_in_a_request_is_not_given(name: str) -> None:
    with pytest.raises(Refused, match=r"letters, digits and \. _ - / are expected"):
        require_plain_name({"lora_name": name})
    require_plain_name({"lora_name": "west-2/v1.0"})
