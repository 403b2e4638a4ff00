"""The ONNX graph made ready for ONNX Runtime on the CPU, and rid of what tells of the machine that made it."""

import onnx


def finish_graph(model: onnx.ModelProto) -> bytes:
    """The same computation as a file's content, without names of source files, stack traces and derived shapes."""
    final = onnx.ModelProto()
    final.CopyFrom(model)
    final.ClearField("metadata_props")
    final.graph.ClearField("value_info")
    graph = final.graph
    for part in (graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    onnx.checker.check_model(final, full_check=True)
    return final.SerializeToString(deterministic=True)
