"""Launchers of several hosts: they meet, compare what each is about to start, and notice when another is gone. Real
plans and sockets, no servers."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from launching import LONG_S
from tiny_files import write_adapter, write_checkpoint

from kt_launch.cluster import hosts as meeting
from kt_launch.cluster import peer
from kt_launch.cluster.consistency import facts_of
from kt_launch.cluster.hosts import Hosts
from kt_launch.cluster.peer import HostGone
from kt_launch.config.sources import Sources
from kt_launch.config.validation import validate
from kt_launch.gathering.facts import prepare
from kt_launch.machine.host import route_to
from kt_launch.machine.ports import probe_port
from kt_model.errors import Problems, ServerDidNotStart
from kt_model.plan import LaunchPlan

Plan = Callable[..., LaunchPlan]


@pytest.fixture
def port() -> int:
    return probe_port("127.0.0.1", 0).number


@pytest.fixture
def plan_of(tmp_path: Path, port: int) -> Plan:
    """The plan of one of two hosts, with its own copies of checkpoint and adapter."""

    def call(number: int, *, adapter_seed: int = 0, wait_s: float = 120.0, **server: Any) -> LaunchPlan:
        folder = tmp_path / f"host{number}"
        model, adapter = folder / "model", folder / "west"
        if not model.exists():
            write_checkpoint(model)
            write_adapter(adapter)
            if adapter_seed:
                settings = json.loads((adapter / "adapter_config.json").read_text())
                (adapter / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": adapter_seed}))
        server |= {"nodes": 2, "node_rank": number, "rendezvous": f"127.0.0.1:{port}", "tp": 2, "device": "cpu"}
        values = {
            "model": {"path": str(model)},
            "lora": {"adapters": {"west": {"path": str(adapter)}}},
            "server": {**server, "start_timeout_s": wait_s},
        }
        config, mistakes = validate(values)
        assert mistakes == []
        return prepare(config, Sources(), Problems())

    return call


def met(plans: list[LaunchPlan]) -> list[Hosts | ServerDidNotStart]:
    """Every host meets in a thread of its own: what came of it, in their order."""
    found: list[Any] = [None] * len(plans)

    def meet(number: int) -> None:
        try:
            found[number] = Hosts(plans[number]).__enter__()
        except ServerDidNotStart as failure:
            found[number] = failure

    threads = [threading.Thread(target=meet, args=(number,)) for number in range(len(plans))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_S)
    return found


def gone(host: Hosts, timeout_s: float = LONG_S) -> str:
    """What a host says once it has noticed that another is gone."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            host.require_all()
        except HostGone as found:
            return str(found)
        time.sleep(0.05)
    return ""


@pytest.fixture
def pair(plan_of: Plan) -> Any:
    hosts = met([plan_of(0), plan_of(1)])
    assert all(isinstance(host, Hosts) for host in hosts), hosts
    yield hosts
    for host in hosts:
        if isinstance(host, Hosts):
            host.__exit__(None, None)


def test_two_hosts_meet_and_hear_when_the_server_is_proven(pair: list[Hosts]) -> None:
    first, second = pair
    first.require_all()
    assert second.is_part and not second.others_ready
    first.say_ready()
    deadline = time.monotonic() + 240
    while not second.others_ready and time.monotonic() < deadline:
        time.sleep(0.05)
    assert second.others_ready


def test_the_port_is_free_for_sglang_once_they_have_met(pair: list[Hosts], port: int) -> None:
    with socket.create_server(("127.0.0.1", port)):
        pair[0].require_all()


@pytest.mark.parametrize("ending", [0, 1])
def test_what_ends_on_one_host_is_heard_on_the_other(pair: list[Hosts], ending: int) -> None:
    pair[ending].__exit__(ServerDidNotStart, ServerDidNotStart("server", "it ran out of memory"))
    assert "it failed (server: it ran out of memory)" in gone(pair[1 - ending])


def test_a_host_of_which_nothing_is_heard_is_gone(pair: list[Hosts], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "LOST_S", 0.3)
    assert "has been silent for 0.3 s" in gone(pair[0])


