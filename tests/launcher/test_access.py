"""Who may ask a server: keys that are named and never recorded, and addresses that other machines reach."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from kt_launch.planning.access import is_loopback
from kt_launch.watching.client import Keys, read_keys
from kt_model.contract import OWN_ADMIN_KEY
from kt_model.errors import LaunchError
from kt_model.redaction import hide_arguments

Launch = Callable[..., Any]


def words_after(argv: list[str], *flags: str) -> list[str]:
    return [argv[argv.index(flag) + 1] for flag in flags]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_this_machine_alone_needs_no_key(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "gpu.example.com", ""])
def test_other_addresses_let_others_in(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize("words", [["server.api_key=env:MINE"], ["server.open=true"]])
def test_other_machines_are_let_in_with_a_key_or_a_word(plan: Launch, words: list[str]) -> None:
    assert plan("server.host=0.0.0.0", *words).code == 0
    extra = "server.extra_args=[--api-key,env:MINE]"
    assert plan("server.host=0.0.0.0", extra).code == 0


def test_routes_that_change_the_server_need_a_key_of_their_own(plan: Launch) -> None:
    argv = plan("server.api_key=file:/run/secrets/key").plan["argv"]
    assert words_after(argv, "--api-key", "--admin-api-key") == ["file:/run/secrets/key", f"env:{OWN_ADMIN_KEY}"]
    argv = plan("server.api_key=env:MINE", "server.admin_key=env:THEIRS").plan["argv"]
    assert words_after(argv, "--api-key", "--admin-api-key") == ["env:MINE", "env:THEIRS"]
    assert "--admin-api-key" not in plan().plan["argv"]


def test_a_keys_file_is_the_one_seen_from_where_it_was_typed(
    plan: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands about the server are typed in other folders, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    planned = plan("server.api_key=file:./my key", "server.admin_key=file:~/admin")
    places = [f"file:{tmp_path}/my key", f"file:{tmp_path}/home/admin"]
    assert words_after(planned.plan["argv"], "--api-key", "--admin-api-key") == places
    assert planned.value("server.api_key") == places[0]


def sent(keys: Keys, path: str) -> str | None:
    (request,) = keys.auth_flow(httpx.Request("POST", f"http://127.0.0.1:1{path}"))
    found: str | None = request.headers.get("Authorization")
    return found


def test_the_launcher_asks_with_the_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", "one")
    file = tmp_path / "key"
    file.write_text("two\n")
    keys = Keys(["--api-key", "env:MINE", f"--admin-api-key=file:{file}"])
    assert (sent(keys, "/generate"), sent(keys, "/flush_cache")) == ("Bearer one", "Bearer two")
    assert sent(Keys([]), "/generate") is None


def test_who_only_asks_needs_no_admin_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chats and lists of adapters, in a shell that has only the key for requests."""
    monkeypatch.setenv("MINE", "one")
    keys = Keys(["--api-key", "env:MINE", "--admin-api-key", "env:NO_SUCH_KEY"])
    assert sent(keys, "/v1/models") == "Bearer one"
    with pytest.raises(LaunchError, match=r"server\.admin_key: .* NO_SUCH_KEY, which is not set"):
        sent(keys, "/load_lora_adapter")


def test_the_key_that_the_launcher_makes_up_is_one_for_all_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OWN_ADMIN_KEY, "")  # so that it goes again afterwards
    monkeypatch.delenv(OWN_ADMIN_KEY)
    argv = ["--admin-api-key", f"env:{OWN_ADMIN_KEY}"]
    Keys(argv)
    assert OWN_ADMIN_KEY in os.environ, "before a server is started"
    first = read_keys(argv)
    assert len(first[1]) == 32 and read_keys(argv) == first


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("env:NO_SUCH_KEY", "in the environment variable NO_SUCH_KEY, which is not set"),
        ("file:/no/such/key", "in /no/such/key, which cannot be read (No such file or directory)"),
        ("file:/dev/null", "in /dev/null, which cannot be read (is no regular file)"),
        ("env:EMPTY_KEY", "in the environment variable EMPTY_KEY, which is not set or empty"),
    ],
)
def test_a_key_that_is_not_there_is_told(place: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMPTY_KEY", " ")
    with pytest.raises(LaunchError) as raised:
        Keys(["--api-key", place])
    assert problem in str(raised.value)


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff\xfe\x00", b"one\ntwo\n", b"\x1b[2J", b"x" * 5000])
def test_a_file_that_holds_no_key_is_told(content: bytes, tmp_path: Path) -> None:
    """An empty key is none to SGLang, which would let everybody in."""
    file = tmp_path / "key"
    file.write_bytes(content)
    with pytest.raises(LaunchError, match="which cannot be read"):
        Keys(["--api-key", f"file:{file}"])


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("[--api-ke,sekret123]", "--api-ke is a beginning of --api-key"),
        ("[--admin-api-k=sekret123]", "--admin-api-k is a beginning of --admin-api-key"),
        ("[--api-key,'']", "--api-key is empty"),
        ("['--api-key=']", "--api-key is empty"),
        ("[--admin-api-key]", "--admin-api-key is empty"),
    ],
)
def test_keys_by_sglangs_own_flags_are_written_out_and_not_empty(plan: Launch, words: str, problem: str) -> None:
    found = plan("server.host=0.0.0.0", "server.open=true", f"server.extra_args={words}")
    assert (found.code, problem in found.err, "sekret123" in found.out + found.err) == (2, True, False)


def test_secrets_are_hidden_behind_beginnings_of_flags_too() -> None:
    hidden: dict[str, str] = {}
    words = ["--ssl-keyfile-pass", "sekret123", "--api-k=sekret456", "--ssl-keyfile", "/etc/key.pem"]
    shown = hide_arguments(words, hidden)
    assert "sekret" not in " ".join(shown) and shown[3:] == ["--ssl-keyfile", "/etc/key.pem"]
    assert {*hidden.values()} == {"sekret123", "sekret456"}
