"""How often the order of fused columns is told right by their values (kt_model.importer.layouts), measured on adapters
that PEFT trained: tiny checkpoints of four families, ranks 2 to 16, from one optimizer step to hundreds.

    python tests/adapters/measure_layouts.py [--seeds N]      in the tests' environment; ten minutes a seed on one core

B starts at zero, so an adapter trained in Unsloth's order is the same training with B's columns permuted: each adapter
is asked in both orders, and what is said of the two must be opposite. Of peft 0.18, which keeps the factors the other
way round, put its folder into PYTHONPATH.

Measured with transformers 5.19, answers right, untold, wrong:

                                   peft 0.21.2, 2 seeds   peft 0.18.1, 1 seed
    AdamW, 8 experts, rank 2          52   28    0           16   24    0
    AdamW, 8 experts, rank 4          80    0    0           37    3    0
    AdamW, 8 experts, rank 8, 16     160    0    0           80    0    0
    AdamW, 4 experts                  20    4    0            8    4    0
    AdamW, 32 and 64 experts          48    0    0           24    0    0
    SGD                               16    0    0            8    0    0
    Muon, which makes columns alike
    in no direction                    0   16    0            7    1    0
    A and B random at the start        0   16    0            0    8    0
    asked for gate, up and down        8    0    0

What is untold is few columns (small models of low rank) or hardly trained; none of 668 answers was wrong.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "fixtures")]

from tiny_checkpoints import CONFIGS, TEXT, build_model, write_json, write_tokenizer  # noqa: E402
from written import regroup  # noqa: E402

from kt_model.importer import import_adapter  # noqa: E402
from kt_model.importer.layouts import GROUPED, RANK_MAJOR  # noqa: E402

FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
EXPERT_KEYS = {"qwen3_moe": "num_experts", "mixtral": "num_local_experts"}
WINDOW = 64
PEFT = metadata.version("peft")
CONVERTS = tuple(map(int, PEFT.split(".")[:2])) >= (0, 19)


@dataclass(frozen=True)
class Training:
    family: str
    rank: int
    seed: int = 0
    steps: int = 40
    rate: float = 1e-3
    experts: int = 8
    optimizer: str = "adamw"
    start: bool | str = True
    converted: bool = False
    """Asked for gate, up and down, PEFT makes fused ones of them."""

    def model(self, folder: Path) -> Any:
        key = EXPERT_KEYS.get(self.family, "n_routed_experts")
        write_json(folder / "config.json", CONFIGS[self.family] | {key: self.experts})
        write_tokenizer(folder)
        return build_model(folder, self.seed)

    def write(self, folder: Path) -> Path:
        """Train, and save as PEFT saves."""
        from peft import LoraConfig, get_peft_model
        from transformers import AutoTokenizer

        base = folder / "base"
        base.mkdir()
        model = self.model(base)
        ids = AutoTokenizer.from_pretrained(base)(TEXT, return_tensors="pt").input_ids[0]
        torch.manual_seed(self.seed)
        targets: dict[str, Any] = {"target_modules": [], "target_parameters": FUSED}
        if self.converted:
            own_names = ["w1", "w2", "w3"] if self.family == "mixtral" else ["gate_proj", "up_proj", "down_proj"]
            targets = {"target_modules": own_names}
        options = {"lora_alpha": 2 * self.rank, "init_lora_weights": self.start, "task_type": "CAUSAL_LM"}
        adapted = get_peft_model(model, LoraConfig(r=self.rank, **options, **targets))
        optimizer = self._optimizer([weight for weight in adapted.parameters() if weight.requires_grad])
        for _ in range(self.steps):
            starts = torch.randint(0, len(ids) - WINDOW, (4,))
            batch = torch.stack([ids[start : start + WINDOW] for start in starts])
            optimizer.zero_grad()
            adapted(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
        adapted.save_pretrained(folder / "adapter")
        return folder / "adapter"

    def _optimizer(self, weights: list[Any]) -> Any:
        if self.optimizer == "muon":
            return torch.optim.Muon(weights, lr=10 * self.rate, weight_decay=0.0)
        if self.optimizer == "sgd":
            return torch.optim.SGD(weights, lr=500 * self.rate, momentum=0.9)
        return torch.optim.AdamW(weights, lr=self.rate)


def trainings(seed: int) -> Iterator[tuple[str, Training]]:
    """By the group that they are counted in."""
    for family in ("qwen3_moe", "mixtral", "deepseek_v2", "glm4_moe"):
        for rank in (2, 4, 8, 16):
            for steps, rate in ((1, 1e-4), (5, 1e-4), (40, 2e-4), (40, 1e-3), (200, 5e-4)):
                yield f"AdamW, rank {rank}", Training(family, rank, seed, steps, rate)
    for experts in (4, 32, 64):
        for rank in (2, 8, 16):
            for steps, rate in ((10, 1e-4), (40, 1e-3)):
                yield f"AdamW, {experts} experts", Training("qwen3_moe", rank, seed, steps, rate, experts)
    for family in ("qwen3_moe", "mixtral"):
        for rank in (4, 16):
            yield "SGD", Training(family, rank, seed, optimizer="sgd")
            yield "Muon", Training(family, rank, seed, 60, optimizer="muon")
            yield "A and B random at the start", Training(family, rank, seed, start=False)
            if CONVERTS:
                yield "asked for gate, up and down", Training(family, rank // 2, seed, converted=True)


def ask(adapter: Path) -> str | None:
    """What the values say."""
    order = import_adapter(adapter).demand_sound().order
    assert order is not None
    return str(order) if order.why.startswith("measured: ") else None


def verdicts(training: Training) -> list[str]:
    """right, wrong or untold, of PEFT's order and of the other."""
    found = []
    with tempfile.TemporaryDirectory() as name:
        adapter = training.write(Path(name))
        for order in (RANK_MAJOR, GROUPED):
            said = ask(adapter)
            found.append("untold" if said is None else "right" if said == order else "wrong")
            if order == RANK_MAJOR and training.converted:
                break
            regroup(adapter, training.rank)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    counts: dict[str, Counter[str]] = {}
    for seed in range(options.seeds):
        for group, training in trainings(seed):
            counts.setdefault(group, Counter()).update(found := verdicts(training))
            if "wrong" in found:
                print(f"wrong: {training}", flush=True)
    print(f"peft {PEFT}")
    print(f"{'':34}right  untold  wrong")
    for group, count in counts.items():
        print(f"{group:32}{count['right']:7}{count['untold']:8}{count['wrong']:7}")


if __name__ == "__main__":
    main()
