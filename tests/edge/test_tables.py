"""The edge knows every route of the installed SGLang that takes a model."""

from __future__ import annotations

import asyncio
import re
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.utils.auth import _get_auth_level_from_app_and_scope, decide_request_auth

from kt_sglang import edge
from kt_sglang.edge.blocked_routes import AT_FAULT, RECORDING, REFUSED
from kt_sglang.edge.garbage import around_freeze_after_warmup
from kt_sglang.edge.requests import ROUTES

NAMES_NEW_ADAPTERS = {"/load_lora_adapter"}


@pytest.fixture(scope="module")
def app() -> Any:
    from kt_sglang.without_gpu import torchvision_shim

    torchvision_shim.install_if_needed()
    from sglang.srt.entrypoints.http_server import app

    return app


def test_sglang_has_every_endpoint_of_our_tables(app: Any) -> None:
    assert edge.missing_endpoints() == []


def test_every_route_whose_body_has_a_model_or_a_lora_path_is_known(app: Any) -> None:
    document, paths = app.openapi(), edge.read_paths(app)
    known = {*paths.names, *paths.refused, *NAMES_NEW_ADAPTERS}
    with_names = set()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            for content in operation.get("requestBody", {}).get("content", {}).values():
                schema = document["components"]["schemas"].get(content["schema"].get("$ref", "").rpartition("/")[2], {})
                if {"model", "lora_path"} & schema.get("properties", {}).keys():
                    with_names.add(path)
    assert len(with_names) > 15
    assert with_names - known == set()


def test_paths_without_a_schema_are_known_too(app: Any) -> None:
    paths = edge.read_paths(app, records_experts=True)
    assert {"/tokenize", "/detokenize", "/v1/tokenize"} <= paths.names.keys()
    assert "/dump_expert_distribution_record" not in paths.refused
    assert "/dump_expert_distribution_record" in edge.read_paths(app).refused


def test_no_offered_body_names_a_file(app: Any) -> None:
    """By the words that SGLang has for them; an adapter's folder is looked at when it is loaded."""
    document, paths = app.openapi(), edge.read_paths(app)
    named = set()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            for content in operation.get("requestBody", {}).get("content", {}).values():
                for reference in re.findall(r"#/components/schemas/(\w+)", str(content)):
                    fields = document["components"]["schemas"][reference].get("properties", {})
                    named |= {(path, field) for field in fields if re.search(r"(?:path|file|folder|dir)$", field)}
    left = {
        (path, field) for path, field in named if path not in paths.refused and field not in paths.fields.get(path, ())
    }
    assert {field for _, field in left} == {"lora_path"}
    assert {"/configure_logging", "/start_profile", "/add_external_corpus"} == paths.fields.keys() - paths.names.keys()


def test_adapters_do_not_go_where_there_are_replicas(app: Any) -> None:
    assert "/unload_lora_adapter" in edge.read_paths(app, replicas=2).refused
    assert "/unload_lora_adapter" not in edge.read_paths(app).refused


@pytest.mark.parametrize(("typed", "kept_s"), [(None, 120), ("7", 7)])
def test_connections_stay_longer_than_clients_use_them(
    typed: str | None, kept_s: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.environ import envs

    monkeypatch.setenv(edge.KEEP_ALIVE, typed or "")  # restored afterwards, also where it was not set
    if typed is None:
        monkeypatch.delenv(edge.KEEP_ALIVE)
    edge.keep_connections()
    assert envs.SGLANG_TIMEOUT_KEEP_ALIVE.get() == kept_s


def test_no_endpoint_is_both_offered_and_refused() -> None:
    assert {*ROUTES, *AT_FAULT} & {*REFUSED, *RECORDING} == set()


def test_without_an_admin_key_nobody_stops_changes_or_reads_what_others_do(app: Any) -> None:
    """All that SGLang keeps for administrators, but what a server without keys is documented to offer."""
    off = edge.read_paths(app).admin
    assert {"/pause_generation", "/continue_generation", "/abort_request", "/update_weight_version"} <= off
    assert {"/slow_down", "/set_internal_state", "/configure_logging", "/start_profile", "/get_weights_by_name"} <= off
    assert {"/open_session", "/close_session"} <= off, "of sessions, which SGLang offers to everybody without a bound"
    assert "/scale_elastic_ep" in off, "of a router that SGLang includes"
    assert {"/load_lora_adapter", "/unload_lora_adapter", "/flush_cache"} & off == set()
    assert off & {*edge.read_paths(app).names, "/health", "/ready", "/server_info", "/metrics"} == set()
    assert edge.read_paths(app, has_admin_key=True).admin == frozenset()


@pytest.mark.parametrize(
    ("path", "allowed"), [("/open_session", False), ("/close_session", False), ("/generate", True)]
)
def test_with_an_admin_key_sglang_demands_it_for_sessions(app: Any, path: str, allowed: bool) -> None:
    """SGLang's own decision about a client that has the ordinary key."""
    edge.keep_for_administrators(app)
    scope = {"type": "http", "method": "POST", "path": path, "root_path": "", "headers": []}
    decided = decide_request_auth(
        method="POST",
        path=path,
        authorization_header="Bearer ordinary",
        api_key="ordinary",
        admin_api_key="other",
        auth_level=_get_auth_level_from_app_and_scope(app, scope),
    )
    assert decided.allowed == allowed


@pytest.mark.parametrize("serving", [True, False])
def test_what_a_start_made_is_frozen_where_routes_run(app: Any, serving: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not over HTTP, where a server without keys offers it to nobody; before the first request there is no loop."""
    from sglang.srt.entrypoints import http_server

    loop, ran = asyncio.new_event_loop(), []

    async def freeze_gc() -> None:
        ran.append(asyncio.get_running_loop() is loop)

    manager = SimpleNamespace(event_loop=loop if serving else None, freeze_gc=freeze_gc)
    monkeypatch.setattr(http_server, "_global_state", SimpleNamespace(tokenizer_manager=manager))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        around_freeze_after_warmup(lambda _: pytest.fail("asked over HTTP"), SimpleNamespace())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
    assert ran == [serving]
