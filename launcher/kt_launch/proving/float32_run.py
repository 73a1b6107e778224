"""`python -m kt_launch.proving.float32_run REQUEST.json`: runs the whole model in float32 with transformers on the CPU,
without an adapter and with each. A separate process, since the launcher does not import torch.

It shares only files with the server: transformers reads the checkpoint. An adapter is read by PEFT if PEFT is installed
and reads this kind as it was trained; otherwise W + scale·B·A is computed from the importer's normal form. Each result
is written beside the request as soon as it is known. whole_model.py starts this process and reads the results.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kt_launch.proving.logprobs import TOP
from kt_launch.proving.rounding import Rounded
from kt_model.atomic_file import whole_file
from kt_model.checkpoint import Checkpoint, read_checkpoint
from kt_model.gc_pause import gc_paused
from kt_model.importer import Imported, import_adapter
from kt_model.importer.layouts import RANK_MAJOR
from kt_model.importer.normal import Pair
from kt_model.importer.serving import layout_of, without
from kt_model.installed import version_of
from kt_model.methods import method_of
from kt_model.parent_death import die_with_parent
from kt_model.weights.folder import LayerReader, dequantized

KEPT = 256
"""Most probable tokens recorded for each position."""
NICENESS = 5
"""The server, which is loading at the same time, has priority."""
FAILURE = "failure.txt"
PEFT_READS_ITS_OWN = (0, 19)
"""Since this version, PEFT's files of fused experts have their present layout."""


class NotThere(Exception):
    """transformers cannot run this model, or has no module for a part of an adapter."""


def main(request_file: Path) -> int:
    """Write reference-0.npz for the base, reference-1.npz … for the adapters in order; returns 1 on failure."""
    request, folder = json.loads(request_file.read_text()), request_file.parent
    die_with_parent(request["parent"])
    os.nice(NICENESS)
    torch.set_num_threads(request["threads"])
    try:
        _import_early(peft=bool(request["adapters"]) and version_of("peft") is not None)
        run = Run(request)
        for number, path in enumerate([None, *request["adapters"]]):
            run.write_side(folder / f"reference-{number}.npz", None if path is None else Path(path))
    except Exception as failure:
        traceback.print_exc()
        (folder / FAILURE).write_text(f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}")
        return 1
    return 0


def _import_early(peft: bool) -> None:
    """Import early what a run needs, while there is nothing to garbage-collect; an import that fails here fails again
    there."""
    with gc_paused(), contextlib.suppress(ImportError):
        importlib.import_module("transformers.models.auto.modeling_auto")
        if peft:
            importlib.import_module("peft")


