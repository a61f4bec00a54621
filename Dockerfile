# Two images from one file:
#
#   docker build --target cpu  --tag medusa-server:cpu .
#   docker build --target cuda --tag medusa-server:cuda .
#
# Both stand on the slim Python image. torch's CUDA wheels bring every CUDA library along, so an nvidia/cuda base
# would only add a second copy of them (2 GB) and a Python of another version than the one that is tested; what
# the host has to give, the driver's libraries, comes in through NVIDIA's container toolkit.
ARG PYTHON_TAG=3.11.15-slim-bookworm

# A virtual environment without pip in it: the builder's own pip fills it, and only it travels on.
FROM python:${PYTHON_TAG} AS build
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PIP_PYTHON=/opt/medusa/bin/python
WORKDIR /src
RUN ["python", "-m", "venv", "--without-pip", "/opt/medusa"]
COPY constraints.txt pyproject.toml ./
# What the server needs, traces included, in a layer of its own that a change of code leaves as it is.
COPY deploy/docker/requirements.py deploy/docker/
RUN python deploy/docker/requirements.py pyproject.toml otel > requirements.txt

# Wheels of the default index carry gigabytes of CUDA, which run on a CPU as well. TORCH_INDEX names an index with
# CPU wheels, PyTorch's own (its installation page has the address) or a mirror, and makes the image 5 GB smaller.
FROM build AS build-cpu
ARG TORCH_INDEX=
RUN if [ -n "${TORCH_INDEX}" ]; then \
        python -m pip install --no-deps --index-url "${TORCH_INDEX}" --constraint constraints.txt torch; \
    fi \
    && python -m pip install --constraint constraints.txt torch --requirement requirements.txt
COPY README.md LICENSE NOTICE ./
COPY medusa_core medusa_core
COPY server server
RUN python -m pip install --no-deps . && python -m pip check

FROM build AS build-cuda
RUN python -m pip install --constraint constraints.txt torch --requirement requirements.txt
COPY README.md LICENSE NOTICE ./
COPY medusa_core medusa_core
COPY server server
RUN python -m pip install --no-deps . && python -m pip check

# What both images share. No pip in the environment, nothing writable but the volume and /tmp.
FROM python:${PYTHON_TAG} AS runtime
LABEL org.opencontainers.image.title="medusa-server" \
      org.opencontainers.image.description="OpenAI-compatible server that decodes with Medusa draft trees" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.2.0"
RUN groupadd --gid 10001 medusa \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin medusa \
    && install --directory --owner=10001 --group=10001 /models
# HOME is for libraries that insist on one; models and heads from the Hub go to the volume. Listening beyond
# loopback is right in here alone: what is reachable from outside is up to who publishes a port.
ENV PATH=/opt/medusa/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    HF_HOME=/models \
    MEDUSA_CACHE_DIR=/models/.medusa \
    MEDUSA_HOST=0.0.0.0 \
    MEDUSA_PORT=8000 \
    MEDUSA_METRICS_PORT=9400
COPY deploy/docker/healthcheck.py /opt/healthcheck.py
USER 10001:10001
WORKDIR /tmp
VOLUME ["/models"]
EXPOSE 8000 9400
STOPSIGNAL SIGTERM
# The start period covers the first download of a model; a check that succeeds ends it.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60m --retries=3 CMD ["python", "/opt/healthcheck.py"]
# As a list, so that no shell stands between a signal and the server.
ENTRYPOINT ["medusa"]
CMD ["serve"]

FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /opt/medusa /opt/medusa

# Last, so that a build without --target makes the image that runs everywhere. On a CPU the step is compiled, once
# for a machine: what comes of it stays in the volume.
FROM runtime AS cpu
USER 0:0
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
USER 10001:10001
COPY --from=build-cpu /opt/medusa /opt/medusa
