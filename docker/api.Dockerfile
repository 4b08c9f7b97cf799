# The API: no torch, no GPU. Built from the repository's root: docker build -f docker/api.Dockerfile -t graft-api .
#
# Runs as an ordinary user with a read-only root file system, no capabilities, and /tmp as a tmpfs (uploads pass through
# it). compose.yaml shows how.

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
    && /opt/graft/bin/python -m pip install '.[s3]'


FROM python:3.11-slim-bookworm

LABEL org.opencontainers.image.title="Graft API" \
      org.opencontainers.image.licenses="Apache-2.0"

ENV PATH=/opt/graft/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/data \
    GRAFT_DATA_DIR=/data \
    GRAFT_HOST=0.0.0.0 \
    GRAFT_PORT=8000 \
    GRAFT_WORKERS=0

# /data is empty with PostgreSQL; with SQLite it holds the database, and needs a volume on a local disk.
RUN groupadd --system --gid 10001 graft \
    && useradd --system --uid 10001 --gid 10001 --no-create-home --home-dir /data --shell /usr/sbin/nologin graft \
    && install --directory --owner=10001 --group=10001 --mode=0700 /data

COPY --from=build /opt/graft /opt/graft

USER 10001:10001
WORKDIR /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 CMD ["graft", "health", "api"]
ENTRYPOINT ["graft"]
CMD ["serve"]
