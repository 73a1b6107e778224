"""Counts messages that a scheduler sends to the detokenizer, and those that come back to the main process. The launcher
compares both: a hung detokenizer does not keep schedulers from answering, but blocks every client.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

ANSWERED = frozenset({"BatchTokenIDOutput", "BatchEmbeddingOutput"})
"""Messages to the detokenizer that it answers with one each."""
_counts: Counter[str] = Counter()


def sent() -> int:
    """Sent by this process, a scheduler."""
    return _counts["sent"]


def received() -> int:
    """Received by this process, which serves HTTP."""
    return _counts["received"]


def around_send_output(original: Callable[..., Any], sender: Any, output: Any, *others: Any, **more: Any) -> Any:
    """AROUND hook of `SenderWrapper.send_output`. Of several ranks, only one has a socket."""
    if sender.socket is not None and type(output).__name__ in ANSWERED:
        _counts["sent"] += 1
    return original(sender, output, *others, **more)


def around_handle_batch_output(original: Callable[..., Any], manager: Any, output: Any) -> Any:
    """AROUND hook of `TokenizerManager._handle_batch_output`."""
    _counts["received"] += 1
    return original(manager, output)
