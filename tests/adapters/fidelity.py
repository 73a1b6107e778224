"""What is served against what transformers computes in float32: every family, with its own output head or one that is
the embedding, in one file or oddly on the disk, the base and an adapter of each layout. test_families_served.py runs
some of it; `make fidelity` runs all of it and writes docs/fidelity.md.

The reference is read from the checkpoint as hubs have it, whatever the server's disk holds; its adapters are PEFT's, of
every layout (twins.py): nothing of the importer is in it.
"""

from __future__ import annotations

import shutil
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from float8_checkpoints import write_float8
from fused_checkpoints import fuse, save_fused
from launching import Running, launched
from odd_checkpoints import consolidated, left_over_shard, split
from safetensors.torch import load_file, save_file
from tiny_checkpoints import FAMILIES, VOCABULARY, write_checkpoint
from twins import with_peft, write_twin
from written import (
    write_converted,
    write_fused,
    write_grouped,
    write_kt_training,
    write_per_expert,
    write_stacked,
    write_wrapped,
)

from kt_launch.proving.agreement import Reference, compare
from kt_launch.proving.asking import LENGTHS, TOP, Answer, ask
from kt_launch.proving.float32_run import Run
from kt_model.checkpoint import read_checkpoint
from kt_model.experts import ExpertSource
from kt_model.families import FAMILIES as ROWS
from kt_model.weights.merging import merge

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "fidelity.md"
INTRODUCTION = """What a client gets, compared with the whole model in float32. Tiny checkpoints of random weights
(three layers, eight experts, written by transformers) are served with the experts in bfloat16, and each adapter is
loaded into the running server. Eight prompts of random token ids, 24 to 200 tokens long, are sent. Each number is the
error of a logprob in nats: at one position the root mean square over the server's 20 most probable tokens, over several
positions the median. The reference is transformers in float32 with PEFT; layouts that are not PEFT's own are
translated for it by `tests/adapters/twins.py`. The second number of a pair is transformers with PEFT in bfloat16 on
the same prompts: what the number format alone costs. Unusual checkpoints also have unusual sizes, such as experts of
width 8, 40, 100 and 176."""
SUMMARY = """The server is {ratio:.2f} times as far off as transformers in bfloat16, in the median of {count}
comparisons. The tests hold each of them, and the launcher holds every server before it is called ready, to the bounds
derived in `launcher/kt_launch/proving/agreement.py`."""
BASE = "base"
SIZE = 0.12
"""Of B: deltas of about the base's own size. With larger ones transformers in bfloat16 is far off as well."""
MOST_RANK, EXPERTS = 8, 8
ATTENTION = (".q_proj", ".k_proj", ".v_proj", ".o_proj", ".q_a_proj", ".q_b_proj", ".kv_a_proj_with_mqa", ".kv_b_proj")
RNG = torch.Generator().manual_seed(11)
PROMPTS = [torch.randint(0, VOCABULARY, (length,), generator=RNG).tolist() for length in LENGTHS]
LAST_TOKENS = np.cumsum(LENGTHS) - 1
NO_OTHERS = np.zeros((0, 0), np.float32)

Weights = dict[str, torch.Tensor]
OnDisk = Callable[[Path, Path, dict[str, Any]], tuple[Path, Weights]]


# ---- how a checkpoint lies on the disk: from one as hubs have it, the folder and what is served under hubs' names


def one_file(hub: Path, folder: Path, changes: dict[str, Any]) -> tuple[Path, Weights]:
    """As hubs have it, single experts in one file."""
    return Path(shutil.copytree(hub, folder)), load_file(hub / "model.safetensors")


def saved_fused(hub: Path, folder: Path, changes: dict[str, Any]) -> tuple[Path, Weights]:
    """As transformers 5 saves it in its own format, in its own words."""
    return save_fused(hub.parent.name, folder, **changes), load_file(hub / "model.safetensors")


def transposed_in_shards(hub: Path, folder: Path, changes: dict[str, Any]) -> tuple[Path, Weights]:
    """Experts fused as (in, out), gate_up_proj and down_proj in different shards."""
    shutil.copytree(hub, folder)
    fuse(folder, transposed=True)
    split(folder)
    return folder, load_file(hub / "model.safetensors")


