"""Convoy's trainer: images in, a trained and honestly evaluated classifier out. The flow is in `trainer.train`."""

import os

# Official builds of ONNX Runtime since 1.31 send usage data to their vendor, unless this is set before their import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
