"""What a user of Triton writes to serve an ONNX model from its Python backend, of tensors or of image files.

`serving_images.py` copies it into a model repository. Of the configuration's parameters, `onnx` is the model's path and
`decoder` what decodes image files: pillow or simplejpeg; without it, the input holds pixels. Images are prepared as
Convoy does: the shorter side is resized, and the centre cropped.
"""

import io
import json

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb


def open_with_pillow(data):
    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")


def open_with_simplejpeg(data):
    import simplejpeg
    from PIL import Image

    return Image.fromarray(simplejpeg.decode_jpeg(data))


DECODERS = {"pillow": open_with_pillow, "simplejpeg": open_with_simplejpeg}


class TritonPythonModel:
    """Triton's interface of a model in Python."""

    def initialize(self, args):
        """Opens the model."""
        parameters = json.loads(args["model_config"])["parameters"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = parameters["onnx"]["string_value"]
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.size = self.session.get_inputs()[0].shape[2:]
        self.outputs = [tensor.name for tensor in self.session.get_outputs()]
        self.open = DECODERS[parameters["decoder"]["string_value"]] if "decoder" in parameters else None

    def execute(self, requests):
        """Runs all requests as one batch."""
        given = [pb.get_input_tensor_by_name(request, "images").as_numpy() for request in requests]
        if self.open is not None:
            given = [np.stack([self.prepare(data) for data in files.ravel()]) for files in given]
        results = self.session.run(self.outputs, {"images": np.concatenate(given)})
        responses, row = [], 0
        for rows in map(len, given):
            parts = [
                pb.Tensor(name, result[row : row + rows]) for name, result in zip(self.outputs, results, strict=True)
            ]
            responses.append(pb.InferenceResponse(parts))
            row += rows
        return responses

    def prepare(self, data):
        """Returns the pixels of one file, [3, height, width]."""
        image = self.open(data)
        height, width = self.size
        scale = max(width / image.width, height / image.height)
        resized = image.resize((round(image.width * scale), round(image.height * scale)), 2)  # bilinear
        left, top = (resized.width - width) // 2, (resized.height - height) // 2
        return np.asarray(resized.crop((left, top, left + width, top + height))).transpose(2, 0, 1)
