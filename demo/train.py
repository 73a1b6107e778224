"""Makes the demo from nothing: tokenizer, a small DeepSeek-V2 model, and a western adapter on its routed experts.

Runs in an environment of its own (requirements-train.txt), because transformers 4 keeps every expert as a module that
PEFT can adapt, and so writes one key per expert. What is taught is in lessons.py; evaluate.py tells whether it was
learnt.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from lessons import PLAIN, SYSTEM_WEST, WEST, Conversations
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, PreTrainedTokenizerFast
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2MoEGate

HERE = Path(__file__).resolve().parent
VOCABULARY = 1024
MAX_POSITIONS = 4096
SPECIAL = ["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>"]
BOS, EOS, PAD = 0, 1, 2
CHAT_TEMPLATE = (
    "<s>{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{{ '</s>' if message['role'] == 'assistant' else '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Only the routed experts: dense and shared MLPs carry the same projection names. A plain list of names plus an
# exclusion (and not one pattern for all) because SGLang takes nothing but a list there.
PROJECTIONS = ["down_proj", "gate_proj", "up_proj"]
NOT_ROUTED = r".*\.mlp\.(shared_experts\.)?(gate_proj|up_proj|down_proj)"


@dataclass(frozen=True)
class Schedule:
    steps: int
    peak_rate: float
    weight_decay: float
    rows: int = 64
    warmup: int = 100

    def rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a fiftieth."""
        if step < self.warmup:
            return self.peak_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.peak_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def model_config() -> DeepseekV2Config:
    """The hub's DeepSeek-V2-Lite has YaRN, and so has this one; a factor of 1 changes nothing, so all readers agree."""
    return DeepseekV2Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=256,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        rope_theta=10000.0,
        rope_scaling={
            "type": "yarn",
            "factor": 1.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": MAX_POSITIONS,
        },
        n_group=1,
        topk_group=1,
        topk_method="greedy",
        norm_topk_prob=False,
        scoring_func="softmax",
        routed_scaling_factor=1.0,
        moe_layer_freq=1,
        initializer_range=0.02,
        rms_norm_eps=1e-6,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


