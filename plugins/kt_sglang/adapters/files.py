"""How an adapter's files reach SGLang's LoRA code: read and checked by the launcher's importer, at start and at
/load_lora_adapter alike, so that SGLang sees one rank, one scale and names it knows whatever tool wrote them.

Not here: which slot an adapter gets and what a slot does (lora.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from kt_model.contract import LORA_OPTIONS
from kt_model.importer import Imported, import_adapter
from kt_model.importer.admission import WHERE, require_loadable, require_rank
from kt_model.importer.files import iterate_files
from kt_model.importer.serving import config_for_sglang, layout_of, tensors_for_sglang
from kt_model.training import adapter_folder
from kt_sglang.moe.served_checkpoint import served_checkpoint

FileStates = tuple[tuple[str, int, int], ...]
"""Path, time of change and size of each file."""
REPLICATED = "kv_a_proj_with_mqa"
MLA_OWN_NAMES = frozenset({"q_proj", REPLICATED})
"""Modules of MLA without a low-rank q, which SGLang's tables know only as parts of fused modules."""


def around_get_lora_config(original: Callable[..., Any], config: Any, dummy: bool = False) -> dict[str, Any]:
    """AROUND hook of `LoRAConfig.get_lora_config`: returns the configuration of the adapter's normal form."""
    imported = read_served(config.path)
    require_capacity(imported, config.path)
    return config_for_sglang(imported)


def require_capacity(imported: Imported, path: str) -> None:
    """Raise LaunchError for a rank above the server's."""
    from sglang.srt.runtime_context import get_server_args

    require_rank(imported.largest_rank, get_server_args().max_lora_rank, path)


def lora_options() -> dict[str, Any]:
    """The plan's options for adapters that are loaded later."""
    return dict(json.loads(os.environ.get(LORA_OPTIONS, "{}")))


def around_initialize_weights(original: Callable[..., Any], adapter: Any) -> None:
    """AROUND hook of `LoRAAdapter.initialize_weights`: SGLang's own steps, on the normal form's tensors."""
    for tensor in tensors_for_sglang(read_served(adapter.config.path), served_checkpoint()):
        values = torch.from_numpy(tensor.array)
        adapter._process_weight(tensor.name, values.view(torch.bfloat16) if tensor.dtype == "BF16" else values)
    adapter._normalize_weights()


def read_served(path: str) -> Imported:
    """The adapter in normal form, without the parts that the user ignores. Raises LaunchError."""
    folder = adapter_folder(Path(path))
    return _read_served(folder, file_states_of(folder))


def file_states_of(folder: Path) -> FileStates:
    """Identifies the state of an adapter's files."""
    return tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in iterate_files(folder))


def forget_read() -> None:
    """Close the files of the last adapter read."""
    _read_served.cache_clear()


@lru_cache(maxsize=1)  # SGLang reads it twice in a row: the configuration, then the tensors
def _read_served(folder: Path, file_states: FileStates) -> Imported:
    options = lora_options()
    ignore, base = tuple(options.get("ignore", ())), served_checkpoint()
    imported = import_adapter(folder, base, where=WHERE, layout=layout_of(folder, options))
    return require_loadable(imported, base, ignore, bool(options.get("allow_missing")))


def after_unload(result: Any, scheduler: Any, request: Any) -> Any:
    """AFTER hook of `Scheduler.unload_lora_adapter`: the adapter's name is forgotten.

    Trigger: SGLang keeps id and name of every adapter that was ever loaded, for events about the KV cache. Safe because
    an id is not used again (the same name gets another), and they are kept where such events are on, which may name an
    adapter until the cache has dropped its last prefix. Remove when SGLang forgets them.
    """
    if result.success and not scheduler.kv_events_publisher.enable_kv_cache_events:
        scheduler.kv_event_lora_names._adapter_names.pop(request.lora_id, None)
    return result


# MLA without a low-rank q (DeepSeek-V2-Lite). SGLang maps q_proj to qkv_proj and kv_a_proj_with_mqa to the fused
# projection of the larger models; here both exist under their own names, and adapters on them were dropped or crashed.


def name_replicated_modules() -> None:
    """Tell SGLang that every rank has the whole kv_a_proj_with_mqa, which its list of such modules lacks: with several
    ranks, its pool had room for a part of the adapter only. Safe because the list only determines the pool's size.
    Remove when lora/utils.py lists it."""
    from sglang.srt.lora.utils import REPLICATED_LINEAR_LORA_NAMES

    if REPLICATED not in REPLICATED_LINEAR_LORA_NAMES:
        REPLICATED_LINEAR_LORA_NAMES.append(REPLICATED)


@cache
def has_plain_mla() -> bool:
    """Whether the served model has MLA with a single q projection."""
    tensors = served_checkpoint().tensors
    return any(name.endswith(".self_attn.kv_a_proj_with_mqa.weight") for name in tensors) and any(
        name.endswith(".self_attn.q_proj.weight") for name in tensors
    )


def around_get_normalized_target_modules(original: Callable[..., Any], target_modules: str | Iterable[str]) -> Any:
    """AROUND hook: plain MLA's modules keep their names."""
    if isinstance(target_modules, str) or not has_plain_mla():
        return original(target_modules)
    names = list(target_modules)
    own = {name.rpartition(".")[2] for name in names} & MLA_OWN_NAMES
    return original([name for name in names if name.rpartition(".")[2] not in MLA_OWN_NAMES]) | own


def around_normalize_qkv_proj(
    original: Callable[..., Any], adapter: Any, weight_names: list[str], weights: dict[str, torch.Tensor]
) -> None:
    """AROUND hook: plain MLA has no k_proj and v_proj to fuse q_proj with."""
    if not has_plain_mla():
        original(adapter, weight_names, weights)


def around_get_default_hidden_dim(
    original: Callable[..., Any], module_name: str, config: Any, *arguments: Any, **options: Any
) -> Any:
    """AROUND hook: sizes (in, out) of plain MLA's modules."""
    if module_name == "q_proj":
        return config.hidden_size, config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    if module_name == REPLICATED:
        return config.hidden_size, config.kv_lora_rank + config.qk_rope_head_dim
    return original(module_name, config, *arguments, **options)