def beside_all_weights_once_more(hub: Path, folder: Path, changes: dict[str, Any]) -> tuple[Path, Weights]:
    """In shards beside a consolidated file with wrong values; the folder's name is one that patterns are made of."""
    folder = shutil.copytree(hub, folder.with_name("model [1]*"))
    consolidated(folder)
    return folder, load_file(hub / "model.safetensors")


def beside_an_earlier_shard(hub: Path, folder: Path, changes: dict[str, Any]) -> tuple[Path, Weights]:
    """In shards beside one with wrong values that the index does not name."""
    shutil.copytree(hub, folder)
    left_over_shard(folder)
    return folder, load_file(hub / "model.safetensors")


def merged_from_float8(hub: Path, folder: Path, changes: dict[str, Any]) -> tuple[Path, Weights]:
    """What action=merge makes of a float8 checkpoint with a scale a tensor."""
    float8 = folder.with_name("float8")
    exact = write_float8("autofp8", hub, float8)
    assert merge(ExpertSource(read_checkpoint(float8, float8=True)), None, folder)
    return folder, {name: tensor.to(torch.bfloat16) for name, tensor in exact.items()}


ODD: Mapping[str, OnDisk] = {
    "deepseek_v2": beside_an_earlier_shard,
    "deepseek_v3": saved_fused,
    "glm4_moe": beside_all_weights_once_more,
    "mixtral": saved_fused,
    "qwen2_moe": merged_from_float8,
    "qwen3_moe": transposed_in_shards,
}
SIZES: Mapping[str, dict[str, Any]] = {
    "deepseek_v2": {"moe_intermediate_size": 40},
    # as Moonlight: no scaling of positions
    "deepseek_v3": {"rope_scaling": None, "rope_theta": 50000.0, "moe_intermediate_size": 40, "intermediate_size": 90},
    "glm4_moe": {"moe_intermediate_size": 8},
    "mixtral": {"intermediate_size": 100},
    "qwen2_moe": {"moe_intermediate_size": 176, "shared_expert_intermediate_size": 184},
    "qwen3_moe": {},
}
"""Of the config.json of what lies oddly: expert widths that are no multiple of 32, and others than the usual."""
WAYS = tuple(dict.fromkeys((one_file, *ODD.values())))


# ---- adapters


def write_adapters(folder: Path, family: str, checkpoint: Path) -> dict[str, Path]:
    """One of each layout, by name; `everything` reaches each matrix that SGLang has LoRA on in this family."""
    parts = ROWS[family].projections
    experts = [f".experts.{expert}.{part}" for expert in range(EXPERTS) for part in parts]
    dense = [f".{place}.{part}" for place in ("mlp", "shared_experts", "shared_expert") for part in parts]
    ends = [*experts, *dense, *ATTENTION, "embed_tokens", "lm_head"]
    pattern = {parts[2]: MOST_RANK, "o_proj": 2}
    return {
        "everything": write_per_expert(folder / "everything", checkpoint, ends, seed=1, size=SIZE),
        "patterns": write_per_expert(
            folder / "patterns",
            checkpoint,
            [*experts, ".o_proj"],
            seed=9,
            size=SIZE / 2,
            ranks=pattern,
            use_rslora=True,
        ),
        "fused": write_fused(folder / "fused", checkpoint, seed=2, size=SIZE),
        "fused_old": write_fused(folder / "fused_old", checkpoint, seed=3, size=SIZE, old=True),
        "converted": write_converted(folder / "converted", checkpoint, seed=4, rank=2, size=SIZE),
        "kt": write_kt_training(folder / "kt", checkpoint, seed=5, size=SIZE),
        "grouped": write_grouped(folder / "grouped", checkpoint, seed=6, size=SIZE),
        "shared_outer": write_stacked(folder / "shared_outer", checkpoint, seed=7, size=SIZE),
        "wrapped": write_wrapped(folder / "wrapped", checkpoint, experts, seed=8, size=SIZE),
    }


LAYOUTS: Mapping[str, str] = {
    BASE: "no adapter",
    "everything": "PEFT, one expert at a time; attention, shared experts, dense layers, embedding and head too",
    "patterns": "the same on experts and attention, rsLoRA, with rank patterns",
    "fused": "PEFT's target_parameters on fused experts, 0.19 and newer",
    "fused_old": "the same of PEFT 0.18, whose factors are transposed",
    "converted": "PEFT's own conversion of gate, up and down to fused experts, with twice the rank",
    "kt": "KT's training output, beside PEFT's file for attention",
    "grouped": "Unsloth's order of columns (lora_B_layout: grouped_by_expert)",
    "shared_outer": "Tinker's stacked experts, one outer factor for all of them",
    "wrapped": "in two shards, with FSDP's and checkpointing's wrappers in its names",
}