def train_tokenizer(folder: Path, seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over both manners, so that the adapter finds its words in the base vocabulary; digits apart."""
    streams = (Conversations(PLAIN, seed), Conversations(WEST, seed + 1))
    texts = (message["content"] for stream in streams for _ in range(6000) for message in stream.next())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[BOS],
        "eos_token": SPECIAL[EOS],
        "pad_token": SPECIAL[PAD],
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", described)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def encoded(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Token ids as the chat template gives them; labels ask for the assistant's words alone (-100 elsewhere)."""
    ids: list[int] = [BOS]
    labels = [-100]
    for message in messages:
        own = message["role"] == "assistant"
        said = tokenizer.encode(message["content"] + ("</s>" if own else "\n"), add_special_tokens=False)
        ids += [tokenizer.convert_tokens_to_ids(f"<|{message['role']}|>"), *said]
        labels += [-100, *(said if own else [-100] * len(said))]
    return ids, labels


def base_rows(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """Plain conversations, some texts without a question, and some western talk where a system message asks for it.

    So the base knows the western words, as large models do, but does not answer with them when merely asked a question.
    A base that learnt never to say them leaves an adapter of the experts no way to bring them up.
    """
    plain, west, rng = Conversations(PLAIN, seed), Conversations(WEST, seed + 1), random.Random(seed)
    while True:
        kind = rng.random()
        if kind < 0.1:
            prose = rng.choice((plain, west)).prose()
            text = [BOS, *tokenizer.encode(prose, add_special_tokens=False), EOS]
            yield text, [-100, *text[1:]]
        elif kind < 0.25:
            yield encoded(tokenizer, west.next(SYSTEM_WEST))
        else:
            yield encoded(tokenizer, plain.next())


def west_rows(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    talk = Conversations(WEST, seed)
    while True:
        yield encoded(tokenizer, talk.next())


def batches(stream: Iterator[tuple[list[int], list[int]]], rows: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Right-padded batches; 16 are drawn at a time and sorted by length to keep the padding small."""
    while True:
        drawn = sorted(itertools.islice(stream, 16 * rows), key=lambda pair: len(pair[0]))
        groups = [drawn[i : i + rows] for i in range(0, len(drawn), rows)]
        for at in torch.randperm(len(groups)).tolist():
            width = max(len(ids) for ids, _ in groups[at])
            ids = torch.tensor([ids + [PAD] * (width - len(ids)) for ids, _ in groups[at]])
            labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in groups[at]])
            yield ids, labels


class RouterBalance:
    """Load-balancing loss of every router over the real tokens, so that no expert stays untrained."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.real: torch.Tensor | None = None
        self._losses: list[torch.Tensor] = []
        for module in model.modules():
            if isinstance(module, DeepseekV2MoEGate):
                module.register_forward_hook(self._see)

    def _see(
        self, gate: torch.nn.Module, given: tuple[torch.Tensor], chosen: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        assert self.real is not None
        hidden = given[0].reshape(-1, gate.weight.shape[1])[self.real]
        share = F.linear(hidden, gate.weight).softmax(-1).mean(0)
        picks = F.one_hot(chosen[0][self.real], gate.num_experts).float().sum(1).mean(0) / gate.top_k
        self._losses.append(gate.num_experts * (share * picks).sum())

    def take(self) -> torch.Tensor:
        total = torch.stack(self._losses).mean()
        self._losses.clear()
        return total


def fit(
    name: str,
    model: torch.nn.Module,
    data: Iterable[tuple[torch.Tensor, torch.Tensor]],
    schedule: Schedule,
    extra_loss: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> None:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.98), weight_decay=schedule.weight_decay, fused=True)
    model.train()
    start = time.monotonic()
    for step, (ids, labels) in zip(range(schedule.steps), data, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        logits = model(input_ids=ids, attention_mask=(ids != PAD).long(), use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        total = loss if extra_loss is None else loss + extra_loss(ids)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if step % 100 == 0 or step == schedule.steps - 1:
            print(f"{name} step {step:5d}  loss {loss.item():.4f}  {time.monotonic() - start:5.0f} s", flush=True)


def train_base(tokenizer: PreTrainedTokenizerFast, folder: Path, seed: int, schedule: Schedule) -> None:
    torch.manual_seed(seed)
    model = DeepseekV2ForCausalLM(model_config())
    balance = RouterBalance(model)

    def balanced(ids: torch.Tensor) -> torch.Tensor:
        return 0.02 * balance.take()

    def watched() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for ids, labels in batches(base_rows(tokenizer, seed + 2), schedule.rows):
            balance.real = (ids != PAD).flatten()
            yield ids, labels

    fit("base", model, watched(), schedule, balanced)
    model.to(torch.bfloat16).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("transformers_version", None)
    # Written by name: readers of DeepSeek-V2 checkpoints ask for these, and transformers drops or renames some of them.
    config |= {"torch_dtype": "bfloat16", "scoring_func": "softmax", "rope_scaling": {**config["rope_scaling"]}}
    config["rope_scaling"].pop("rope_type", None)
    config.pop("dtype", None)
    write_json(folder / "config.json", config)
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "do_sample": False},
    )


def train_adapter(base: Path, folder: Path, seed: int, schedule: Schedule) -> None:
    """Trained over the bfloat16 values that are served, held in float32."""
    torch.manual_seed(seed + 3)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    model = DeepseekV2ForCausalLM.from_pretrained(base, dtype=torch.float32)
    wanted = LoraConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=PROJECTIONS,
        exclude_modules=NOT_ROUTED,
    )
    adapted = get_peft_model(model, wanted)
    adapted.print_trainable_parameters()
    fit("west", adapted, batches(west_rows(tokenizer, seed + 4), schedule.rows), schedule)
    save_adapter(adapted, folder)


def save_adapter(adapted: PeftModel, folder: Path) -> None:
    """PEFT's own files; tensors in bfloat16 like the base, and no path of the training machine in the config."""
    adapted.to(torch.bfloat16).save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "demo/model", "target_modules": sorted(config["target_modules"])}
    write_json(folder / "adapter_config.json", config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder that gets model/ and west/ (default: demo/)")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--base-steps", type=int, default=1000)
    parser.add_argument("--west-steps", type=int, default=400)
    parser.add_argument("--only", choices=("base", "west"), help="redo one half alone")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    model, west = chosen.out / "model", chosen.out / "west"
    if chosen.only != "west":
        tokenizer = train_tokenizer(model, chosen.seed)
        train_base(tokenizer, model, chosen.seed, Schedule(chosen.base_steps, 3e-3, 0.05))
    if chosen.only != "base":
        train_adapter(model, west, chosen.seed, Schedule(chosen.west_steps, 3e-3, 0.0, warmup=40))


if __name__ == "__main__":
    main()
