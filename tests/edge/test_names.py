"""What a name means, whatever adapters are called."""

from __future__ import annotations

import pytest

from kt_sglang.edge.names import Meaning, Names, UnknownName

BASE = Meaning("demo", None)
WEST = Meaning("demo:west", "west")
NAMES = Names("demo", ["west", "chef/v1.2"])


@pytest.mark.parametrize(
    ("typed", "meant"),
    {
        "demo": BASE,
        "demo:west": WEST,
        "west": WEST,
        "chef/v1.2": Meaning("demo:chef/v1.2", "chef/v1.2"),
        "demo:chef/v1.2": Meaning("demo:chef/v1.2", "chef/v1.2"),
    }.items(),
)
def test_ids_and_adapters_alone(typed: str, meant: Meaning) -> None:
    assert NAMES.meaning(typed) == meant


@pytest.mark.parametrize(
    ("typed", "nearest"),
    {
        "WEST": "demo:west",
        "Demo": "demo",
        "demo:": "demo",
        "demo:West": "demo:west",
        "demo: west": "demo:west",
        "nope:west": "demo:west",
        "demo:west:west": "demo:west",
        "chef": "demo:chef/v1.2",
        "gpt-4o": "demo",
        "": "demo",
    }.items(),
)
def test_any_other_name_is_unknown_and_the_nearest_id_is_said(typed: str, nearest: str) -> None:
    with pytest.raises(UnknownName) as unknown:
        NAMES.meaning(typed)
    assert unknown.value.nearest == nearest


def test_every_listed_id_means_itself_even_where_adapters_are_called_like_others() -> None:
    names = Names("demo", ["demo", "demo:west", "west", "default"])
    assert len({each.id for each in names.listed}) == 5
    assert [names.meaning(each.id) for each in names.listed] == names.listed
    assert names.meaning("demo") == BASE
    assert names.meaning("demo:west") == WEST
    assert names.meaning("default").adapter == "default"


def test_a_base_with_colons_is_found_whole() -> None:
    names = Names("s3://bucket/demo", ["west"])
    assert [each.id for each in names.listed] == ["s3://bucket/demo", "s3://bucket/demo:west"]
    assert all(names.meaning(each.id) == each for each in names.listed)
    with pytest.raises(UnknownName):
        names.meaning("s3")


def test_adapters_that_come_and_go_are_seen() -> None:
    loaded = {"west": "/adapters/west"}
    names = Names("demo", loaded)
    loaded["later"] = "/adapters/later"
    assert names.meaning("later").id == "demo:later"
    del loaded["west"]
    with pytest.raises(UnknownName):
        names.meaning("demo:west")
