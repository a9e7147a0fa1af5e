# The CUDA image: `make docker` builds it, `make docker-train` trains in it.
#
# torch's wheels bring CUDA, cuDNN and NCCL with them, and the host brings the driver through the NVIDIA container toolkit,
# so a plain Python image is enough; a CUDA image would add a second CUDA, gigabytes that nothing loads.
# To build from the very same base every time, name it by digest: --build-arg BASE_IMAGE=python@sha256:...
ARG BASE_IMAGE=python:3.12-slim-bookworm
FROM ${BASE_IMAGE}

# make runs the targets; torch.compile calls the compilers while it trains.
# hadolint ignore=DL3008 # Debian keeps only the newest patch of a package: a pinned version could not be installed for long
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ gcc libc6-dev make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

# The lock alone decides this layer, so that a change of the source does not install torch again.
COPY requirements.lock ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip install --require-hashes --no-deps --only-binary :all: -r requirements.lock

COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip install --no-deps --no-build-isolation -e .
COPY Makefile ./
COPY configs ./configs
COPY scripts ./scripts

# Whatever user id `docker run --user` gives can write here. The temporary folder lies in the run folder because a
# checkpoint written there can be renamed into place; across two file systems it would be copied, and could be torn.
RUN mkdir -p data runs/.tmp /home/onestage/.cache \
    && chmod 1777 data runs runs/.tmp /home/onestage /home/onestage/.cache
VOLUME ["/app/data", "/app/runs"]

# ONESTAGE_ENV tells the Makefile to use this environment and to install nothing. USER answers getpass for an id that
# has no name. The two NVIDIA variables are what the container toolkit reads.
ENV ONESTAGE_ENV=/opt/venv \
    HOME=/home/onestage \
    USER=onestage \
    TMPDIR=/app/runs/.tmp \
    XDG_CACHE_HOME=/home/onestage/.cache \
    TORCH_HOME=/home/onestage/.cache/torch \
    TORCHINDUCTOR_CACHE_DIR=/home/onestage/.cache/inductor \
    TRITON_CACHE_DIR=/home/onestage/.cache/triton \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

USER 10001:10001
STOPSIGNAL SIGTERM
# A training run answers no requests: it ends, or it does not.
HEALTHCHECK NONE
ENTRYPOINT ["onestage"]
CMD ["--help"]
