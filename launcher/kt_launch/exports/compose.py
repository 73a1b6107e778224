"""A compose file for the image of the Dockerfile. The launcher restarts the server itself, so compose does not."""

from __future__ import annotations

import json

from kt_launch.exports import Launch

FILE = """\
# docker compose up -d   (the image: kt-launch action=export export.format=docker)
name: {project}
services:
  server:
    image: kt-launch:{version}
    command:
{words}
    init: true
    restart: "no" # a crash is mended by server.restarts; a mistake in the configuration would only come again
    stop_grace_period: 1m
    shm_size: 8gb
    ports:
{ports}
    volumes:
{volumes}
    ulimits:
      nofile: 65536
{rights}{environment}{gpus}volumes:
  runs:
  cache:
"""
RIGHTS = """\
    cap_add: [SYS_NICE] # each pool's memory lies on its own NUMA node
"""
GPUS = """\
    deploy:
      resources:
        reservations:
          devices:
            - driver: nvidia
              count: all
              capabilities: [gpu]
"""


def write(launch: Launch) -> str:
    published = [f"{launch.host}:{port}:{port}" for port in (launch.port, launch.metrics_port) if port is not None]
    volumes = [f"{folder}:{folder}:ro" for folder in launch.folders]
    volumes += ["runs:/var/lib/kt-launch", "cache:/var/cache/kt-launch"]
    secrets = "".join(f"      {name}: ${{{name}:?set it in the shell or in .env}}\n" for name in launch.secrets)
    return FILE.format(
        project=f"kt-launch-{launch.label}",
        version=launch.version,
        words=_items(escape(word) for word in launch.words(host="0.0.0.0", restarts=5)),
        ports=_items(published),
        volumes=_items(escape(volume) for volume in volumes),
        rights=RIGHTS if launch.pools > 1 else "",
        environment=f"    environment:\n{secrets}" if secrets else "",
        gpus=GPUS if launch.device == "cuda" else "",
    )


def escape(text: str) -> str:
    """Compose reads $ as a variable."""
    return text.replace("$", "$$")


def _items(texts: object) -> str:
    assert hasattr(texts, "__iter__")
    return "\n".join(f"      - {json.dumps(text, ensure_ascii=False)}" for text in texts)
