"""The ONNX graph, rid of what tells of the machine that made it."""

import onnx


def clean(model: onnx.ModelProto) -> bytes:
    """The same computation as a file's content, without names of source files, stack traces and derived shapes."""
    final = onnx.ModelProto()
    final.CopyFrom(model)
    graph = final.graph
    for part in (final, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    graph.ClearField("value_info")
    for tensor in (*graph.input, *graph.output):
        tensor.type.tensor_type.shape.dim[0].dim_param = "batch"  # torch numbers its symbols, not always alike
    onnx.checker.check_model(final, full_check=True)
    content: bytes = final.SerializeToString(deterministic=True)
    return content
