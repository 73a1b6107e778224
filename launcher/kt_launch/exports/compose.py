"""A compose file for the image of the Dockerfile. The launcher restarts the server itself, so compose does not."""

from __future__ import annotations

from typing import Any

from kt_launch.exports import HEALTH_EVERY_S, PROBE_TIMEOUT_S, Launch, dump
from kt_launch.watching.readiness import PROBE

HEAD = """\
# docker compose up -d   (the image: kt-launch export export.format=docker)
# server.restarts handles crashes, and a configuration error would only recur: so restart is "no".
"""


def write(launch: Launch) -> str:
    launch = launch.in_container()
    published = [f"{launch.host}:{port}:{port}" for port in (launch.port, launch.metrics_port) if port is not None]
    service: dict[str, Any] = {
        "image": f"kt-launch:{launch.version}",
        "command": [escape(word) for word in launch.words(host="0.0.0.0", restarts=5)],
        "init": True,
        "restart": "no",
        "stop_grace_period": "1m",
        "shm_size": "8gb",
        "ports": published,
        "volumes": [
            *(escape(f"{folder}:{folder}:ro") for folder in launch.mounted),
            "runs:/var/lib/kt-launch",
            "cache:/var/cache/kt-launch",
        ],
        "ulimits": {"nofile": 65536},
        "healthcheck": {
            "test": ["CMD", *PROBE],
            "interval": f"{HEALTH_EVERY_S}s",
            "timeout": f"{PROBE_TIMEOUT_S}s",
            "start_period": f"{launch.start_timeout_s:.0f}s",
        },
    }
    if launch.pools > 1:
        service["cap_add"] = ["SYS_NICE"]
    if launch.secrets:
        service["environment"] = {name: f"${{{name}:?set it in the shell or in .env}}" for name in launch.secrets}
    if launch.device == "cuda":
        gpus = {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
        service["deploy"] = {"resources": {"reservations": {"devices": [gpus]}}}
    file = {
        "name": f"kt-launch-{launch.label}",
        "services": {"server": service},
        "volumes": {"runs": {}, "cache": {}},
    }
    return HEAD + dump(file)


def escape(text: str) -> str:
    """Compose reads $ as a variable."""
    return text.replace("$", "$$")
