"""Measures the expert kernels against the machine's limits, torch and kt-kernel: python benchmarks/run.py --help.

A run: for each shape, method and set of adapters a group of cells, between two measurements of the machine's peaks.
What is measured is in cases.py, how turns are taken in rounds.py; docs/performance.md says what came out.
"""

import argparse
import json
import shlex
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import conditions
import host
import loading
import peaks
import torch
from cases import SHAPES, AdapterCase, Lora, Shape, Weights, parse_adapters
from cell import HEADER, Cell, Record, References, disturbed, show
from contenders import METHODS, Contender, Ours, TorchGrouped, TorchLayers, TorchLoop, buildable_methods, loras_of
from peer import Peer, PeerFailed
from rounds import Ratio

POOL_OVER_L3 = 10
MOST_LAYERS = 12  # enough for the smallest method of the real shapes
FULL = {
    "shapes": "v2-lite,qwen3-30b,v3",
    "tokens": "1,4,16,64,256,1024",
    "adapters": "none,1x8,1x16,1x64,8x16,8xmixed,8x16idle",
    "torch": "all",
    "cell_s": 4.0,
    "limit_s": float("inf"),
}
QUICK = {
    "shapes": "v2-lite",
    "tokens": "1,16,64,256,1024",
    "adapters": "none,1x16",
    "torch": "bf16",
    "cell_s": 0.8,
    "limit_s": 130.0,  # of three minutes; the rest is for what has begun, on a machine that is busy
    "distinct": 16,
}
FRESH_S = 10.0  # peaks younger than that need not be measured again


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="one shape and few adapters, within three minutes")
    add("--json", type=Path, default=Path("benchmarks/results/run.json"), help="records; beside it .run.json and .png")
    add("--shapes", help=f"of {', '.join(SHAPES)} (full run: {FULL['shapes']})")
    add("--tokens", help=f"(full run: {FULL['tokens']})")
    add("--adapters", help=f"none, COUNTxRANK, COUNTxmixed, also with idle behind it (full run: {FULL['adapters']})")
    add("--methods", help="default: all that this build offers")
    add("--isa", default="auto")
    add("--threads", type=int, default=host.cores(), help="default: the cores that this process may use")
    add("--nodes", type=int, default=1, help="sub-pools of ours")
    add("--kt-kernel", type=Path, metavar="DIR", help="kt_kernel/_kt_kernel_ext_*.so and kt_kernel.libs of its wheel")
    add(
        "--torch",
        choices=["all", "bf16", "none"],
        help="methods to run torch beside (full run: all, quick: bf16)",
    )
    add("--cell-s", type=float, help="seconds of rounds a cell (full run: 4, quick: 0.8)")
    add("--limit-s", type=float, help="no cell starts after so many seconds (full run: never, quick: 130)")
    add("--once", action="store_true", help="what is in doubt is marked, not measured again")
    add("--memory-gb", type=float, help="for all weights together (default: 0.65 of what is available)")
    add("--distinct", type=int, help="experts of different content, if packing takes long (full run: all, quick: 16)")
    add("--conditions-only", action="store_true", help="only what the options below ask for")
    add("--scaling", action="store_true", help="1 … N threads")
    add("--competing", action="store_true", help="one competing busy thread")
    add("--overhead", action="store_true", help="microseconds of a call that computes next to nothing")
    add("--load", action="store_true", help="rate and peak memory of packing, and of mapping a packed file")
    add("--phases", action="store_true", help="shares of a forward's phases")
    add("--launcher", action="store_true", help="only kt-launch: a plan, a completion, the start beside stock SGLang's")
    add("--soak", type=int, default=0, metavar="N", help="memory growth over N forwards")
    add("--everything", action="store_true", help="all of these, --soak 20000")
    arguments = with_defaults(parser.parse_args())
    try:
        validate(arguments)
    except ValueError as mistake:
        parser.error(str(mistake))
    return arguments


def validate(arguments: argparse.Namespace) -> None:
    """Raises ValueError naming the option, before anything is measured."""
    for shape in arguments.shapes.split(","):
        if shape not in SHAPES:
            raise ValueError(f"--shapes: {shape!r} is none of {', '.join(SHAPES)}")
    for text in arguments.adapters.split(","):
        parse_adapters(text)
    for text in arguments.tokens.split(","):
        if not text.isdigit() or int(text) < 1:
            raise ValueError(f"--tokens: {text!r} is not a number from 1")
    for method in (arguments.methods or METHODS[0]).split(","):
        if method not in METHODS:
            raise ValueError(f"--methods: {method!r} is none of {', '.join(METHODS)}")