# ---- one server


@dataclass(frozen=True)
class Case:
    """A checkpoint."""

    family: str
    tied: bool
    odd: bool
    usual_sizes: bool = False
    """Whatever lies on the disk: adapters that were trained fit."""

    @property
    def on_disk(self) -> OnDisk:
        return ODD[self.family] if self.odd else one_file

    @property
    def changes(self) -> dict[str, Any]:
        """Of config.json."""
        sizes = SIZES[self.family] if self.odd and not self.usual_sizes else {}
        return sizes | ({"tie_word_embeddings": True} if self.tied else {})

    def __str__(self) -> str:
        return f"{self.family}-{'tied' if self.tied else 'untied'}-{self.on_disk.__name__}"


GRID = tuple(Case(family, tied, odd) for family in FAMILIES for tied in (False, True) for odd in (False, True))


@dataclass
class Served:
    """A running server, the checkpoint that is true, and the adapters; `everything` is loaded from the start."""

    case: Case
    running: Running
    exact: Path
    adapters: dict[str, Path]
    folder: Path
    answers: dict[str, Answer] = field(default_factory=dict)

    def run(self, dtype: torch.dtype, model: Path | None = None) -> Run:
        """transformers on the true checkpoint, or on another."""
        request = {
            "model": str(model or self.exact),
            "quantized": None,
            "resident": 0,
            "options": {},
            "prompts": PROMPTS,
        }
        return Run(request, dtype)

    def answer(self, side: str) -> Answer:
        """The server's; an adapter that is not there is loaded and unloaded again."""
        if side not in self.answers:
            with self.loaded(side) as name:
                self.answers[side] = ask(self.running.client, PROMPTS, name)
        return self.answers[side]

    @contextmanager
    def loaded(self, side: str) -> Iterator[str | None]:
        """Its name in requests."""
        if side in (BASE, "everything"):
            yield None if side == BASE else side
            return
        client = self.running.client
        answer = client.post("/load_lora_adapter", json={"lora_name": side, "lora_path": str(self.adapters[side])})
        assert answer.status_code == 200, answer.text
        yield side
        client.post("/unload_lora_adapter", json={"lora_name": side}).raise_for_status()

    def reference(self, side: str) -> Reference:
        file = self.folder / f"reference-{side}.npz"
        if not file.exists():
            run = self.run(torch.float32)
            run.write(file, self.model(run, side), f"PEFT {metadata.version('peft')}")
        with np.load(file, allow_pickle=False) as found:
            return Reference(found["ids_NM"], found["logprobs_NM"], found["rounded_N"], str(found["how"]))

    def model(self, run: Run, side: str) -> Any:
        """transformers' model, with PEFT's adapter."""
        bare, _ = run.side(None)
        if side == BASE:
            return bare
        twin = self.folder / "twins" / side
        return with_peft(bare, twin if twin.exists() else write_twin(self.adapters[side], twin, EXPERTS))

    def measure(self, side: str) -> Numbers:
        """The server, and transformers in bfloat16, at the same prompts."""
        reference, served = self.reference(side), self.answer(side)
        in_bfloat16 = answer_of(self.model(self.run(torch.bfloat16), side))
        found = [
            median_error(one, reference, where) for where in (LAST_TOKENS, slice(None)) for one in (served, in_bfloat16)
        ]
        assert compare(served, reference).holds, (self.case, side, found)
        return Numbers(*found)


class Numbers(NamedTuple):
    """Median errors of one side, in nats: of the first tokens after the prompts, and of all positions."""

    first_served: float
    first_bfloat16: float
    all_served: float
    all_bfloat16: float


Results = Mapping[Case, Mapping[str, Numbers]]


def answer_of(model: Any) -> Answer:
    """What a server that ran this model would answer."""
    with torch.inference_mode():
        logits = torch.cat([model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0] for prompt in PROMPTS])
    logprobs_NK, ids_NK = torch.log_softmax(logits.float(), dim=-1).topk(TOP, dim=-1)
    return Answer(ids_NK.numpy().astype(np.int32), logprobs_NK.numpy(), np.zeros(len(logits), np.float32), NO_OTHERS)


