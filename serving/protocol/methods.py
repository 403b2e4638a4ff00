"""Full names of the gRPC services and methods that the server answers."""

CONTROL_SERVICE = "convoy.models.ModelControl"
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
) + tuple(f"/{CONTROL_SERVICE}/{name}" for name in ("Promote", "RollBack", "Pin", "Unpin"))
"""Methods that change the server, those included that this server does not support."""
HEALTH_CHECK = f"/{HEALTH_SERVICE}/Check"
HEALTH_WATCH = f"/{HEALTH_SERVICE}/Watch"
