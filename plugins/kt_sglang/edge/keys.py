"""What SGLang's check of keys cannot read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def around_decide_request_auth(original: Callable[..., Any], **asked: Any) -> Any:
    """AROUND hook of `decide_request_auth`: a header that is not ASCII counts as none.

    Trigger: SGLang compares keys as text by `secrets.compare_digest`, which raises TypeError for other letters: anybody
    could fill the log with tracebacks, and got 500. Safe because keys in headers are ASCII. Remove when SGLang compares
    bytes.
    """
    header = asked["authorization_header"]
    return original(**asked | {"authorization_header": header if header and header.isascii() else None})
