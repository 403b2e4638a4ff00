"""Full names of the gRPC services and methods that the server answers."""

INFERENCE_SERVICE = "inference.GRPCInferenceService"
HEALTH_SERVICE = "grpc.health.v1.Health"

INFER = f"/{INFERENCE_SERVICE}/ModelInfer"
STREAM_INFER = f"/{INFERENCE_SERVICE}/ModelStreamInfer"
CHANGES = tuple(
    f"/{INFERENCE_SERVICE}/{name}"
    for name in (
        "RepositoryModelLoad",
        "RepositoryModelUnload",
        "SystemSharedMemoryRegister",
        "SystemSharedMemoryUnregister",
        "CudaSharedMemoryRegister",
        "CudaSharedMemoryUnregister",
        "TraceSetting",
        "LogSettings",
    )
)
"""Methods that change the server, those included that this server does not support."""
HEALTH_CHECK = f"/{HEALTH_SERVICE}/Check"
HEALTH_WATCH = f"/{HEALTH_SERVICE}/Watch"
