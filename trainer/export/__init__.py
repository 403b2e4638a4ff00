"""Turns a trained run into a version of a model repository, ready to be served. Start reading at `pipeline`.

The rest of the trainer imports neither onnx nor onnxruntime: importing them takes a second, and training does not
need them.
"""
