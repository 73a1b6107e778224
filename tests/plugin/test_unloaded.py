"""What is kept of an adapter that was unloaded: nothing, in SGLang's own table of names."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kt_sglang.adapters.files import after_unload
from kt_sglang.without_gpu import torchvision_shim


@pytest.mark.parametrize(
    ("events", "success", "kept"),
    [(False, True, None), (True, True, "west"), (False, False, "west")],
    ids=["unloaded", "events about the cache name it", "not unloaded"],
)
def test_its_name_is_forgotten_unless_it_may_still_be_told(events: bool, success: bool, kept: str | None) -> None:
    torchvision_shim.install_if_needed()
    from sglang.srt.mem_cache.events import KvEventLoraNames

    names, identity = KvEventLoraNames(), "5" * 32
    names.register(lora_id=identity, lora_name="west")
    names.register(lora_id="6" * 32, lora_name="east")
    scheduler = SimpleNamespace(
        kv_event_lora_names=names, kv_events_publisher=SimpleNamespace(enable_kv_cache_events=events)
    )
    for _ in range(2):  # the second finds it gone already
        result = SimpleNamespace(success=success)
        assert after_unload(result, scheduler, SimpleNamespace(lora_id=identity)) is result
    assert (names.resolve(identity), names.resolve("6" * 32)) == (kept, "east")
