"""Draws the roofline picture: measured speed against operations per byte, a panel a shape. Needs matplotlib, which only
this file imports."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

COLOURS = {"AMXBF16_SFT": "tab:blue", "AMXINT8_SFT": "tab:orange", "AMXINT4_SFT": "tab:green", "BF16": "tab:gray"}
MARKERS = {"kt_kernels": "o", "torch_loop": "v", "torch_grouped_mm": "^", "kt-kernel": "x"}
ROOFS = {
    "avx512_f32_gflops": "AVX-512 f32",
    "avx512_bf16_gflops": "AVX-512 bf16",
    "avx512_int8_gops": "AVX-512 VNNI int8",
    "amx_bf16_gflops": "AMX bf16",
    "amx_int8_gops": "AMX int8",
}


def draw(records: list[dict[str, Any]], path: Path, title: str) -> None:
    plain = [record for record in records if record["adapter_case"] == "none"]
    if not plain:
        return
    shapes = list(dict.fromkeys(record["shape"] for record in plain))
    figure, axes = pyplot.subplots(1, len(shapes), figsize=(7.5 * len(shapes), 6.5), squeeze=False, sharey=True)
    for axis, shape in zip(axes[0], shapes, strict=True):
        _draw_shape(axis, [record for record in plain if record["shape"] == shape])
    axes[0][0].set_ylabel("GFLOP/s or GOP/s")
    figure.suptitle(f"{title}, {plain[0]['threads']} threads")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_shape(axis: Axes, records: list[dict[str, Any]]) -> None:
    rates = {name: max(record["peaks"].get(name, 0.0) for record in records) for name in {"read_gbs", *ROOFS}}
    intensities = [_intensity(record) for record in records]
    left, right = min(intensities) / 2, max(intensities) * 3
    for name, label in ROOFS.items():
        if rates[name] > 0:
            ridge = rates[name] / rates["read_gbs"]
            axis.plot(
                [left, ridge, right], [left * rates["read_gbs"], rates[name], rates[name]], color="black", linewidth=0.8
            )
            axis.annotate(f"{label} {rates[name]:.0f}", (right, rates[name]), ha="right", va="bottom", fontsize=8)
    axis.annotate(
        f"read {rates['read_gbs']:.1f} GB/s", (left, left * rates["read_gbs"]), rotation=0, va="bottom", fontsize=8
    )
    for impl, method in dict.fromkeys((_impl(record), record["method"]) for record in records):
        points = _best_points(records, impl, method)
        speeds = [record["gflops"] for record in points]
        style: dict[str, Any] = {
            "color": COLOURS[method],
            "marker": MARKERS.get(impl, "s"),
            "alpha": 1.0 if impl == "kt_kernels" else 0.55,
        }
        axis.plot([_intensity(record) for record in points], speeds, linewidth=1.0, label=f"{impl} {method}", **style)
        if impl == "kt_kernels":
            for record in points:
                axis.annotate(
                    record["tokens"],
                    (_intensity(record), record["gflops"]),
                    fontsize=7,
                    xytext=(3, -9),
                    textcoords="offset points",
                )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(left, right)
    axis.set_xlabel("operations per byte of distinct experts (numbers at ours: tokens)")
    axis.set_title(records[0]["shape"] + (" (noisy)" if any(record["noisy"] for record in records) else ""))
    axis.grid(True, which="both", linewidth=0.3)
    axis.legend(fontsize=8, loc="lower right")


def _impl(record: dict[str, Any]) -> str:
    return str(record["impl"]).partition("@")[0]


def _intensity(record: dict[str, Any]) -> float:
    return float(record["gflops"] / record["weight_gbs"])


def _best_points(records: list[dict[str, Any]], impl: str, method: str) -> list[dict[str, Any]]:
    """The fastest of a token count, where it ran with several thread counts or in several comparisons."""
    best: dict[int, dict[str, Any]] = {}
    for record in records:
        if _impl(record) == impl and record["method"] == method:
            known = best.get(record["tokens"])
            if known is None or record["ms"] < known["ms"]:
                best[record["tokens"]] = record
    return [best[tokens] for tokens in sorted(best)]
