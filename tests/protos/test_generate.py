"""The committed modules match their sources, and define all RPCs."""

from pathlib import Path

from protos import grpc_service_pb2, health_pb2
from protos.generate import SOURCES, generate
from protos.pool import POOL

_PACKAGE = Path(grpc_service_pb2.__file__).parent


def test_committed_modules_match_their_sources(tmp_path):
    generate(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(file.name for file in _PACKAGE.glob("*_pb2.py*"))
    for file in tmp_path.iterdir():
        assert file.read_text() == (_PACKAGE / file.name).read_text(), "run python -m protos.generate"


def test_every_source_is_generated():
    assert {file.stem for file in _PACKAGE.glob("*.proto")} == set(SOURCES)


def test_service_has_twenty_rpcs():
    service = POOL.FindServiceByName("inference.GRPCInferenceService")
    assert len(service.methods) == 20
    for method in service.methods:
        streams = method.name == "ModelStreamInfer"
        request = "ModelInferRequest" if streams else f"{method.name}Request"
        assert (method.input_type.name, method.output_type.name) == (request, f"{method.name}Response")
        assert (method.client_streaming, method.server_streaming) == (streams, streams)


def test_only_watch_of_health_is_a_stream():
    service = POOL.FindServiceByName("grpc.health.v1.Health")
    assert service.full_name == health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
    assert [(method.name, method.server_streaming) for method in service.methods] == [("Check", False), ("Watch", True)]
