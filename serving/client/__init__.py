"""Ask a server of the Open Inference Protocol: `Client` from Python, `python -m serving.client` from the shell.

Knows the protocol and nothing of our server: whatever speaks it with Triton's ModelConfig and classification extension
will do.
"""

from serving.client.client import Client
from serving.client.connection import Tls
from serving.client.errors import ClientError
from serving.client.results import Answer, Classification, ModelState, Prediction

__all__ = ["Answer", "Classification", "Client", "ClientError", "ModelState", "Prediction", "Tls"]
