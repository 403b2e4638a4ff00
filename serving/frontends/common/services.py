"""The services that front ends make available."""

from dataclasses import dataclass

from serving.inference.service import InferenceService
from serving.protocol.admin import AdminService


@dataclass(frozen=True, slots=True)
class Services:
    """The services of one server.

    Args:
        inference: runs ModelInfer.
        admin: answers all other RPCs.
    """

    inference: InferenceService
    admin: AdminService
