# The trainer, for CPUs and GPUs: torch's wheels contain CUDA and NCCL, the driver comes from the host.
#   docker build -f deploy/docker/trainer.Dockerfile --build-arg BASE=docker.io/library/python:3.11-slim-bookworm@sha256:... \
#     -t registry.example.com/convoy/trainer:0.2.0 .
# BASE has no default: see serving.Dockerfile. For GPUs take a base with a C compiler, such as python:3.11-bookworm: Triton
# needs it for our kernels. Without one a warning says so, and steps are slower.
ARG BASE

FROM ${BASE} AS build
ARG BASE
RUN case "${BASE}" in *@sha256:????????????????????????????????????????????????????????????????) ;; \
      *) echo "error: --build-arg BASE=image@sha256:digest, not '${BASE}'" >&2; exit 1 ;; esac
WORKDIR /build
RUN python -m venv /opt/convoy
COPY deploy/docker/trainer.lock requirements.lock
RUN /opt/convoy/bin/python -m pip install --quiet --no-cache-dir --require-hashes --only-binary=:all: -r requirements.lock
COPY pyproject.toml README.md ./
COPY convoy ./convoy
COPY protos ./protos
COPY trainer ./trainer
RUN /opt/convoy/bin/python -m pip install --quiet --no-cache-dir --no-deps --no-build-isolation . \
 && /opt/convoy/bin/python -m pip uninstall --quiet --yes pip

FROM ${BASE}
LABEL org.opencontainers.image.title="convoy-trainer" \
      org.opencontainers.image.description="Trains and exports image-classification models"
COPY --from=build /opt/convoy /opt/convoy
ENV PATH=/opt/convoy/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp
WORKDIR /tmp
USER 10001:10001
# Exec form: Python is process 1, and SIGTERM reaches it.
ENTRYPOINT ["python", "-m", "trainer.launch", "-m", "trainer.main"]
