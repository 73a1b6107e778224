"""action=bench: measures one launch as its clients experience it. docs/sweeps.md has the record's format.

measure.py is the job, in a separate process; serving.py starts the server, client.py drives it with SGLang's own
serving benchmark, quality.py compares logprobs with a BF16 server's, machine/memory.py watches the server's processes.
Not here: running several of them (kt_launch.sweeps).
"""

RECORD_FILE = "bench.json"
REFERENCE_PLAN = "reference-plan.json"
REFERENCE_METHOD = "bf16"
"""The reference method for quality."""
