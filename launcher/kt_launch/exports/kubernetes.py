"""A Deployment and its Service for the image of the Dockerfile, with the folders of the node it was exported on."""

from __future__ import annotations

import json
from collections.abc import Iterable

from kt_launch.exports import Launch

PROBE_PERIOD_S = 10
FILE = """\
# kubectl apply -f <this file>; the folders below must be on the node (or put a volume of another kind in their place).
{secret_note}apiVersion: apps/v1
kind: Deployment
metadata:
  name: {name}
  labels: {{app: {name}}}
spec:
  replicas: 1
  strategy: {{type: Recreate}} # two at once would need twice the memory
  selector:
    matchLabels: {{app: {name}}}
  template:
    metadata:
      labels: {{app: {name}}}
{annotations}    spec:
      terminationGracePeriodSeconds: 60
      containers:
        - name: server
          image: kt-launch:{version}
          args:
{args}
          ports:
{ports}
{env}{rights}          resources:
            requests: {{cpu: "{cpu}", memory: {memory}Gi{gpu}}}
            limits: {{memory: {memory}Gi{gpu}}}
          startupProbe:
            tcpSocket: {{port: http}}
            periodSeconds: {period}
            failureThreshold: {failures}
          readinessProbe:
            tcpSocket: {{port: http}}
          volumeMounts:
{mounts}
      volumes:
{volumes}
---
apiVersion: v1
kind: Service
metadata:
  name: {name}
spec:
  selector: {{app: {name}}}
  ports:
    - {{name: http, port: {port}, targetPort: http}}
"""
SECRET_NOTE = "# First: kubectl create secret generic {name} {literals}\n"
RIGHTS = """\
          securityContext: {capabilities: {add: [SYS_NICE]}} # each pool's memory lies on its own NUMA node
"""
ANNOTATIONS = """\
      annotations: {{prometheus.io/scrape: "true", prometheus.io/port: "{port}"}}
"""


def write(launch: Launch) -> str:
    name = f"kt-launch-{launch.label}"
    gpu = ", nvidia.com/gpu: 1" if launch.device == "cuda" else ""
    return FILE.format(
        name=name,
        version=launch.version,
        secret_note=_secret_note(launch, name),
        annotations=ANNOTATIONS.format(port=launch.metrics_port) if launch.metrics_port is not None else "",
        args=_lines(f"            - {_text(word)}" for word in launch.words(host="0.0.0.0", restarts=5)),
        ports=_lines(_ports(launch)),
        env=_env(launch, name),
        rights=RIGHTS if launch.pools > 1 else "",
        cpu=launch.threads + 1,
        memory=launch.memory_gib,
        gpu=gpu,
        period=PROBE_PERIOD_S,
        failures=max(1, round(launch.start_timeout_s / PROBE_PERIOD_S)),
        mounts=_lines(_mounts(launch)),
        volumes=_lines(_volumes(launch)),
        port=launch.port,
    )


def _secret_note(launch: Launch, name: str) -> str:
    literals = " ".join(f"--from-literal={secret}=…" for secret in launch.secrets)
    return SECRET_NOTE.format(name=name, literals=literals) if launch.secrets else ""


def _ports(launch: Launch) -> Iterable[str]:
    yield f"            - {{name: http, containerPort: {launch.port}}}"
    if launch.metrics_port is not None:
        yield f"            - {{name: metrics, containerPort: {launch.metrics_port}}}"


def _env(launch: Launch, name: str) -> str:
    if not launch.secrets:
        return ""
    rows = [
        f"            - {{name: {secret}, valueFrom: {{secretKeyRef: {{name: {name}, key: {secret}}}}}}}"
        for secret in launch.secrets
    ]
    return _lines(["          env:", *rows]) + "\n"


def _mounts(launch: Launch) -> Iterable[str]:
    for number, folder in enumerate(launch.folders):
        yield f"            - {{name: folder-{number}, mountPath: {_text(folder)}, readOnly: true}}"
    yield "            - {name: runs, mountPath: /var/lib/kt-launch}"
    yield "            - {name: cache, mountPath: /var/cache/kt-launch}"
    yield "            - {name: shm, mountPath: /dev/shm}"


def _volumes(launch: Launch) -> Iterable[str]:
    for number, folder in enumerate(launch.folders):
        yield f"        - {{name: folder-{number}, hostPath: {{path: {_text(folder)}, type: Directory}}}}"
    yield "        - {name: runs, emptyDir: {}}"
    yield "        - {name: cache, emptyDir: {}}"
    yield "        - {name: shm, emptyDir: {medium: Memory, sizeLimit: 8Gi}}"


def _text(text: str) -> str:
    """A string of YAML; Kubernetes reads $(NAME) in arguments as a variable."""
    return json.dumps(text.replace("$(", "$$("), ensure_ascii=False)


def _lines(rows: Iterable[str]) -> str:
    return "\n".join(rows)
