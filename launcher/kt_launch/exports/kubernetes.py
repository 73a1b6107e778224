"""A Deployment and its Service for the image of the Dockerfile, with the folders of the node it was exported on."""

from __future__ import annotations

from typing import Any

from kt_launch.exports import PROBE_TIMEOUT_S, Launch, dump
from kt_launch.running.readiness import PROBE

PROBE_PERIOD_S = 10
START_SPARE_S = 3600
"""Preparing weights and the proof, on top of what SGLang may take; the launcher itself gives up on a server that does
not start."""
HEAD = """\
# kubectl apply -f <this file>; the folders below must be on the node (or use another kind of volume).
# Recreate, since two at once would need twice the memory.
"""


def write(launch: Launch) -> str:
    launch = launch.in_container()
    name = f"kt-launch-{launch.label}"
    literals = " ".join(f"--from-literal={secret}=…" for secret in launch.secrets)
    note = f"# First: kubectl create secret generic {name} {literals}\n" if launch.secrets else ""
    return HEAD + note + dump(_deployment(launch, name), _service(launch, name))


def _deployment(launch: Launch, name: str) -> dict[str, Any]:
    metadata: dict[str, Any] = {"labels": {"app": name}}
    if launch.metrics_port is not None:
        metadata["annotations"] = {"prometheus.io/scrape": "true", "prometheus.io/port": str(launch.metrics_port)}
    pod = {"terminationGracePeriodSeconds": 60, "containers": [_container(launch, name)], "volumes": _volumes(launch)}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "replicas": 1,
            "strategy": {"type": "Recreate"},
            "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": metadata, "spec": pod},
        },
    }


def _container(launch: Launch, name: str) -> dict[str, Any]:
    bounds = {"memory": f"{launch.memory_gib}Gi"} | ({"nvidia.com/gpu": 1} if launch.device == "cuda" else {})
    ready = {"exec": {"command": list(PROBE)}, "periodSeconds": PROBE_PERIOD_S, "timeoutSeconds": PROBE_TIMEOUT_S}
    container: dict[str, Any] = {
        "name": "server",
        "image": f"kt-launch:{launch.version}",
        "args": [_literal(word) for word in launch.words(host="0.0.0.0", restarts=5)],
        "ports": [{"name": "http", "containerPort": launch.port}],
        "resources": {"requests": {"cpu": str(launch.threads + 1), **bounds}, "limits": bounds},
        "startupProbe": ready | {"failureThreshold": round((launch.start_timeout_s + START_SPARE_S) / PROBE_PERIOD_S)},
        "readinessProbe": ready,
        "volumeMounts": [
            *({"name": f"folder-{n}", "mountPath": f, "readOnly": True} for n, f in enumerate(launch.folders)),
            {"name": "runs", "mountPath": "/var/lib/kt-launch"},
            {"name": "cache", "mountPath": "/var/cache/kt-launch"},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    if launch.metrics_port is not None:
        container["ports"].append({"name": "metrics", "containerPort": launch.metrics_port})
    if launch.secrets:
        container["env"] = [
            {"name": secret, "valueFrom": {"secretKeyRef": {"name": name, "key": secret}}} for secret in launch.secrets
        ]
    if launch.pools > 1:
        container["securityContext"] = {"capabilities": {"add": ["SYS_NICE"]}}
    return container


def _volumes(launch: Launch) -> list[dict[str, Any]]:
    return [
        *(
            {"name": f"folder-{number}", "hostPath": {"path": folder, "type": "Directory"}}
            for number, folder in enumerate(launch.folders)
        ),
        {"name": "runs", "emptyDir": {}},
        {"name": "cache", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}},
    ]


def _service(launch: Launch, name: str) -> dict[str, Any]:
    port = {"name": "http", "port": launch.port, "targetPort": "http"}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {"selector": {"app": name}, "ports": [port]},
    }


def _literal(text: str) -> str:
    """Kubernetes reads $(NAME) in arguments as a variable."""
    return text.replace("$(", "$$(")
