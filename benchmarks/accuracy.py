"""How far each method's layer is from float32, and how many bits a weight takes: python benchmarks/accuracy.py.

Gaussian weights of one shape here; the demo model's real weights by a sweep of servers, whose results.json --sweep
names:  kt-launch bench -m kt.method=bf16,int8,int4 kt.prepare=true
"""

import argparse
import json
from pathlib import Path
from typing import Any

import host
import torch
from cases import SHAPES, AdapterCase, Shape, Weights, make_batch, reference, relative_l2
from contenders import METHODS, Ours

import kt_kernels

TOKENS = 64


def layer_error(method: str, shape: Shape) -> dict[str, Any]:
    """Relative L2 over all elements of a batch's result, without adapters, against float32 on the bf16 weights."""
    weights = Weights(shape)
    batch = make_batch(shape, TOKENS, AdapterCase("none"), seed=TOKENS)
    ours = Ours(weights, method, "auto", host.cores(), 1, 1)
    error = relative_l2(ours.result(batch, 0), reference(weights, [], batch))
    row = {"method": method, "isa": ours.isa, "shape": shape.name, "experts": shape.experts, "tokens": TOKENS}
    return {**row, "rel_l2": error, "bits_per_weight": stored_bits(method, weights)}


def stored_bits(method: str, weights: Weights) -> float:
    """With scales, as a file holds them."""
    if method == "AMXBF16_SFT":
        return 16.0
    arrays = kt_kernels.quantize_expert(*weights.expert(0), method)
    return 8.0 * sum(array.nbytes for array in arrays.values()) / weights.shape.expert_weights


def real_weights(results: Path) -> list[dict[str, Any]]:
    """Of each finished job with a quality: method, what answered, KL in nats, top-1 agreement."""
    rows = json.loads(results.read_text())
    rows = rows["rows"] if isinstance(rows, dict) else rows
    kept = []
    for row in rows:
        for quality in row.get("quality") or []:
            names = ("target", "tokens", "kl", "top1_agreement", "covered")
            kept.append({"method": row["resolved"]["kt.method"], **{name: quality[name] for name in names}})
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/accuracy.json"))
    parser.add_argument("--shape", default="v2-lite", choices=list(SHAPES))
    parser.add_argument("--experts", type=int, default=16, help="of the shape's, as packing takes long")
    parser.add_argument("--sweep", type=Path, metavar="FILE", help="results.json of the sweep named above")
    options = parser.parse_args()
    torch.set_num_threads(host.cores())
    shape = SHAPES[options.shape].with_experts(options.experts)
    found = {"gaussian": [layer_error(method, shape) for method in METHODS]}
    for row in found["gaussian"]:
        print(f"{row['method']:12} {row['isa']:12} relative L2 {row['rel_l2']:.4f}, {row['bits_per_weight']:.2f} bits")
    if options.sweep:
        found["real"] = real_weights(options.sweep)
        for row in found["real"]:
            print(
                f"{row['method']:12} {row['target']:12} KL {row['kl']['mean']:.2e}, top-1 {row['top1_agreement']:.3f}"
            )
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
