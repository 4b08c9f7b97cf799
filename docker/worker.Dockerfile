# A worker: torch and Triton, for one NVIDIA GPU. From the repository's root:
# docker build -f docker/worker.Dockerfile -t graft-worker .
#
# The CUDA libraries come with torch's wheels, the driver from the NVIDIA container toolkit. Runs as an ordinary user
# with a read-only root file system and no capabilities; base models, quantised weights, compiled kernels and scratch
# space lie in /data. compose.yaml shows how.

FROM python:3.11-slim-bookworm AS build

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_CONSTRAINT=/src/constraints.txt

WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY api api
COPY worker worker
COPY kernels kernels
COPY migrations migrations
RUN python -m venv /opt/graft \
    && /opt/graft/bin/python -m pip install '.[worker,s3]'


FROM python:3.11-slim-bookworm

LABEL org.opencontainers.image.title="Graft worker" \
      org.opencontainers.image.licenses="Apache-2.0"

# Triton compiles a small launcher in C for each kernel. Versions are the distribution's own: its security updates are
# wanted, and no result depends on them.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/graft/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/data \
    GRAFT_DATA_DIR=/data \
    HF_HOME=/data/huggingface \
    TRITON_CACHE_DIR=/data/triton \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

RUN groupadd --system --gid 10001 graft \
    && useradd --system --uid 10001 --gid 10001 --no-create-home --home-dir /data --shell /usr/sbin/nologin graft \
    && install --directory --owner=10001 --group=10001 --mode=0700 /data

COPY --from=build /opt/graft /opt/graft

USER 10001:10001
WORKDIR /data
VOLUME /data
# SIGTERM saves the running job and gives it back: allow GRAFT_GRACE_SECONDS (30) and a little more before SIGKILL.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 CMD ["graft", "health", "worker"]
ENTRYPOINT ["graft"]
CMD ["worker"]