def with_defaults(arguments: argparse.Namespace) -> argparse.Namespace:
    for name, value in (QUICK if arguments.quick else FULL).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    arguments.conditions_only |= arguments.launcher
    if arguments.everything:
        for name in ("scaling", "competing", "overhead", "load", "phases", "launcher"):
            setattr(arguments, name, True)
        arguments.soak = arguments.soak or 20_000
    return arguments


TorchAny = TorchLoop | TorchGrouped


@dataclass
class Run:
    """What the whole run shares: its options, the clock, and what it has found so far, written after every group."""

    options: argparse.Namespace
    start: float = field(default_factory=time.monotonic)
    records: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    conditions: dict[str, Any] = field(default_factory=dict)
    failed: bool = False

    def __post_init__(self) -> None:
        self.methods = (
            self.options.methods.split(",") if self.options.methods else buildable_methods(1, self.options.isa)
        )
        self.facts = host.facts()
        self.deadline = self.start + self.options.limit_s
        self.drift = 0.0
        self.peaks = self.peaks_now()
        self.read_rate = peaks.ReadRate(self.options.threads, megabytes=stream_megabytes())

    @property
    def left_s(self) -> float:
        return float(self.deadline - time.monotonic())

    def share_time(self, parts: int) -> None:
        """Leaves each of so many parts that still come an equal share of what is left."""
        end = self.start + self.options.limit_s
        self.deadline = end - (end - time.monotonic()) * (parts - 1) / parts if end < float("inf") else end

    def peaks_now(self) -> peaks.Peaks:
        found = peaks.measure(self.options.threads, megabytes=stream_megabytes())
        self.peaks_at = time.monotonic()
        return found

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(f"  note: {text}", flush=True)

    def measure_peaks(self, ours: Ours) -> peaks.Peaks:
        """The better of now and before; afterwards `drift` says how far they are apart."""
        before, self.peaks = self.peaks, self.peaks_now()
        self.drift = self.peaks.drift(before, ours.method, ours.isa)
        return self.peaks.best(before)

    def write(self) -> None:
        """Whole files only, so that a reader never finds half of one."""
        about = {
            "command": shlex.join(sys.argv),
            "host": self.facts,
            "seconds": time.monotonic() - self.start,
            "notes": self.notes,
        }
        path: Path = self.options.json
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, self.records)
        _write(path.with_suffix(".run.json"), {**about, "peaks": self.peaks.rates, "conditions": self.conditions})