def test_a_host_that_does_not_come_is_named(plan_of: Plan) -> None:
    (failure,) = met([plan_of(0, wait_s=1.0)])
    assert "host 1 of 2 did not come to 127.0.0.1:" in str(failure)
    assert "server.node_rank=1" in str(failure)


def test_host_0_that_does_not_come_is_named(plan_of: Plan) -> None:
    (failure,) = met([plan_of(1, wait_s=1.0)])
    assert "host 0 does not listen at 127.0.0.1:" in str(failure)


@pytest.mark.parametrize(
    ("other", "fact"),
    [
        ({"context_length": 128}, "--context-length is 128 on host 1"),
        ({"adapter_seed": 64}, "adapter west is "),
        ({"extra_args": ["--log-level", "debug"]}, "--log-level is debug on host 1"),
    ],
)
def test_what_differs_is_named_on_both_before_anything_starts(
    plan_of: Plan, other: dict[str, Any], fact: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "DIFFERENT_S", 0.1)
    found = met([plan_of(0), plan_of(1, **other)])
    assert all(isinstance(each, ServerDidNotStart) and fact in str(each) for each in found), found


def test_other_weights_and_versions_are_named(plan_of: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "DIFFERENT_S", 0.1)
    plans = [plan_of(0), plan_of(1)]
    own = {"torch": "1.0", "the checkpoint's digest": "another"}
    monkeypatch.setattr(meeting, "facts_of", lambda plan: facts_of(plan) | (own if plan is plans[1] else {}))
    found = met(plans)
    assert all("torch is 1.0 on host 1" in str(each) for each in found), found
    assert not any("digest" in str(each) for each in found), "compared with one that is not known yet"


def test_paths_ports_and_threads_may_differ(plan_of: Plan) -> None:
    first, second = plan_of(0), plan_of(1)
    words = [*second.argv]
    words[words.index("--kt-cpuinfer") + 1] = "7"
    found = met([first, replace(second, argv=tuple(words))])
    assert all(isinstance(each, Hosts) for each in found), found
    for each in found:
        each.__exit__(None, None)  # type: ignore[union-attr]


