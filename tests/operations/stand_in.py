"""A stand-in for SGLang's server, real processes and real HTTP without a model: `python -P -m kt_sglang.server plan`
where PYTHONPATH has it as kt_sglang. It writes SGLang's log lines and answers what the proof asks.

STAND_IN in its environment, as JSON: {"exits": [7, -9]} how each start ends after it was ready (the last one stays),
{"stops": true} it stands still after it was ready, {"deadlocks": true} its detokenizer passes on nothing from then on,
{"loses its detokenizer": true} that ends during the proof, whose requests get no answers any more,
{"stutters": true} it writes the line that it is ready in two pieces,
{"waits for its port": true} it cannot listen where another process does, and waits, as SGLang's own warm-up may,
{"comes up with": FILE} and {"exits with": FILE} what it waits for before it says anything, and before it ends,
{"log": "text", "exit": 1} what it says instead of becoming ready,
{"logs": {"2": "text"}} the same for a later start.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

READY_LINES = (
    "Load weight begin. avail mem=19.61 GB",
    "KV Cache is allocated. dtype: torch.bfloat16, #tokens: 16384, KV size: 0.01 GB",
    "INFO:     Application startup complete.",
    "The server is fired up and ready to roll!",
)
METRICS = """\
# HELP sglang:num_running_reqs The number of running requests.
# TYPE sglang:num_running_reqs gauge
sglang:num_running_reqs{model_name="tiny"} 3.0
# HELP sglang:e2e_request_latency_seconds Histogram of End-to-end request latency in seconds
# TYPE sglang:e2e_request_latency_seconds histogram
sglang:e2e_request_latency_seconds_sum{model_name="tiny"} 1.5
sglang:e2e_request_latency_seconds_bucket{le="0.5",model_name="tiny"} 2.0
sglang:e2e_request_latency_seconds_bucket{le="+Inf",model_name="tiny"} 3.0
sglang:e2e_request_latency_seconds_count{model_name="tiny"} 3.0
"""
tokens = {"base": 0, "adapter": 0}


def say(text: str, pause_s: float = 0.0) -> None:
    print(f"[2026-11-23 08:59:30] {text[:-8]}", end="", flush=True)
    time.sleep(pause_s)
    print(text[-8:], flush=True)


class Answers(BaseHTTPRequestHandler):
    """What the proof and the metrics ask."""

    layers = 1
    deadlocked = False
    detokenizer: subprocess.Popen[bytes] | None = None
    """What ends at the first question of the proof's that needs it."""

    def do_GET(self) -> None:
        if self.path == "/server_info":
            sent = {"outputs_sent": tokens["base"] + self.behind(), "others": []}
            report = {"missing_hooks": [], "layers": self.records(), **sent}
            self.give({"internal_states": [{"kt_launch": report}], "kt_launch_outputs_received": tokens["base"]})
        elif self.path == "/v1/models":
            self.give({"data": [{"id": "tiny", "parent": None}, {"id": "tiny:west", "parent": "tiny"}]})
        elif self.path == "/metrics/":
            self.give_text(METRICS)
        elif self.path == "/ready":
            self.give_ready()
        else:
            self.send_error(404)

    def behind(self) -> bool:
        """Whether the detokenizer has not passed on the last message."""
        return self.deadlocked and (Path(os.environ["KT_LAUNCH_RUN_FOLDER"]) / "ready.json").exists()

    def give_ready(self) -> None:
        """As the edge of a server of ours does."""
        state = json.loads((Path(os.environ["KT_LAUNCH_RUN_FOLDER"]) / "state.json").read_text())["state"]
        self.send_response(200 if state == "ready" else 503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.path == "/tokenize":
            self.give({"tokens": [list(text.encode()) for text in json.loads(body)["prompt"]]})
        elif self.path == "/v1/tokenize":
            self.give({"tokens": [1, 2]})
        elif self.path == "/generate":
            self.generate(json.loads(body))
        elif self.path == "/v1/chat/completions":
            if self.detokenizer:
                self.detokenizer.kill()
                time.sleep(600)
            model = json.loads(body)["model"]
            top = [{"token": text, "logprob": p} for p, _, text in self.first_token(model == "tiny:west")]
            self.give({"model": model, "choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}]})
        else:
            self.give({})

    def generate(self, asked: dict[str, Any]) -> None:
        top = self.first_token(asked.get("lora_path") is not None)
        prompts = asked.get("input_ids", [0])
        others = [(-5.0, token, None) for token in asked.get("token_ids_logprob", [])]
        found = [
            {
                "input_token_logprobs": [(None, prompt[0], None), *((-1.0, token, None) for token in prompt[1:])],
                "input_top_logprobs": [None, *(top for _ in prompt[1:])],
                "output_top_logprobs": [top],
                "input_token_ids_logprobs": [None, *(others for _ in prompt[1:])],
                "output_token_ids_logprobs": [others],
            }
            for prompt in (prompts if isinstance(prompts[0], list) else [prompts])
        ]
        answers = [{"meta_info": one} for one in found]
        self.give(answers if isinstance(prompts[0], list) else answers[0])

    def first_token(self, adapter: bool) -> list[tuple[float, int, str]]:
        tokens["base"] += 1
        tokens["adapter"] += adapter
        return [(-1.0 - adapter, 5, "five"), (-3.0, 6, "six")]

    def records(self) -> list[dict[str, Any]]:
        counts = {"batches": tokens["base"], "tokens": tokens["base"], "adapter_tokens": tokens["adapter"]}
        fixed = {"isa": "reference", "method": "AMXBF16_SFT", "experts": 4, "packed_bytes": 1024, "reference_error": {}}
        phases = {"gate_up": {"ns": 2_000_000, "bytes": 4096}, "wait": {"ns": 1_000_000, "bytes": 0}}
        more = {"adapter_slots": 1, "phases": phases}
        return [{"layer": layer, **counts, **fixed, **more} for layer in range(self.layers)]

    def give(self, content: Any) -> None:
        self.give_text(json.dumps(content))

    def give_text(self, content: str) -> None:
        text = content.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.send_header("x-kt-launch-start", os.environ["KT_LAUNCH_START"])
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


def wait_for(file: Path) -> None:
    while not file.exists():
        time.sleep(0.05)


def main() -> None:
    plan_file = Path(sys.argv[-1])
    plan = json.loads(plan_file.read_text())
    behaviour = json.loads(os.environ.get("STAND_IN", "{}"))
    start = len(list(plan_file.parent.glob("server*.log")))
    (plan_file.parent / f"environment.{start}.json").write_text(json.dumps({**os.environ, "cwd": str(Path.cwd())}))
    log = behaviour.get("logs", {}).get(str(start), behaviour.get("log") if start == 1 else None)
    if log is not None:
        print(log, flush=True)
        sys.exit(behaviour.get("exit", 1))
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # a scheduler, as it were
    if behaviour.get("loses its detokenizer"):
        Answers.detokenizer = subprocess.Popen(["bash", "-c", "exec -a sglang::detokenizer sleep 600"])
        while not Path(f"/proc/{Answers.detokenizer.pid}/cmdline").read_bytes().startswith(b"sglang"):
            time.sleep(0.05)
    Answers.deadlocked = bool(behaviour.get("deadlocks")) and start == 1
    Answers.layers = plan["resolved"]["model.moe_layers"]["value"]
    address = ("127.0.0.1", plan["resolved"]["server.port"]["value"])
    try:  # SGLang may say that it is ready also where its port is somebody else's
        threading.Thread(target=ThreadingHTTPServer(address, Answers).serve_forever, daemon=True).start()
    except OSError:
        if behaviour.get("waits for its port"):
            say(f"ERROR:    [Errno 98] error while attempting to bind on address {address}: address already in use")
            signal.pause()
    if behaviour.get("kills its launcher"):
        os.kill(os.getppid(), signal.SIGKILL)
    if "comes up with" in behaviour:
        wait_for(Path(behaviour["comes up with"]))
    for line in READY_LINES:
        say(line, pause_s=0.5 if behaviour.get("stutters") and line == READY_LINES[-1] else 0.0)
    exits = behaviour.get("exits", [])
    if behaviour.get("stops") and start == 1:
        wait_for(plan_file.parent / "ready.json")
        os.kill(os.getpid(), signal.SIGSTOP)
    if start <= len(exits):
        wait_for(plan_file.parent / "ready.json")
        if "exits with" in behaviour:
            wait_for(Path(behaviour["exits with"]))
        time.sleep(0.3)
        code = exits[start - 1]
        say(behaviour.get("last words", "going"))
        if code < 0:
            os.kill(os.getpid(), -code)
        os._exit(code)
    signal.pause()


if __name__ == "__main__":
    main()
