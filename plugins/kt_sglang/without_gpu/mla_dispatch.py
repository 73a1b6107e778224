"""DeepSeek's MLA on the torch_native attention backend.

Trigger: torch_native has no handler of its own, SGLang falls back to triton's, which picks a multi-head prefill that
torch_native cannot serve from the latent KV pool. Safe because absorbed MLA is what torch_native implements.
Remove when SGLang registers a handler for torch_native (models/deepseek_common/attention_backend_handler.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def around_get_handler(original: Callable[..., Any], registry: Any, backend_name: str) -> Any:
    """AROUND hook of a classmethod: SGLang's registry passes the raw function and the class."""
    return _absorbed_mla if backend_name == "torch_native" else original(registry, backend_name)


def _absorbed_mla(attention: Any, forward_batch: Any) -> Any:
    from sglang.srt.models.deepseek_common.attention_backend_handler import _dispatch_mla_subtype

    return _dispatch_mla_subtype(attention, forward_batch)
