"""What the compiled extension offers. Arrays cross by DLPack, so torch tensors pass as they are; all live on the CPU.

Errors: TypeError for a wrong type or dtype, ValueError for anything else, MemoryError and RuntimeError for what the
system does not give (memory, threads), each naming the argument, what was expected and what came. After an error
nothing has changed, but an expert that was being loaded must be loaded again.
"""

from collections.abc import Sequence
from typing import Any, Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray

class SupportsDLPack(Protocol):
    """A tensor or array of any library that speaks DLPack (torch, numpy, …)."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...
    def __dlpack_device__(self) -> tuple[Any, int]: ...

def isas() -> list[str]:
    """Instruction sets that are built in and run on this host, best first."""

def compiled_isas() -> list[str]:
    """All instruction sets that are built in, also those that this host cannot run or that only tests use."""

class NumberFormat(TypedDict):
    """How a method keeps weights."""

    format: str
    """bf16, int8 or int4."""
    bits: int
    """Of a weight, scales apart."""
    scale_bytes: int
    """Of a scale; 0 where there are none."""
    group: int | None
    """Inputs that share a scale; None where a whole row does, or there are none."""

def methods() -> dict[str, NumberFormat]:
    """The number formats of weights by method (what `method` takes), the widest first."""

def packed_bytes(
    *, method: str, num_experts: int, hidden_size: int, intermediate_size: int, nodes: int = 1
) -> list[int]:
    """Bytes of one layer's packed weights in each pool group, 0 for one without a share; MoE.packed_bytes is their sum.

    ValueError for a method or sizes that no MoE has."""

def packed_adapter_bytes(
    *, num_experts: int, hidden_size: int, intermediate_size: int, ranks: tuple[int, int, int]
) -> int:
    """Adapter.packed_bytes of an adapter with these ranks of gate, up and down (0: absent)."""

def scratch_bytes(
    *,
    method: str,
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    tokens: int,
    top_k: int,
    threads: int,
    nodes: int = 1,
    ranks: tuple[int, int, int] = (0, 0, 0),
) -> int:
    """The most bytes of scratch that a pool keeps for forwards of one layer with up to `tokens` tokens.

    Each token has top_k experts; `ranks` are the largest of gate, up and down in any slot. A long batch runs in chunks,
    so the result stays below the larger of 512 MiB and an eighth of the layer's weights, plus a quarter. It is what the
    reference kernel takes, whose rows are the widest; others take less."""

def quantize_expert(
    gate: SupportsDLPack, up: SupportsDLPack, down: SupportsDLPack, method: str, *, isa: str = "auto"
) -> dict[str, NDArray[Any]]:
    """Quantizes one expert from bfloat16, for a file: the same arrays on every CPU, for every isa and pool.

    Keys gate, up, down and gate_scale, up_scale, down_scale. AMXINT8_SFT: int8 (rows, inputs) and float32 (rows,).
    AMXINT4_SFT: uint8 (rows, inputs / 2 rounded up), the even input in the low nibble, each value + 8, and the bits of
    bfloat16 scales as uint16 (rows, inputs / 32 rounded up). A weight is its scale times its value.
    """

def packed_layout(*, method: str, pool: ThreadPool) -> str:
    """All that packed bytes depend on besides the weights and their shape: layout version, format, pool groups.

    The instruction set is not among them: all share one layout. Equal strings and shapes mean interchangeable bytes.
    """

class ThreadPool:
    """Threads that all layers share. They start with the first use, and anew in a forked child.

    The calling thread is one of `threads`. `nodes` groups them: each group has its own shard of every expert's
    intermediate dimension and, where the machine has several NUMA nodes, its own memory and cores.
    """

    def __init__(self, threads: int, *, nodes: int = 1) -> None: ...
    def stay_awake(self, us: int) -> None:
        """For how many microseconds (at most a second) a thread waits for its next job before it sleeps, besides the 20
        that it always does. Waking takes time, waiting takes the core: for what lies between two layers on a GPU."""
    @property
    def threads(self) -> int: ...
    @property
    def nodes(self) -> int: ...

class Adapter:
    """LoRA for all experts of one layer, packed once. Any rank from 0; a projection without adapter is None twice.

    gate_a, up_a (experts, rank, hidden), gate_b, up_b (experts, intermediate, rank), down_a (experts, rank,
    intermediate), down_b (experts, hidden, rank), each bfloat16 or float32 and contiguous. The delta is scale * B A.
    """

    def __init__(
        self,
        gate_a: SupportsDLPack | None,
        gate_b: SupportsDLPack | None,
        up_a: SupportsDLPack | None,
        up_b: SupportsDLPack | None,
        down_a: SupportsDLPack | None,
        down_b: SupportsDLPack | None,
        *,
        scale: float = 1.0,
    ) -> None: ...
    @property
    def ranks(self) -> tuple[int, int, int]:
        """Of gate, up and down."""
    @property
    def scale(self) -> float: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def packed_bytes(self) -> int: ...

class MoE:
    """The routed experts of one layer."""

    def __init__(
        self,
        *,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        method: str = "AMXBF16_SFT",
        isa: str = "auto",
        pool: ThreadPool,
        packed: Sequence[NDArray[np.uint8]] | None = None,
    ) -> None:
        """Without `packed`, memory for the weights is allocated and every expert must be loaded before its first use.

        With it, one array per pool group as packed_shards gave them under the same packed_layout: nothing is copied or
        allocated, all experts count as loaded, and load_expert is refused. The arrays may be read-only and may be a
        mapped file, shared between processes; each starts at a multiple of 64 bytes (a page is better) and is held as
        long as the layer lives. ValueError when their number, size or alignment is not this layer's; their content is
        not looked at.
        """

    def packed_shards(self) -> list[NDArray[np.uint8]]:
        """The packed weights, one read-only view per pool group (empty where a group has no share), without a copy.

        A view keeps the layer alive. ValueError while an expert is not loaded.
        """

    @property
    def packed_layout(self) -> str:
        """As the function of that name gives it."""

    def load_expert(self, expert: int, gate: SupportsDLPack, up: SupportsDLPack, down: SupportsDLPack) -> None:
        """Packs one expert from bfloat16 gate and up (intermediate, hidden) and down (hidden, intermediate).

        The quantized methods quantize on the way."""

    def load_quantized_expert(self, expert: int, arrays: dict[str, Any]) -> None:
        """Packs one expert from the arrays of quantize_expert, or tensors of the same types (bfloat16 for uint16)."""

    def forward(
        self,
        x: SupportsDLPack,
        topk_ids: SupportsDLPack,
        topk_weights: SupportsDLPack,
        adapter_slots: SupportsDLPack | None,
        out: SupportsDLPack,
    ) -> None:
        """Writes the weighted sum over each token's experts to `out`; changes nothing else and releases the GIL.

        x (tokens, hidden) bfloat16, its rows any distance apart; topk_ids (tokens, k) int32 or int64, a negative id
        skips its pair; topk_weights (tokens, k) float32; adapter_slots (tokens,) int32 or int64, -1 for none, or None
        for none at all; out (tokens, hidden) bfloat16 or float32, not overlapping any input. NaN or infinity in x or
        topk_weights gives NaN in that token's row, and in no other.
        """

    def set_adapter(self, slot: int, adapter: Adapter | None) -> None:
        """Fills or empties a slot. A forward in flight keeps the adapters that it started with; naming an empty slot in
        a later forward is an error."""

    def set_profiling(self, on: bool) -> None:
        """Counts time and bytes of the forwards that start from now on, from zero; off costs nothing."""

    def read_profile(self) -> dict[str, dict[str, int]] | None:
        """One entry per phase: "ns" summed over all threads and "bytes" of weights read; None when profiling is off."""

    @property
    def isa(self) -> str: ...
    @property
    def method(self) -> str: ...
    @property
    def packed_bytes(self) -> int: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...

class HostRecord:
    """What the host calls of one layer leave behind; any thread may read it at any time."""

    def __init__(self) -> None: ...
    @property
    def calls(self) -> int:
        """Forwards that came to their end."""
    @property
    def tokens(self) -> int:
        """Real rows of those."""
    @property
    def adapter_tokens(self) -> int:
        """Real rows of those with an adapter."""
    @property
    def experts_read(self) -> int:
        """The experts whose weights each of them read, added up."""
    @property
    def busy_ns(self) -> int:
        """How long they took together."""
    def recent(self) -> list[tuple[int, int, int]]:
        """The last 64 of them, the oldest first: start and end in nanoseconds of the system's clock, and real rows."""
    def count_experts(self, experts: int) -> None:
        """From now on `expert_counts` counts the choices of each of so many experts, by the numbers in topk_ids."""
    def expert_counts(self) -> list[int]:
        """How often each was chosen by a real row; empty where nobody asked for it."""
    @property
    def failure(self) -> str | None:
        """What the first failed call has to say."""

