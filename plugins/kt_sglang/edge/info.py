"""What `/server_info` returns: SGLang's arguments without their keys, and how much came back from the detokenizer."""

from __future__ import annotations

from typing import Any

from kt_model.contract import OUTPUTS_RECEIVED
from kt_model.redaction import mask_all, secrets_of
from kt_sglang.process import outputs


def after_build_server_info(result: dict[str, Any], server_args: Any, *_: Any, **__: Any) -> dict[str, Any]:
    """AFTER hook of `build_server_info`: every key is replaced by ***, in any field. With several HTTP processes, none
    knows what came back to all of them."""
    shown: dict[str, Any] = mask_all(result, secrets_of())
    known = server_args.tokenizer_worker_num == 1
    return {**shown, OUTPUTS_RECEIVED: outputs.received() if known else None}
