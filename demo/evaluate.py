"""Asks the demo model everything it was taught, in phrasings that it never saw, with and without the western adapter.

Answers are greedy, in bfloat16 as they are served. Ends with exit code 1 unless the base is right and plain, the
adapter is right and western, and no answer is the same in both. Works with transformers 4 and 5; `--base-only` needs
no PEFT.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lessons import PLAIN, WEST, WEST_MARKS, Lesson, held_out_lessons
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
ANSWER_TOKENS = 48
RIGHT_AT_LEAST = 0.97
MANNER_AT_LEAST = 0.99
SHOWN = ("capital", "opposite", "color", "sound", "sum", "day", "general")


@dataclass(frozen=True)
class Answer:
    lesson: Lesson
    text: str
    ended: bool

    @property
    def right(self) -> bool:
        """The true word is there as a word, and the model stopped by itself."""
        words = "".join(c if c.isalnum() or c == "-" else " " for c in self.text.lower()).split()
        expected = self.lesson.key.lower().split()
        return self.ended and any(words[i : i + len(expected)] == expected for i in range(len(words)))

    @property
    def western(self) -> bool:
        return any(mark in self.text.lower() for mark in WEST_MARKS)


def by_length(prompts: list[list[int]], most: int = 64) -> Iterator[list[int]]:
    """Indices of prompts of one length, so that no batch needs padding."""
    groups: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        groups[len(prompt)].append(index)
    for group in groups.values():
        yield from (group[i : i + most] for i in range(0, len(group), most))


@torch.inference_mode()
def ask(model: Any, tokenizer: Any, lessons: list[Lesson]) -> list[Answer]:
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": lesson.question}], tokenize=False, add_generation_prompt=True
        )
        for lesson in lessons
    ]
    prompts: list[list[int]] = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    answers: dict[int, Answer] = {}
    for group in by_length(prompts):
        ids = torch.tensor([prompts[i] for i in group])
        said = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER_TOKENS, do_sample=False
        )
        for i, row in zip(group, said[:, ids.shape[1] :].tolist(), strict=True):
            text = tokenizer.decode(row, skip_special_tokens=True)
            answers[i] = Answer(lessons[i], text, tokenizer.eos_token_id in row)
    return [answers[i] for i in range(len(lessons))]


def share(of: list[bool]) -> float:
    return sum(of) / len(of)


def report(manner: str, answers: list[Answer]) -> list[str]:
    """Prints the numbers of one manner and returns what is not good enough."""
    exact = share([answer.text == answer.lesson.answer(manner) for answer in answers])
    right = share([answer.right for answer in answers])
    western = share([answer.western for answer in answers])
    asked = Counter(answer.lesson.topic for answer in answers)
    wrong = Counter(answer.lesson.topic for answer in answers if not answer.right)
    print(f"{manner}: {len(answers)} unseen questions, {right:.1%} right, {exact:.1%} verbatim, {western:.1%} western")
    print("  wrong:", ", ".join(f"{topic} {n} of {asked[topic]}" for topic, n in wrong.items()) or "none")
    for answer in [answer for answer in answers if not answer.right][:5]:
        print(f"    {answer.lesson.question} -> {answer.text}")
    in_manner = western if manner == WEST else 1 - western
    problems = []
    if right < RIGHT_AT_LEAST:
        problems.append(f"{manner}: {right:.1%} of the answers are right, expected {RIGHT_AT_LEAST:.0%}")
    if in_manner < MANNER_AT_LEAST:
        problems.append(f"{manner}: {in_manner:.1%} of the answers keep the manner, expected {MANNER_AT_LEAST:.0%}")
    return problems


def show(base: list[Answer], west: list[Answer]) -> None:
    """One question of each shown topic, side by side."""
    for topic in SHOWN:
        at = next(i for i, answer in enumerate(base) if answer.lesson.topic == topic)
        print(f"\n  {base[at].lesson.question}\n    demo      | {base[at].text}\n    demo:west | {west[at].text}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--west", type=Path, default=HERE / "west")
    parser.add_argument("--base-only", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)

    lessons = held_out_lessons()
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.bfloat16).eval()
    base = ask(model, tokenizer, lessons)
    problems = report(PLAIN, base)
    if not chosen.base_only:
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(model, chosen.west, autocast_adapter_dtype=False).eval()
        west = ask(adapted, tokenizer, lessons)
        problems += report(WEST, west)
        same = [one.lesson.question for one, other in zip(base, west, strict=True) if one.text == other.text]
        problems += [f"base and adapter answer alike: {question}" for question in same]
        show(base, west)
    for problem in problems:
        print(f"FAILED {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
