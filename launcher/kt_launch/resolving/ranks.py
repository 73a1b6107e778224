"""Ranks of tensor parallelism, which are asked for in server.extra_args: whether the model can be shared out to them.
SGLang ends in an assertion without words where it cannot, once every process is up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kt_launch.resolving.draft import Draft

FLAGS = ("--tp-size", "--tensor-parallel-size")
OWN_HEADS = "--enable-dp-attention"
"""With it the ranks share out requests, not heads."""
GROUPS = {"AMXINT4_SFT": 32}
"""Method -> inputs that share a scale, of which no rank has a part."""


def check_ranks(draft: Draft) -> None:
    base, words = draft.facts.checkpoint, draft.config.server.extra_args
    ranks, flag = wanted_ranks(words)
    if base is None or ranks < 2:
        return
    numbers = dict(base.shared_out)
    if OWN_HEADS in words:
        numbers.pop("num_attention_heads", None)
    odd = {key: number for key, number in numbers.items() if number % ranks}
    width, group = base.moe_intermediate_size, GROUPS.get(draft.config.kt.method, 1)
    if odd:
        told = ", ".join(f"{key} {number}" for key, number in odd.items())
        problem = f"{ranks} ranks cannot share out what config.json has: {told}"
        draft.problems.add("server.extra_args", problem, _fix(flag, ranks, numbers))
    elif width % (ranks * group):
        groups = f"groups of {group} ({draft.config.kt.method})"
        problem = f"{ranks} ranks cannot share out experts of inner width {width} in {groups}"
        draft.problems.add("server.extra_args", problem, "Type kt.method=AMXINT8_SFT, or another number of ranks.")


def wanted_ranks(words: Sequence[str]) -> tuple[int, str]:
    """How many, and by which flag; 1 where nothing is said, or what is no number, which SGLang refuses."""
    found, spelt = 1, FLAGS[0]
    for number, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag in FLAGS:
            value = value if equals else "".join(words[number + 1 : number + 2])
            found, spelt = int(value) if value.isdecimal() else 1, flag
    return found, spelt


def _fix(flag: str, ranks: int, numbers: Mapping[str, int]) -> str:
    fewer = next(count for count in range(ranks - 1, 0, -1) if not any(number % count for number in numbers.values()))
    return f"Type {flag} {fewer} there." if fewer > 1 else f"Leave {flag} out."
