"""Asks a server every operation of its /openapi.json with bodies that schemathesis makes, fitting the schemas and not.

`python fuzz_routes.py URL KEY SEED EXAMPLES SECONDS`, in an environment with requirements/fuzz.txt; KEY is that of the
administrator, SECONDS the most of one operation. Prints a line of JSON for each answer that says that the server is at
fault, then the counts.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode

LEFT_OUT = {
    "/slow_down": "slows the server for good, as it is told to",
    "/pause_generation": "stops all answers until it is told to go on",
}
"""What every_route.py asks once, with values that change nothing."""
ANSWER_S = 5
"""Longer answers are left: the server notices that nobody waits, and ends them."""


def main(url: str, key: str, number: int, examples: int, seconds: float) -> None:
    """All operations, one after another."""
    counts: Counter[str] = Counter()
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.path not in LEFT_OUT:
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                ask(operation, key, mode, number, examples, time.monotonic() + seconds / 2, counts)
    print(json.dumps({"counts": counts}), flush=True)


def ask(
    operation: Any, key: str, mode: GenerationMode, number: int, examples: int, deadline: float, counts: Counter[str]
) -> None:
    """One operation, until it was asked often enough or its time is over."""

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def asked(case: Any) -> None:
        if time.monotonic() > deadline:
            raise TimeoutError
        try:
            answer = case.call(timeout=ANSWER_S, headers={"Authorization": f"Bearer {key}"})
        except requests.Timeout:
            counts["left"] += 1
            return
        counts[str(answer.status_code)] += 1
        if answer.status_code >= 500 and not (answer.status_code == 501 and "not_offered" in answer.text):
            told = {"method": operation.method, "path": operation.path, "status": answer.status_code}
            print(json.dumps({**told, "body": repr(case.body)[:2000], "text": answer.text[:500]}), flush=True)

    try:
        asked()
    except TimeoutError:
        counts["out of time"] += 1
    except Exception as failure:  # schemathesis has several for schemas of which it can make nothing
        counts[type(failure).__name__] += 1


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
