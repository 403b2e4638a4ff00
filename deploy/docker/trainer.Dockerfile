# The trainer. VARIANT=gpu, the default, has CUDA and NCCL from torch's wheels (the driver comes from the host) and the
# C++ compiler and headers with which Triton and torch.compile make kernels. VARIANT=cpu has neither, and needs the address
# of PyTorch's wheels for CPUs: the one that PyTorch's page "Get started" shows for pip, Linux and CPU.
#   sh deploy/docker/images.sh trainer-gpu; TORCH_INDEX=https://... sh deploy/docker/images.sh trainer
# BASE: see serving.Dockerfile.
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS build
ARG VARIANT=gpu
ARG TORCH_CPU="torch==2.15.0+cpu torchvision==0.29.2+cpu"
ARG TORCH_INDEX=""
WORKDIR /build
COPY deploy/docker/sbom.lock ./
RUN python -m venv /opt/sbom \
 && /opt/sbom/bin/python -m pip install --quiet --no-cache-dir --require-hashes --only-binary=:all: -r sbom.lock
COPY deploy/docker/trainer-${VARIANT}.lock requirements.lock
# hadolint ignore=SC2086
RUN python -m venv /opt/convoy \
 && if [ "${VARIANT}" = cpu ]; then /opt/convoy/bin/python -m pip install --quiet --no-cache-dir --no-compile --no-deps \
      --only-binary=:all: ${TORCH_INDEX:+--index-url="${TORCH_INDEX}"} ${TORCH_CPU} \
      || { echo "error: --build-arg TORCH_INDEX=, the address of PyTorch's wheels for CPUs" >&2; exit 1; }; fi \
 && /opt/convoy/bin/python -m pip install --quiet --no-cache-dir --no-compile --require-hashes --only-binary=:all: -r requirements.lock
COPY pyproject.toml README.md deploy/docker/finish.sh ./
COPY convoy ./convoy
COPY protos ./protos
COPY trainer ./trainer
RUN /opt/convoy/bin/python -m pip install --quiet --no-cache-dir --no-compile --no-deps --no-build-isolation . \
 && sh finish.sh pip

FROM ${BASE}
ARG BASE
ARG VARIANT=gpu
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="convoy-trainer" \
      org.opencontainers.image.description="Trains and exports image-classification models" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE}"
# The official image has Python's headers; Debian's Python needs a package for them.
# hadolint ignore=DL3008,SC2086
RUN if [ "${VARIANT}" = gpu ]; then \
      headers=$(python -c "import os, sysconfig; print('' if os.path.exists(sysconfig.get_path('include') + '/Python.h') else 'python3-dev')") \
      && apt-get update -q && apt-get install -q -y --no-install-recommends g++ libc6-dev ${headers} \
      && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/*; fi
COPY --from=build /opt/convoy /opt/convoy
ENV PATH=/opt/convoy/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    ORT_DISABLE_TELEMETRY=1
WORKDIR /tmp
USER 10001:10001
# Exec form: Python is process 1, and SIGTERM reaches it.
ENTRYPOINT ["python", "-m", "trainer.launch", "-m", "trainer.main"]
