"""action=bench: one launch measured as its users meet it. The record's format is in docs/sweeps.md.

measure.py is the job, in a process of its own; serving.py starts the server, client.py drives it with SGLang's own
serving benchmark, quality.py compares logprobs with a BF16 server's, machine/memory.py watches the server's processes.
Not here: running several of them (kt_launch.sweeps).
"""

RECORD_FILE = "bench.json"
REFERENCE_PLAN = "reference-plan.json"
REFERENCE_METHOD = "bf16"
"""The method that quality is measured against."""
