"""Child processes reach this machine directly, also where the environment names a proxy. A server that is asked so
starts in tests/edge/test_served.py, several behind a router in tests/cluster/test_behind_router.py."""

from __future__ import annotations

import os

import pytest
import requests.utils

from kt_launch.watching.client import without_proxy

OWN = "localhost,127.0.0.1,::1"


@pytest.mark.parametrize("environ", [{}, {"no_proxy": "a"}, {"http_proxy": ""}, {"proxy": "http://p"}])
def test_where_there_is_no_proxy_nothing_is_set(environ: dict[str, str]) -> None:
    assert without_proxy(environ, ["http://10.0.0.1:30000"]) == {}


@pytest.mark.parametrize("name", ["http_proxy", "HTTPS_PROXY", "all_proxy"])
def test_what_is_excepted_already_stays_so(name: str) -> None:
    environ = {name: "http://p:3128", "no_proxy": "a, .b", "NO_PROXY": "a,c"}
    expected = f"a,.b,c,{OWN},10.0.0.1,fe80::1"
    found = without_proxy(environ, ["http://10.0.0.1:30000", "http://[fe80::1]:30000", "http://127.0.0.1:1"])
    assert found == {"no_proxy": expected, "NO_PROXY": expected}


@pytest.mark.parametrize("url", ["http://127.0.0.1:30000", "http://10.0.0.1:30000", "http://node7:30000"])
def test_sglangs_client_takes_them_so(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("http_proxy", "http://p:3128")
    assert requests.utils.get_environ_proxies(url) == {"http": "http://p:3128"}
    for name, value in without_proxy({"http_proxy": "http://p:3128"}, [url]).items():
        monkeypatch.setenv(name, value)
    assert requests.utils.get_environ_proxies(url) == {}
