"""Types of the fields of SGLang's own requests, where they are within another one.

Trigger: /vertex_generate with `parameters` of other types, as `skip_special_tokens: 1`: SGLang compares the body of
/generate with its contract, but not these parameters, and its scheduler or detokenizer ends of them. Safe because the
same fields are refused on /generate. Remove when SGLang compares them.
"""

from __future__ import annotations

from typing import Any

from kt_sglang.edge.requests import Refused


def require_contract(name: str, fields: Any) -> None:
    """name: the field that has them. Raises Refused."""
    from sglang.srt.entrypoints.api_contract import generate_contract_error

    if fields is not None and (problem := generate_contract_error(fields)) is not None:
        raise Refused(400, name, f"{name}: {problem}")
