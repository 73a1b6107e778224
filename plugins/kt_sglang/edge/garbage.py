"""SGLang's last step of a start, which tells its processes to leave what the start made out of garbage collections."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

ANSWER_S = 10
"""As long as SGLang waits for it."""


def around_freeze_after_warmup(original: Callable[[Any], None], server_args: Any) -> None:
    """AROUND hook of `_freeze_gc_after_server_warmup`: calls what its route calls, in this process.

    Trigger: SGLang asks its own /freeze_gc over HTTP with the configured key. A server without any key offers that
    route to nobody (blocked_routes.py), so nothing was frozen, and its log had a traceback. Safe because it is the
    function behind that route, on the event loop that runs routes; before the first request there is none, and nothing
    else sends. Remove when SGLang does not go through HTTP for it.
    """
    from sglang.srt.entrypoints import http_server

    manager = http_server._global_state.tokenizer_manager
    if manager.event_loop is None:
        asyncio.run(manager.freeze_gc())
    else:
        asyncio.run_coroutine_threadsafe(manager.freeze_gc(), manager.event_loop).result(ANSWER_S)