class HostCall:
    """A forward on buffers that stay where they are, for a caller without Python: a CUDA host function, for one.

    Calling `function` (a C function: void (*)(void*)) with `argument` does what MoE.forward does with these arrays,
    and never raises: after a failure, which `record` keeps, every row of `out` is NaN. `rows` (1,) int32, read at each
    call, says how many rows are real; the others come out as zeros, and nothing of theirs is read. `numbers`: the
    layer's number of each expert that topk_ids name, -1 where the layer does not have it; without it they name the
    layer's own. All arrays, the layer and the record are held; this object must be held until the last call is through.
    """

    def __init__(
        self,
        moe: MoE,
        x: SupportsDLPack,
        topk_ids: SupportsDLPack,
        topk_weights: SupportsDLPack,
        adapter_slots: SupportsDLPack | None,
        out: SupportsDLPack,
        *,
        rows: SupportsDLPack | None = None,
        numbers: Sequence[int] = (),
        record: HostRecord,
    ) -> None: ...
    @property
    def function(self) -> int:
        """Address."""
    @property
    def argument(self) -> int:
        """Address."""

class Mailbox:
    """A thread that runs host calls when a word of memory asks for them, say a device's that writes and reads it.

    Who wants a call writes its number into words[REQUEST] and waits until the same number is in words[ANSWER], which it
    then sets back to 0, or until words[CLOSED] is not 0: then no answer will ever come. The thread is awake between two
    requests that follow each other soon, and looks a hundred times a second where nothing was asked or announced for
    two seconds. `words` is an array of WORDS int32, which is held; a mailbox that goes waits for the call that runs.
    """

    REQUEST: int
    ANSWER: int
    CLOSED: int
    WORDS: int
    def __init__(self, words: SupportsDLPack) -> None: ...
    def add(self, call: HostCall) -> int:
        """The call's number; the mailbox holds the call from now on."""
    def announce(self) -> None:
        """Requests are about to come."""
