"""One look at all modules binds what SGLang's look a hook binds. That a server leaves no name out: test_seams.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import pytest


@pytest.fixture(params=["SGLang's", "ours"])
def replace(request: pytest.FixtureRequest) -> Callable[[object, object, object], int]:
    """SGLang's own look, which shows what the tests hold, and ours."""
    from kt_sglang.without_gpu import torchvision_shim

    torchvision_shim.install_if_needed()
    from sglang.srt.plugins import hook_registry

    from kt_sglang.seams.propagation import Bindings

    own: Callable[[object, object, object], int] = hook_registry._propagate_patch
    return own if request.param == "SGLang's" else Bindings().replace


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """A module that is imported until the test has ended."""

    def make(name: str, **names: object) -> ModuleType:
        module = ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return make


def test_every_name_of_other_modules_is_bound_anew(
    replace: Callable[[object, object, object], int], made: Callable[..., ModuleType]
) -> None:
    old, new, other = object(), object(), object()
    source = made("kt_source", one=old, alias=old)
    users = [made("kt_user", one=old, two=old, three=other), made("kt_other_user", renamed=old)]
    source.one = new  # type: ignore[attr-defined]
    assert replace(old, new, source) == 3
    assert [vars(users[0])[name] for name in ("one", "two", "three")] == [new, new, other]
    assert vars(users[1])["renamed"] is new
    assert vars(source)["alias"] is old, "the module of the hook's target is left to who set it"


def test_a_second_hook_by_another_path_reaches_all_of_them(
    replace: Callable[[object, object, object], int], made: Callable[..., ModuleType]
) -> None:
    old, new, newest = object(), object(), object()
    source, user = made("kt_source", one=old), made("kt_user", one=old)
    source.one = new  # type: ignore[attr-defined]
    assert replace(old, new, source) == 1
    user.one = newest  # type: ignore[attr-defined]
    assert replace(new, newest, user) == 1
    assert vars(source)["one"] is vars(user)["one"] is newest


def test_a_module_that_is_imported_between_two_hooks_is_seen(
    replace: Callable[[object, object, object], int], made: Callable[..., ModuleType]
) -> None:
    first, second = object(), object()
    source = made("kt_source", first=first, second=second)
    assert replace(first, object(), source) == 0
    late = made("kt_late", second=second)
    new = object()
    assert replace(second, new, source) == 1
    assert vars(late)["second"] is new


def test_a_name_that_was_bound_to_something_else_meanwhile_is_left_alone(
    replace: Callable[[object, object, object], int], made: Callable[..., ModuleType]
) -> None:
    first, second, own = object(), object(), object()
    source, user = made("kt_source"), made("kt_user", first=first, second=second)
    assert replace(first, object(), source) == 1
    user.second = own  # type: ignore[attr-defined]
    assert replace(second, object(), source) == 0
    assert vars(user)["second"] is own
