"""A trained model made into a version of a model repository, for servers. `pipeline` is the table of contents.

Nothing else in the trainer imports onnx and onnxruntime: they take a second, which a training need not wait for.
"""
