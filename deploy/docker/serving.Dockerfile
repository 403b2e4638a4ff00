# The server, without torch: ONNX models only. VARIANT=gpu adds CUDA's libraries, from wheels; the driver comes from the host.
#   sh deploy/docker/images.sh serving serving-gpu
#   docker build -f deploy/docker/serving.Dockerfile [--build-arg VARIANT=gpu] -t registry.example.com/convoy/serving:0.2.0 .
# In production give the base by digest: --build-arg BASE=docker.io/library/python:3.11-slim-bookworm@sha256:...
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS build
ARG VARIANT=cpu
WORKDIR /build
COPY deploy/docker/sbom.lock ./
RUN python -m venv /opt/sbom \
 && /opt/sbom/bin/python -m pip install --quiet --no-cache-dir --require-hashes --only-binary=:all: -r sbom.lock
COPY deploy/docker/serving-${VARIANT}.lock requirements.lock
RUN python -m venv /opt/convoy \
 && /opt/convoy/bin/python -m pip install --quiet --no-cache-dir --no-compile --require-hashes --only-binary=:all: -r requirements.lock
COPY pyproject.toml README.md deploy/docker/finish.sh ./
COPY convoy ./convoy
COPY protos ./protos
COPY serving ./serving
RUN /opt/convoy/bin/python -m pip install --quiet --no-cache-dir --no-compile --no-deps --no-build-isolation . \
 && sh finish.sh setuptools pip

FROM ${BASE}
ARG BASE
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="convoy-serving" \
      org.opencontainers.image.description="Serves image-classification models over gRPC and HTTP" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE}"
COPY --from=build /opt/convoy /opt/convoy
ENV PATH=/opt/convoy/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    ORT_DISABLE_TELEMETRY=1
WORKDIR /tmp
USER 10001:10001
EXPOSE 8000 8001 8002
# Exec form: Python is process 1, and SIGTERM reaches it.
ENTRYPOINT ["python", "-m", "serving"]
CMD ["--model-repository=/models", "--host=0.0.0.0"]