@pytest.fixture
def keyed(plan_of: Plan, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Plans of a server that requires a key, each with the key of its number."""

    def call(number: int, key: str = "all of us", **more: Any) -> LaunchPlan:
        monkeypatch.setenv(f"KT_TEST_KEY_{number}", key)
        plan = plan_of(number, api_key="env:KT_TEST_KEY", **more)
        return replace(plan, argv=tuple(word.replace("KT_TEST_KEY", f"KT_TEST_KEY_{number}") for word in plan.argv))

    monkeypatch.setenv("KT_TEST_KEY", "")
    monkeypatch.setattr(meeting, "facts_of", lambda plan: facts_of(plan) | {"--api-key": "a key"})
    return call


def test_hosts_of_one_key_meet(keyed: Plan) -> None:
    found = met([keyed(0), keyed(1)])
    assert all(isinstance(each, Hosts) for each in found), found
    for each in found:
        each.__exit__(None, None)  # type: ignore[union-attr]


def test_one_of_another_key_is_sent_away_and_keeps_nobody_from_meeting(
    keyed: Plan, port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = [keyed(0), keyed(1, key="a guess")]
    started = threading.Event()
    refused: list[Any] = []

    def come_late() -> None:
        refused.extend(met([plans[1]]))
        started.set()

    thread = threading.Thread(target=come_late)
    thread.start()
    found: list[Any] = []
    first = threading.Thread(target=lambda: found.extend(met([plans[0]])))
    first.start()
    assert started.wait(LONG_S)
    found_late = met([keyed(1)])
    first.join(LONG_S)
    thread.join(LONG_S)
    assert "this host belongs to another launch, or has another server.admin_key or server.api_key" in str(refused[0])
    assert "meeting: 127.0.0.1 was rejected: it does not know this launch's secret" in capsys.readouterr().out
    for each in (*found, *found_late):
        assert isinstance(each, Hosts), each
        each.__exit__(None, None)


def test_with_a_key_a_host_that_differs_ends_the_start_at_once(keyed: Plan) -> None:
    found = met([keyed(0), keyed(1, context_length=128)])
    assert all("--context-length is 128 on host 1" in str(each) for each in found), found


def test_without_a_key_a_host_that_differs_may_be_replaced_by_one_that_does_not(plan_of: Plan) -> None:
    """Anybody could say that it is a host with other facts."""
    waiting: list[Any] = []
    first = threading.Thread(target=lambda: waiting.extend(met([plan_of(0)])))
    first.start()
    (refused,) = met([plan_of(1, context_length=128)])
    (second,) = met([plan_of(1)])
    first.join(LONG_S)
    assert "--context-length is 128 on host 1" in str(refused)
    for each in (*waiting, second):
        assert isinstance(each, Hosts), each
        each.__exit__(None, None)


def test_one_that_waits_long_for_others_goes_on_waiting(plan_of: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "TOLD_S", 0.2)
    plans = [plan_of(0), plan_of(1), plan_of(1)]
    configs = [{**plan.config, "server": {**plan.config["server"], "nodes": 3}} for plan in plans]
    plans = [replace(plan, config=config) for plan, config in zip(plans, configs, strict=True)]
    rank = plans[2].resolved["server.node_rank"]
    plans[2] = replace(plans[2], resolved={**plans[2].resolved, "server.node_rank": replace(rank, value=2)})
    late: list[Any] = []
    last = threading.Timer(1.0, lambda: late.extend(met([plans[2]])))
    last.start()
    found = met(plans[:2])
    last.join(LONG_S)
    for each in (*found, *late):
        assert isinstance(each, Hosts), each
        each.__exit__(None, None)


def test_what_was_said_once_is_believed_once(plan_of: Plan, port: int) -> None:
    """Who has heard a host say who it is cannot say it again."""
    heard = []
    with socket.create_server(("127.0.0.1", port)) as trap:
        joining = threading.Thread(target=met, args=([plan_of(1, wait_s=5.0)],))
        joining.start()
        with trap.accept()[0] as connection:
            connection.sendall(b'{"kt-launch": "00"}\n')
            heard.append(connection.makefile("rb").readline())
    joining.join(LONG_S)
    waiting: list[Any] = []
    first = threading.Thread(target=lambda: waiting.extend(met([plan_of(0, wait_s=3.0)])))
    first.start()
    say_on(port, heard[0])
    first.join(LONG_S)
    assert "host 1 of 2 did not come" in str(waiting[0])


def say_on(port: int, said: bytes) -> None:
    """As somebody who connects and says it, once anybody listens."""
    for _ in range(100):
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=60) as stranger:
                stranger.sendall(said)
                stranger.recv(1000)
                return
        except OSError:
            time.sleep(0.05)


@pytest.mark.parametrize(
    "said",
    [
        *(b"", b"\n", b"GET / HTTP/1.1\r\n\r\n", b"{}\n", b"0 {}\n", b"[1]\n", b"\xff" * 99),
        *(b'{"host": 1, "name": "x", "facts": {}}\n', b'0 {"nonce": "0", "host": 1, "name": "x", "facts": {}}\n'),
    ],
)
def test_strangers_are_sent_away(plan_of: Plan, port: int, said: bytes) -> None:
    plans = [plan_of(0), plan_of(1)]
    thread = threading.Thread(target=say_on, args=(port, said))
    thread.start()
    found = met(plans)
    thread.join()
    assert all(isinstance(each, Hosts) for each in found), found
    for each in found:
        each.__exit__(None, None)  # type: ignore[union-attr]


def test_one_who_says_nothing_keeps_nobody_waiting(plan_of: Plan, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "GREETING_S", 300.0)
    waiting: list[Any] = []
    first = threading.Thread(target=lambda: waiting.extend(met([plan_of(0)])))
    first.start()
    deadline = time.monotonic() + 240
    silent = None
    while silent is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            silent = socket.create_connection(("127.0.0.1", port), timeout=60)
        time.sleep(0.01)
    assert silent is not None
    (second,) = met([plan_of(1)])
    first.join(LONG_S)
    silent.close()
    for each in (*waiting, second):
        assert isinstance(each, Hosts), each
        each.__exit__(None, None)


def test_the_route_to_an_address() -> None:
    assert route_to("127.0.0.1") is None
    assert route_to("no.such.host.invalid") is None
