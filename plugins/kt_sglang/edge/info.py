"""What `/server_info` tells: SGLang's arguments as they are, without the keys among them."""

from __future__ import annotations

from typing import Any

from kt_model.redaction import mask_all, secrets_of


def after_build_server_info(result: dict[str, Any], *_: Any, **__: Any) -> dict[str, Any]:
    """AFTER hook of `build_server_info`: *** in the place of every key, in whatever field it stands."""
    return mask_all(result, secrets_of())  # type: ignore[no-any-return]