def stream_megabytes() -> int:
    """Too much for the caches."""
    return max(256, POOL_OVER_L3 * host.l3_bytes() // host.MIB)


def _write(path: Path, content: Any) -> None:
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(_lines(content) + "\n")
    unfinished.rename(path)


def _lines(content: Any) -> str:
    """A record a line, with as many digits as mean something."""
    if not isinstance(content, list):
        return json.dumps(_rounded(content), indent=1)
    return "[\n" + ",\n".join(json.dumps(_rounded(record)) for record in content) + "\n]"


def _rounded(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _rounded(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_rounded(value) for value in content]
    return float(f"{content:.5g}") if isinstance(content, float) else content


@dataclass(frozen=True)
class Room:
    """How many layers each contender holds, so that a pool is ten times the L3 cache where memory allows."""

    ours: int
    torch: int
    peer: int


PACKED = {"AMXBF16_SFT": 1.0, "AMXINT8_SFT": 0.5, "AMXINT4_SFT": 0.28}  # of the bf16 size


def plan_room(shape: Shape, method: str, options: argparse.Namespace, lora_bytes: int) -> Room:
    """Cuts the largest first where memory is short."""
    bf16, packed = shape.bf16_bytes, int(shape.bf16_bytes * PACKED[method])
    peer_layer = packed * (2 if lora_bytes else 1)  # kt-kernel keeps a second pack of the weights with adapters
    peers = min(options.threads, 2) if options.kt_kernel else 0
    layer = {"ours": packed + lora_bytes, "torch": bf16 * (options.torch != "none"), "peer": peer_layer * peers}
    size = {"ours": packed, "torch": bf16, "peer": packed}
    pool = POOL_OVER_L3 * host.l3_bytes()
    layers = {name: max(1, min(MOST_LAYERS, -(-pool // size[name]))) for name in size}
    left = memory_bytes(options) - peers * bf16  # each peer keeps what it packed from
    while sum(layers[name] * layer[name] for name in layers) > left and max(layers.values()) > 1:
        layers[max((name for name in layers if layers[name] > 1), key=lambda name: layers[name] * layer[name])] -= 1
    return Room(**layers)


def memory_bytes(options: argparse.Namespace) -> float:
    return float(options.memory_gb * 1e9) if options.memory_gb else 0.65 * host.available_bytes()


def fit_shape(shape: Shape, options: argparse.Namespace) -> Shape:
    """Fewer experts where one layer of every contender is more than memory holds."""
    copies = 1 + (options.torch != "none") + (2 * 3 if options.kt_kernel else 0)
    experts = shape.experts
    while experts > 2 * shape.top_k and copies * shape.with_experts(experts).bf16_bytes > memory_bytes(options):
        experts //= 2
    return shape.with_experts(experts)


class ShapeRun:
    """All groups of one shape: torch's layers are loaded once, ours once a method."""

    def __init__(self, run: Run, shape: Shape) -> None:
        self.run, self.options = run, run.options
        self.shape = fit_shape(shape, run.options)
        if self.shape.experts < shape.experts:
            run.note(
                f"{shape.name}: {self.shape.experts} of {shape.experts} experts, as memory allows; each hit more often"
            )
        self.weights = Weights(self.shape, distinct=run.options.distinct)
        self.references = References(self.weights)
        self.torch_layers: TorchLayers | None = None

    def measure(self) -> None:
        for number, method in enumerate(self.run.methods):
            self.methods_left = len(self.run.methods) - number
            self.run.share_time(self.methods_left)
            if self.run.left_s < 0:
                self.run.note(f"{self.shape.name} {method}: left out, the time is up")
            else:
                self.measure_method(method)

    def measure_method(self, method: str) -> None:
        cases = [parse_adapters(text) for text in self.options.adapters.split(",")]
        most_lora = max((sum(lora_bytes(self.shape, case)) for case in cases), default=0)
        room = plan_room(self.shape, method, self.options, int(most_lora))
        ours = self.load_ours(method, room.ours)
        torch_contenders = self.load_torch(method, room.torch)
        for number, case in enumerate(cases):
            self.run.share_time(self.methods_left * len(cases) - number)
            if self.run.left_s < 0:
                self.run.note(f"{self.shape.name} {method} adapters {case.name}: left out, the time is up")
            else:
                self.measure_adapters(ours, torch_contenders, case, room.peer)
        ours.close()

    def load_ours(self, method: str, layers: int) -> Ours:
        """A quick run loads as many layers as its time allows."""
        options = self.options
        ours = Ours(self.weights, method, options.isa, options.threads, options.nodes, 1)
        allowed_s = min(8.0 if options.quick else 120.0, self.run.left_s / 4)
        while ours.layers < layers and ours.load_s * (ours.layers + 1) < allowed_s:
            ours.add_layer(self.weights)
        ours.all_loaded()
        if ours.layers < layers:
            held = f"{ours.layers} of {layers} layers"
            self.run.note(f"{self.shape.name} {method}: {held}, packing one takes {ours.load_s:.1f} s")
        return ours

    def load_torch(self, method: str, layers: int) -> list[TorchAny]:
        if self.options.torch == "none" or (self.options.torch == "bf16" and "BF16" not in method):
            return []
        if self.torch_layers is None:
            self.torch_layers = TorchLayers(self.weights, layers)
        return [make(self.torch_layers, self.shape, self.options.threads) for make in (TorchLoop, TorchGrouped)]

    def load_peers(self, method: str, case: AdapterCase, layers: int, most_tokens: int) -> list[Peer]:
        """With N and with N-1 threads, since it waits busily with one thread more than it is given."""
        folder: Path | None = self.options.kt_kernel
        peers: list[Peer] = []
        if folder is None or not Peer.supports(case):
            return peers
        for threads in sorted({max(1, self.options.threads - 1), self.options.threads}, reverse=True):
            try:
                peers.append(
                    Peer(folder, self.shape, method, case, threads, layers, most_tokens, self.weights.distinct)
                )
            except (PeerFailed, OSError) as failure:
                self.run.note(str(failure))
        return peers

    def measure_adapters(
        self, ours: Ours, torch_contenders: list[TorchAny], case: AdapterCase, peer_layers: int
    ) -> None:
        loras = loras_of(self.shape, case)
        token_counts = [int(text) for text in self.options.tokens.split(",")]
        others: list[Contender] = []
        for contender in torch_contenders:
            contender.weights.loras = loras
            if not case.count or (isinstance(contender, TorchLoop) and "BF16" in ours.method and not case.idle):
                others.append(contender)
        peers = self.load_peers(ours.method, case, peer_layers, max(token_counts))
        try:
            ours.set_adapters(loras)
            cells = [self.cell(ours.method, case, tokens, loras) for tokens in token_counts]
            self.measure_group(cells, ours, [*others, *peers])
        finally:
            ours.clear_adapters(case.count)
            for peer in peers:
                peer.close()

    def cell(self, method: str, case: AdapterCase, tokens: int, loras: list[Lora]) -> Cell:
        return Cell(self.shape, method, case, tokens, loras, self.weights.distinct)

    def measure_group(self, cells: list[Cell], ours: Ours, others: list[Contender]) -> None:
        """Again, once, when the machine's peaks moved meanwhile or a cell was disturbed; what is then still in doubt is
        marked."""
        if time.monotonic() - self.run.peaks_at > FRESH_S:
            self.run.measure_peaks(ours)
        started = time.monotonic()
        kept = self.measure_cells(cells, ours, others)
        best = self.run.measure_peaks(ours)
        doubt = self.doubt(kept)
        if doubt and not self.options.once and 2 * (time.monotonic() - started) < self.run.left_s:
            self.run.note(f"{cells[0]} …: {doubt}, group discarded and measured again")
            kept = self.measure_cells(cells, ours, others)
            best = self.run.measure_peaks(ours)
            doubt = self.doubt(kept)
        if doubt:
            self.run.note(f"{cells[0]} …: {doubt}, marked as noisy")
        noisy = self.run.drift > peaks.DRIFT_LIMIT
        for cell, records in kept:
            cell.add_limits(records, best, self.run.drift, noisy)
            self.run.records.extend(records)
            for record in records:
                print(show(record), flush=True)
        self.run.write()

    def doubt(self, kept: list[tuple[Cell, list[Record]]]) -> str:
        """Why a group's times are not to be trusted; nothing if they are."""
        if self.run.drift > peaks.DRIFT_LIMIT:
            return f"peaks moved by {100 * self.run.drift:.0f} %"
        tokens = [str(cell.tokens) for cell, records in kept if any(disturbed(record) for record in records)]
        return f"A/A pairs unequal at {', '.join(tokens)} tokens" if tokens else ""

    def measure_cells(self, cells: list[Cell], ours: Ours, others: list[Contender]) -> list[tuple[Cell, list[Record]]]:
        kept, limits = [], (self.run.read_rate, self.run.peaks)
        for number, cell in enumerate(cells):
            if self.run.left_s < 0:
                self.run.note(f"{cell}: left out, the time is up")
                continue
            cell.refused.clear()
            # Half of the cell's share: checking and the first call of each contender take time, too.
            most_s = self.run.left_s / (len(cells) - number) / 2
            try:
                found = cell.measure(ours, others, self.references, self.options.cell_s, most_s, limits)
                kept.append((cell, found))
            except Exception as failure:  # one cell that fails must not cost the others their results
                self.run.failed = True
                self.run.note(f"{cell}: failed: {failure}")
            for text in cell.refused:
                self.run.failed |= f": {ours.impl} " in text
                self.run.note(text)
            others = [other for other in others if other not in cell.slow]  # nor at more tokens
        return kept


def lora_bytes(shape: Shape, case: AdapterCase) -> list[int]:
    return [6 * rank * (shape.hidden + shape.intermediate) * shape.experts for rank in case.ranks]


def measure_conditions(run: Run) -> None:
    """Each in its own right: one that fails is noted, the others go on."""
    options, shape = run.options, fit_shape(SHAPES[run.options.shapes.split(",")[0]], run.options)
    threads, isa, methods, budget_s = options.threads, options.isa, run.methods, min(options.cell_s, 2.0)
    steps: dict[str, tuple[bool, Callable[[], Any]]] = {
        "scaling": (
            options.scaling,
            lambda: conditions.scaling(shape, methods, isa, threads, [1, 64, 1024], budget_s),
        ),
        "competing": (options.competing, lambda: measure_competing(run, shape, budget_s)),
        "overhead": (options.overhead, lambda: conditions.overhead(methods, isa, threads)),
        "load": (options.load, lambda: [_load(run, shape, method) for method in methods]),
        "phases": (options.phases, lambda: conditions.phases(shape, methods, isa, threads, [1, 64, 1024])),
        "launcher": (options.launcher, measure_launcher),
        "soak": (options.soak > 0, lambda: conditions.soak(methods, isa, threads, options.soak)),
    }
    for name, (wanted, measure) in steps.items():
        if not wanted:
            continue
        try:
            run.conditions[name] = measure()
            print(f"{name}:", *(json.dumps(row) for row in run.conditions[name]), sep="\n  ", flush=True)
        except Exception:  # as above
            run.failed = True
            run.note(f"{name}: failed: {traceback.format_exc(limit=-1)}")
        run.write()


def _load(run: Run, shape: Shape, method: str) -> dict[str, Any]:
    return loading.measure(shape, method, run.options.isa, run.options.threads)


def measure_launcher() -> list[dict[str, Any]]:
    import launch_times  # needs the installed kt-launch, which a machine that only measures kernels may lack

    return launch_times.measure()


def measure_competing(run: Run, shape: Shape, budget_s: float) -> list[dict[str, Any]]:
    options, weights = run.options, Weights(shape, run.options.distinct)
    contenders: list[Contender] = [
        Ours(weights, method, options.isa, options.threads, options.nodes, 1) for method in run.methods
    ]
    if options.torch != "none":
        contenders.append(TorchLoop(TorchLayers(weights, 1), shape, options.threads))
    if options.kt_kernel:
        none = AdapterCase("none")
        contenders.append(
            Peer(options.kt_kernel, shape, run.methods[0], none, options.threads, 1, 64, weights.distinct)
        )
    try:
        return conditions.competing(contenders, shape, [1, 64], budget_s)
    finally:
        for contender in contenders:
            contender.close()


def print_summary(run: Run) -> None:
    """Ratios of others over ours, the better thread count of kt-kernel only."""
    print("\nhow many times as long as ours, median (quartiles):")
    best: dict[tuple[Any, ...], Record] = {}
    for record in run.records:
        if "over_ours" not in record:
            continue
        name = record["impl"].partition("@")[0]
        key = record["shape"], record["cell_method"], record["adapter_case"], record["tokens"], name
        if key not in best or record["ms"] < best[key]["ms"]:
            best[key] = record
    for (shape, method, adapters, tokens, name), record in best.items():
        print(f"  {shape:9} {method:11} {adapters:8} {tokens:5} {name:16} {Ratio(**record['over_ours'])}")


def draw(run: Run) -> None:
    picture = run.options.json.with_suffix(".png")
    try:
        import roofline  # matplotlib is optional
    except ImportError as missing:
        run.note(f"no roofline picture: {missing}; pip install matplotlib")
        return
    roofline.draw(run.records, picture, run.facts["cpu"])
    print(f"roofline: {picture}")


def main() -> int:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    run = Run(options)
    isas = ", ".join(run.facts["isas"])
    print(f"{run.facts['cpu']}, {options.threads} threads; kt_kernels {isas}; torch {run.facts['torch']}")
    print("peaks:", ", ".join(f"{name} {rate:.1f}" for name, rate in run.peaks.rates.items()))
    print(HEADER)
    for name in [] if options.conditions_only else options.shapes.split(","):
        try:
            ShapeRun(run, SHAPES[name]).measure()
        except Exception:  # a shape that fails must not cost the others their results
            run.failed = True
            run.note(f"{name}: failed: {traceback.format_exc(limit=-2)}")
    measure_conditions(run)
    if run.records:
        print_summary(run)
        draw(run)
    run.read_rate.close()
    run.write()
    print(f"records: {options.json}")
    return 1 if run.failed or not (run.records or run.conditions) else 0


if __name__ == "__main__":
    sys.exit(main())