def median_error(answer: Answer, reference: Reference, positions: Any) -> float:
    """Over some positions."""
    part = Answer(answer.ids_NK[positions], answer.logprobs_NK[positions], answer.given_N[positions], NO_OTHERS)
    known = Reference(
        reference.ids_NM[positions], reference.logprobs_NM[positions], reference.rounded_N[positions], reference.how
    )
    return compare(part, known).median


@contextmanager
def serving(case: Case, folder: Path) -> Iterator[Served]:
    """The case's server. Nobody else vouches for its random weights: this does."""
    torch.set_num_threads(1)
    exact = write_checkpoint(case.family, folder / case.family / "exact", **case.changes)
    checkpoint, weights = case.on_disk(exact, folder / "model", case.changes)
    save_file({name: tensor.float() for name, tensor in weights.items()}, exact / "model.safetensors", {"format": "pt"})
    adapters = write_adapters(folder, case.family, checkpoint)
    words = (
        "model=auto",
        f"model.path={checkpoint}",
        "lora=none",
        f"lora.max_rank={MOST_RANK}",
        "lora.max_per_batch=3",
    )
    words += (f"lora.adapters.everything.path={adapters['everything']}", "proof.whole_model=off", "proof.text=warn")
    with launched(*words, runs=folder / "runs") as running:
        yield Served(case, running, exact, adapters, folder)


# ---- the page


def page(results: Results) -> str:
    """docs/fidelity.md."""
    ratio = np.median([one.all_served / one.all_bfloat16 for sides in results.values() for one in sides.values()])
    count = sum(len(sides) for sides in results.values())
    parts = [
        "# Fidelity",
        "<!-- Written by `make fidelity`; change tests/adapters/fidelity.py instead. -->",
        wrapped(INTRODUCTION),
        wrapped(SUMMARY.format(count=count, ratio=ratio)),
        table(("adapter", "what it is"), LAYOUTS.items()),
        table(("on disk", "contents"), ((spaced(way), " ".join((way.__doc__ or "").split())) for way in WAYS)),
        "## First tokens",
        "Median error of the first token after each prompt: served / transformers in bfloat16.",
        numbers(results, lambda one: one[:2]),
        f"## All {sum(LENGTHS)} positions",
        "Median error: served / transformers in bfloat16.",
        numbers(results, lambda one: one[2:]),
    ]
    return "\n\n".join(parts) + "\n"


def numbers(results: Results, pick: Callable[[Numbers], tuple[float, ...]]) -> str:
    rows = (
        (
            case.family,
            "tied" if case.tied else "own",
            spaced(case.on_disk),
            *(cell(pick(sides[name])) for name in LAYOUTS),
        )
        for case, sides in results.items()
    )
    return table(("model", "head", "on disk", *LAYOUTS), rows)


def cell(pair: tuple[float, ...]) -> str:
    return " / ".join(f"{value:.4f}" for value in pair)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def spaced(way: OnDisk) -> str:
    return way.__name__.replace("_", " ")


def wrapped(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120, break_on_hyphens=False)


def read_page(text: str) -> Results:
    """The numbers of a page."""
    cases = {(case.family, "tied" if case.tied else "own", spaced(case.on_disk)): case for case in GRID}
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    pairs: dict[Case, list[list[float]]] = {}
    for model, head, way, *cells in (row for row in rows if len(row) > len(LAYOUTS)):
        if (case := cases.get((model, head, way))) is not None:
            pairs.setdefault(case, []).extend([float(value) for value in one.split("/")] for one in cells)
    half = len(LAYOUTS)
    return {
        case: {name: Numbers(*found[at], *found[half + at]) for at, name in enumerate(LAYOUTS)}
        for case, found in pairs.items()
    }


def main() -> None:
    """Runs the grid and writes the page."""
    results: dict[Case, dict[str, Numbers]] = {}
    for number, case in enumerate(GRID, 1):
        print(f"{number} of {len(GRID)}: {case}", flush=True)
        with tempfile.TemporaryDirectory() as folder, serving(case, Path(folder)) as served:
            results[case] = {side: served.measure(side) for side in LAYOUTS}
        for side, one in results[case].items():
            print(f"  {side}: {cell(one[:2])}, {cell(one[2:])}", flush=True)
    PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
