# kt-launch without a GPU, with its demo model:   docker build -t kt-launch .
# (--build-arg EXTRA_INDEX=<URL of an index with CPU builds of torch> makes it smaller)
#   docker run --init --shm-size 8g -p 127.0.0.1:30000:30000 kt-launch
#   docker run --init --shm-size 8g -p 127.0.0.1:30000:30000 -v /models:/models:ro kt-launch model=/models/…
# An image for a launch of yours, or with a GPU: kt-launch export export.format=docker
FROM python:3.12-slim
# The compiler of the day will do.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends build-essential \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/kt-launch
COPY Makefile pyproject.toml README.md LICENSE ./
COPY requirements/ requirements/
COPY conf/ conf/
COPY demo/ demo/
COPY launcher/ launcher/
COPY kernels/ kernels/
COPY plugins/ plugins/
ARG EXTRA_INDEX=
RUN make install PYTHON=python3 SGLANG=cpu EXTRA_INDEX=$EXTRA_INDEX
ENV PATH=/opt/kt-launch/.venv/bin:$PATH \
    KT_LAUNCH_RUNS=/var/lib/kt-launch/runs \
    KT_LAUNCH_CACHE=/var/cache/kt-launch \
    PYTHONUNBUFFERED=1
VOLUME ["/var/lib/kt-launch", "/var/cache/kt-launch"]
EXPOSE 30000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=600s CMD ["python", "-P", "-m", "kt_launch.watching.readiness"]
# The port is published on the host's loopback address above; a key is needed where it is published elsewhere.
ENTRYPOINT ["kt-launch", "server.host=0.0.0.0", "server.port=30000", "server.open=true"]
