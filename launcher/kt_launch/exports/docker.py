"""A Dockerfile, built in a checkout of the product (docker build -f Dockerfile <checkout>). It holds no model."""

from __future__ import annotations

import json
import shlex

from kt_launch.exports import HEALTH_EVERY_S, PROBE_TIMEOUT_S, Launch
from kt_launch.watching.readiness import PROBE

CPU_BASE = """\
FROM python:3.12-slim
# The compiler of the day will do.
# hadolint ignore=DL3008
RUN apt-get update \\
 && apt-get install -y --no-install-recommends build-essential \\
 && rm -rf /var/lib/apt/lists/*"""
CUDA_BASE = """\
# The full image, since SGLang's kernels are compiled for the GPU when they are first used.
FROM python:3.12"""
FILE = """\
# docker build -t kt-launch:{version} -f Dockerfile <checkout of kt-launch>
# docker run --init --shm-size 8g{rights}{gpus} -p {port}:{port}{mounts}{secrets} kt-launch:{version}
{base}
WORKDIR /opt/kt-launch
COPY Makefile pyproject.toml README.md LICENSE ./
COPY requirements/ requirements/
COPY conf/ conf/
COPY demo/ demo/
COPY launcher/ launcher/
COPY kernels/ kernels/
COPY plugins/ plugins/
RUN make install PYTHON=python3 SGLANG={sglang}
ENV PATH=/opt/kt-launch/.venv/bin:$PATH \\
    KT_LAUNCH_RUNS=/var/lib/kt-launch/runs \\
    KT_LAUNCH_CACHE=/var/cache/kt-launch \\
    PYTHONUNBUFFERED=1
VOLUME ["/var/lib/kt-launch", "/var/cache/kt-launch"]
EXPOSE {ports}
STOPSIGNAL SIGTERM
HEALTHCHECK --interval={every}s --timeout={timeout}s --start-period={start}s CMD {probe}
ENTRYPOINT ["kt-launch"]
CMD {words}
"""


def write(launch: Launch) -> str:
    launch = launch.in_container()
    cuda = launch.device == "cuda"
    ports = [str(port) for port in (launch.port, launch.metrics_port) if port is not None]
    return FILE.format(
        version=launch.version,
        base=CUDA_BASE if cuda else CPU_BASE,
        sglang="gpu" if cuda else "cpu",
        rights=" --cap-add SYS_NICE" if launch.pools > 1 else "",
        gpus=" --gpus all" if cuda else "",
        mounts="".join(f" -v {shlex.quote(f'{folder}:{folder}:ro')}" for folder in launch.mounted),
        secrets="".join(f" -e {name}" for name in launch.secrets),
        port=launch.port,
        ports=" ".join(ports),
        every=HEALTH_EVERY_S,
        timeout=PROBE_TIMEOUT_S,
        probe=json.dumps(PROBE),
        start=f"{launch.start_timeout_s:.0f}",
        words=json.dumps(launch.words(host="0.0.0.0", restarts=5), ensure_ascii=False),
    )
