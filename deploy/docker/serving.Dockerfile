# The server, without torch: ONNX models only.
#   docker build -f deploy/docker/serving.Dockerfile --build-arg BASE=docker.io/library/python:3.11-slim-bookworm@sha256:... \
#     [--build-arg VARIANT=gpu] -t registry.example.com/convoy/serving:0.2.0 .
# BASE has no default, and a tag alone is refused: look a digest up (docker buildx imagetools inspect
# python:3.11-slim-bookworm), review it and give it. The GPU variant has the same base: CUDA's libraries come from wheels,
# the driver from the host.
ARG BASE

FROM ${BASE} AS build
ARG BASE
ARG VARIANT=cpu
RUN case "${BASE}" in *@sha256:????????????????????????????????????????????????????????????????) ;; \
      *) echo "error: --build-arg BASE=image@sha256:digest, not '${BASE}'" >&2; exit 1 ;; esac
WORKDIR /build
RUN python -m venv /opt/convoy
COPY deploy/docker/serving-${VARIANT}.lock requirements.lock
RUN /opt/convoy/bin/python -m pip install --quiet --no-cache-dir --require-hashes --only-binary=:all: -r requirements.lock
COPY pyproject.toml README.md ./
COPY convoy ./convoy
COPY protos ./protos
COPY serving ./serving
RUN /opt/convoy/bin/python -m pip install --quiet --no-cache-dir --no-deps --no-build-isolation . \
 && /opt/convoy/bin/python -m pip uninstall --quiet --yes setuptools pip

FROM ${BASE}
LABEL org.opencontainers.image.title="convoy-serving" \
      org.opencontainers.image.description="Serves image-classification models over gRPC and HTTP"
COPY --from=build /opt/convoy /opt/convoy
ENV PATH=/opt/convoy/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp
WORKDIR /tmp
USER 10001:10001
EXPOSE 8000 8001 8002
# Exec form: Python is process 1, and SIGTERM reaches it.
ENTRYPOINT ["python", "-m", "serving"]
CMD ["--model-repository=/models", "--host=0.0.0.0"]
