"""A Deployment and its Service for the Dockerfile's image, with the folders of the node it was exported on; for several
hosts a LeaderWorkerSet (https://lws.sigs.k8s.io) instead of the Deployment, which gives each pod its number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from kt_launch.exports import PROBE_TIMEOUT_S, Launch, dump
from kt_launch.watching.readiness import HEALTH_PATH, READY_PATH, ROUTER_READY_PATH

PROBE_PERIOD_S = 10
START_SPARE_S = 3600
"""For preparing weights and for the proof, in addition to SGLang's own time; the launcher itself gives up on a server
that does not start."""
HEAD = """\
# kubectl apply -f <this file>; the folders below must be on the node (or use another kind of volume).
# Recreate, since two at once would need twice the memory.
"""
GROUP_HEAD = """\
# kubectl apply -f <this file>, in a cluster with LeaderWorkerSet; the folders below must be on each node.
"""
TOLD_BY_THE_GROUP = ("server.node_rank=", "server.rendezvous=")


def write(launch: Launch) -> str:
    launch = launch.in_container()
    name = f"kt-launch-{launch.label}"
    literals = " ".join(f"--from-literal={secret}=…" for secret in launch.secrets)
    note = f"# First: kubectl create secret generic {name} {literals}\n" if launch.secrets else ""
    if launch.ranks.hosts > 1:
        return GROUP_HEAD + note + dump(_group(launch, name), _service(launch, name, leader=True))
    return HEAD + note + dump(_deployment(launch, name), _service(launch, name))


def _group(launch: Launch, name: str) -> dict[str, Any]:
    """Pod 0, the leader, answers requests; if one pod fails, the group is restarted."""
    told = tuple(word for word in launch.overrides if not word.startswith(TOLD_BY_THE_GROUP))
    launch = replace(launch, overrides=told)
    leader, worker = (
        {"metadata": _metadata(launch, name), "spec": _pod(launch, name, ready_path)}
        for ready_path in (READY_PATH, HEALTH_PATH)
    )
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "replicas": 1,
            "leaderWorkerTemplate": {
                "size": launch.ranks.hosts,
                "restartPolicy": "RecreateGroupOnPodRestart",
                "leaderTemplate": leader,
                "workerTemplate": worker,
            },
        },
    }


def _deployment(launch: Launch, name: str) -> dict[str, Any]:
    ready_path = ROUTER_READY_PATH if launch.ranks.replicas > 1 else READY_PATH
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "replicas": 1,
            "strategy": {"type": "Recreate"},
            "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": _metadata(launch, name), "spec": _pod(launch, name, ready_path)},
        },
    }


def _metadata(launch: Launch, name: str) -> dict[str, Any]:
    metadata: dict[str, Any] = {"labels": {"app": name}}
    if launch.metrics_port is not None:
        metadata["annotations"] = {"prometheus.io/scrape": "true", "prometheus.io/port": str(launch.metrics_port)}
    return metadata


def _pod(launch: Launch, name: str, ready_path: str) -> dict[str, Any]:
    return {
        "terminationGracePeriodSeconds": 60,
        "containers": [_container(launch, name, ready_path)],
        "volumes": _volumes(launch),
    }


def _liveness(launch: Launch) -> dict[str, Any]:
    """The last resort: the launcher detects a hang and restarts the server, unless it hangs itself."""
    longest_s = launch.hang_timeout_s + launch.start_timeout_s + START_SPARE_S
    return _probe(HEALTH_PATH) | {"failureThreshold": round(longest_s / PROBE_PERIOD_S)}


def _probe(path: str) -> dict[str, Any]:
    """Over HTTP, on a route that needs no key."""
    seconds = {"periodSeconds": PROBE_PERIOD_S, "timeoutSeconds": PROBE_TIMEOUT_S}
    return {"httpGet": {"path": path, "port": "http"}, **seconds}


def _container(launch: Launch, name: str, ready_path: str) -> dict[str, Any]:
    cards = {"nvidia.com/gpu": launch.ranks.here} if launch.device == "cuda" else {}
    bounds = {"memory": f"{launch.memory_gib}Gi"} | cards
    ready = _probe(ready_path)
    container: dict[str, Any] = {
        "name": "server",
        "image": f"kt-launch:{launch.version}",
        "args": [_literal(word) for word in launch.words(host="0.0.0.0", restarts=5)],
        "ports": [{"name": "http", "containerPort": launch.port}],
        "resources": {"requests": {"cpu": str(launch.cpus), **bounds}, "limits": bounds},
        "startupProbe": ready | {"failureThreshold": round((launch.start_timeout_s + START_SPARE_S) / PROBE_PERIOD_S)},
        "readinessProbe": ready,
        "livenessProbe": _liveness(launch),
        "volumeMounts": [
            *({"name": name, "mountPath": path, "readOnly": True} for name, path, _ in _of_node(launch)),
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


def _of_node(launch: Launch) -> Iterator[tuple[str, str, str]]:
    """Name, path and type of what is mounted from the node."""
    yield from ((f"folder-{number}", path, "Directory") for number, path in enumerate(launch.folders))
    yield from ((f"key-{number}", path, "File") for number, path in enumerate(launch.key_files))


def _volumes(launch: Launch) -> list[dict[str, Any]]:
    return [
        *({"name": name, "hostPath": {"path": path, "type": kind}} for name, path, kind in _of_node(launch)),
        {"name": "runs", "emptyDir": {}},
        {"name": "cache", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}},
    ]


def _service(launch: Launch, name: str, leader: bool = False) -> dict[str, Any]:
    selector = {"app": name} | ({"leaderworkerset.sigs.k8s.io/worker-index": "0"} if leader else {})
    port = {"name": "http", "port": launch.port, "targetPort": "http"}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {"selector": selector, "ports": [port]},
    }


def _literal(text: str) -> str:
    """Kubernetes reads $(NAME) in arguments as a variable."""
    return text.replace("$(", "$$(")
