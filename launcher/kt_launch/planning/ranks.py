"""The scheduler processes that are asked for in server.extra_args: how many, and whether the model can be shared out to
the ranks of tensor parallelism. SGLang ends in an assertion without words where it cannot, once every process is up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kt_launch.planning.draft import Draft
from kt_model.methods import method_of

FLAGS = ("--tp-size", "--tensor-parallel-size")
REPLICAS = ("--dp-size", "--data-parallel-size")
STAGES = ("--pp-size", "--pipeline-parallel-size")
MACHINES = ("--nnodes",)
HTTP_WORKERS = ("--tokenizer-worker-num",)
OWN_HEADS = "--enable-dp-attention"
"""With it the ranks share out requests, not heads."""


def check_ranks(draft: Draft) -> None:
    base, words = draft.facts.checkpoint, draft.config.server.extra_args
    ranks, flag = wanted_ranks(words)
    if base is None or ranks < 2:
        return
    numbers = dict(base.shared_out)
    if OWN_HEADS in words:
        numbers.pop("num_attention_heads", None)
    odd = {key: number for key, number in numbers.items() if number % ranks}
    width, group = base.moe_intermediate_size, method_of(draft.config.kt.method).group or 1
    if odd:
        shares = ", ".join(f"{key} {number}" for key, number in odd.items())
        problem = f"{ranks} ranks cannot split what config.json has: {shares}"
        draft.problems.add("server.extra_args", problem, _fix(flag, ranks, numbers))
    elif width % (ranks * group):
        groups = f"groups of {group} ({draft.config.kt.method})"
        problem = f"{ranks} ranks cannot split experts of inner width {width} in {groups}"
        draft.problems.add("server.extra_args", problem, "Set kt.method=int8, or use another number of ranks.")


def wanted_ranks(words: Sequence[str]) -> tuple[int, str]:
    """How many, and by which flag; 1 where nothing is said, or what is no number, which SGLang refuses."""
    return _wanted(words, FLAGS)


def requested(words: Sequence[str], flags: Sequence[str]) -> int:
    """The number that one of these flags asks for; 1 where none does."""
    return _wanted(words, flags)[0]


def replicas(words: Sequence[str]) -> int:
    """How many hold the whole model; those of the ranks' own heads do not."""
    return 1 if OWN_HEADS in words else requested(words, REPLICAS)


def processes(words: Sequence[str]) -> int:
    """Scheduler processes on this machine."""
    return max(1, requested(words, FLAGS) * requested(words, STAGES) * replicas(words) // requested(words, MACHINES))


def _wanted(words: Sequence[str], flags: Sequence[str]) -> tuple[int, str]:
    """SGLang's parser takes the beginning of a flag for the flag, and of two the later."""
    found, spelt = 1, flags[0]
    for number, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if len(flag) > len("--d") and any(each.startswith(flag) for each in flags):
            value = value if equals else "".join(words[number + 1 : number + 2])
            found, spelt = max(1, int(value)) if value.isdecimal() else 1, flag
    return found, spelt


def _fix(flag: str, ranks: int, numbers: Mapping[str, int]) -> str:
    fewer = next(count for count in range(ranks - 1, 0, -1) if not any(number % count for number in numbers.values()))
    return f"Use {flag} {fewer} there." if fewer > 1 else f"Leave {flag} out."