class Run:
    """One model, reloaded after an adapter has changed it. dtype: float32, unless the caller compares with another
    type."""

    def __init__(self, request: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
        self._request = request
        self._dtype = dtype
        self._base = read_checkpoint(Path(request["model"]))
        self._model: Any = None

    def write_side(self, file: Path, adapter: Path | None) -> None:
        """The base, or one adapter."""
        self.write(file, *self.side(adapter))

    def write(self, file: Path, model: Any, how: str) -> None:
        """Record a model's predictions for the prompts."""
        found = [torch.cat(parts).numpy() for parts in zip(*self._prompts(model), strict=True)]
        ids_NM, logprobs_NM, rounded_N = found
        with whole_file(file) as opened:
            np.savez(opened, ids_NM=ids_NM.astype(np.int32), logprobs_NM=logprobs_NM, rounded_N=rounded_N, how=how)

    def side(self, adapter: Path | None) -> tuple[Any, str]:
        """The model with the adapter, and what applied it; '' for the base."""
        model = self._model or self._load()
        self._model = model if adapter is None else None
        return (model, "") if adapter is None else self._adapted(model, adapter)

    def logprobs(self) -> torch.Tensor:
        """(N, V): what the base says at all positions of the prompts."""
        model, _ = self.side(None)
        return torch.cat([_logprobs(model, prompt) for prompt in self._request["prompts"]])

    def _prompts(self, model: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Per prompt: the most probable tokens (N, M), their logprobs, and the error (N,) of the rounded run."""
        for prompt in self._request["prompts"]:
            exact_NV = _logprobs(model, prompt)
            with Rounded(model, integer_rows=self._request["quantized"] is not None):
                rounded_NV = _logprobs(model, prompt)
            logprobs_NM, ids_NM = exact_NV.topk(min(KEPT, exact_NV.shape[1]), dim=-1)
            off_NK = (rounded_NV - exact_NV).gather(1, ids_NM[:, :TOP])
            yield ids_NM, logprobs_NM, off_NK.square().mean(-1).sqrt()

    def _load(self) -> Any:
        from transformers import AutoModelForCausalLM

        options: dict[str, Any] = {"dtype": self._dtype, "local_files_only": True, "trust_remote_code": False}
        options |= {"output_loading_info": True, "experts_implementation": "eager"}
        model, report = AutoModelForCausalLM.from_pretrained(self._request["model"], **options)
        absent = [*report["missing_keys"], *report["mismatched_keys"]]
        if absent:
            raise NotThere(f"the checkpoint has no {absent[0]} for transformers, nor {len(absent) - 1} others")
        if self._request["quantized"] is not None:
            self._dequantize(model)
        return model.eval()

    def _dequantize(self, model: Any) -> None:
        """Replace experts that the server has quantized by the dequantized values."""
        method, folder = method_of(self._request["method"]), Path(self._request["quantized"])
        for layer in self._base.moe_layers:
            reader, weights = LayerReader(folder, layer), _fused(model, layer)
            for expert in range(self._request["resident"], self._base.num_experts):
                arrays = reader.expert(expert)
                for part in ("gate", "up", "down"):
                    place = _place(weights, expert, part)
                    values = dequantized(method, arrays[part], arrays[f"{part}_scale"], place.shape[1])
                    place.copy_(torch.from_numpy(values))

    def _adapted(self, model: Any, folder: Path) -> tuple[Any, str]:
        """The model with the adapter, and what applied it."""
        options = self._request["options"]
        imported = import_adapter(folder, self._base, layout=layout_of(folder, options)).require_sound()
        served = without(imported, tuple(options.get("ignore", ())))
        reason = why_not_peft(imported, len(served.pairs) == len(imported.pairs))
        if not reason:
            with_peft, reason = _with_peft(model, folder)
            if not reason:
                return with_peft, f"PEFT {version_of('peft')}"
            model = self._load()
        for pair in served.pairs.values():
            add(model, pair, self._base)
        return model, f"W + scale·B·A ({reason})"


def _logprobs(model: Any, prompt: list[int]) -> torch.Tensor:
    """(N, V)."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
        return torch.log_softmax(logits.float(), dim=-1)


def why_not_peft(imported: Imported, whole: bool) -> str:
    """Why PEFT is not used; '' if it reads the adapter as it was trained."""
    config = json.loads((imported.path / "adapter_config.json").read_text())
    version = _numbers(str(config.get("peft_version") or ""))
    patterns = config.get("rank_pattern") or config.get("alpha_pattern")
    reasons = {
        "PEFT is not installed": version_of("peft") is None,
        "not PEFT's format": imported.format not in ("A", "B", "C"),
        f"PEFT reads its columns as {RANK_MAJOR}": imported.order is not None and str(imported.order) != RANK_MAJOR,
        "PEFT packs per-expert rsLoRA and patterns with other scales": imported.format == "A"
        and bool(imported.expert_layers)
        and bool(imported.rank_stabilized or patterns),
        f"an older PEFT's layout of fused experts ({config.get('peft_version')})": imported.format in ("B", "C")
        and version < PEFT_READS_ITS_OWN,
        "parts of it are left out": not whole,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numeric parts of a version; a version without any counts as the newest."""
    parts = version.split(".")[:2]
    return tuple(int(part) for part in parts) if version and all(part.isdigit() for part in parts) else (99,)


def _with_peft(model: Any, folder: Path) -> tuple[Any, str]:
    """PEFT's model; or None and why it is not the adapter, since PEFT skips keys that it does not know."""
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    try:
        adapted = PeftModel(model, config, "served")
        loaded = adapted.load_adapter(str(folder), "served", is_trainable=False)
    except (ValueError, KeyError, RuntimeError, TypeError, NotImplementedError) as failure:
        return None, f"PEFT cannot read it: {type(failure).__name__}"
    passed = len(loaded.unexpected_keys) + len(loaded.missing_keys)
    return (None, f"PEFT ignores {passed} of its keys") if passed else (adapted.eval(), "")


def add(model: Any, pair: Pair, base: Checkpoint) -> None:
    """W += ΔW. An embedding is stored transposed, one row per token; an embedding shared with the head is copied
    first."""
    target = pair.target
    with torch.no_grad():
        if target.kind == "routed_experts":
            assert target.layer is not None and target.expert is not None
            _place(_fused(model, target.layer), target.expert, target.projection).add_(torch.from_numpy(pair.delta()))
            return
        if target.kind == "embeddings":
            _untie(model)
        stored = pair.transposed() if target.module == "embed_tokens" else pair
        weights = dict(model.named_parameters())
        weight = weights.get(f"model.{target.module}.weight", weights.get(f"{target.module}.weight"))
        if weight is None:
            raise NotThere(f"transformers' {base.family.name} has no {target.module}")
        weight.add_(torch.from_numpy(stored.delta()))


def _untie(model: Any) -> None:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)


def _fused(model: Any, layer: int) -> Any:
    """A layer's experts: gate_up_proj (E, 2I, H) and down_proj (E, H, I)."""
    experts = getattr(model.model.layers[layer].mlp, "experts", None)
    if not all(isinstance(getattr(experts, name, None), torch.nn.Parameter) for name in ("gate_up_proj", "down_proj")):
        raise NotThere(f"transformers' layer {layer} has no fused experts")
    return experts


def _place(experts: Any, expert: int, projection: str) -> torch.Tensor:
    """(out, in), to be written to."""
    with torch.no_grad():
        if projection == "down":
            down: torch.Tensor = experts.down_proj.data[expert]
            return down
        gate, up = experts.gate_up_proj.data[expert].chunk(2)
        half: torch.Tensor = up if projection == "up" else gate
        return half


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
