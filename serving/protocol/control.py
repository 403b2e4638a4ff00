"""The service `convoy.models.ModelControl`: which version of a model serves, as messages and over bytes."""

from collections.abc import Callable, Mapping
from typing import Any

from google.protobuf.message import Message

from protos import models_pb2 as pb
from serving.errors import InvalidArgument, NotFound, quote
from serving.models.changes import Caller
from serving.models.group import Alone, Group
from serving.models.repository import IndexEntry, Repository
from serving.protocol.handling import handler
from serving.protocol.methods import CONTROL_SERVICE


class ControlService:
    """The RPCs that show and change which version of a model serves.

    Attributes:
        unary: as in `AdminService`; `blocking` as well.
        group: the processes that make the same changes.
    """

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self.group: Group = Alone()
        self.unary: Mapping[str, Callable[[bytes], bytes]] = {
            f"/{CONTROL_SERVICE}/ListModels": handler(pb.ListModelsRequest, lambda request: self.models(request.name))
        }
        self.blocking: Mapping[str, Callable[[bytes, Caller], bytes]] = {
            f"/{CONTROL_SERVICE}/Promote": self._change(pb.PromoteRequest, "promote"),
            f"/{CONTROL_SERVICE}/RollBack": self._change(pb.RollBackRequest, "rollback"),
            f"/{CONTROL_SERVICE}/Pin": self._change(pb.PinRequest, "pin"),
            f"/{CONTROL_SERVICE}/Unpin": self._change(pb.UnpinRequest, "unpin"),
        }

    def models(self, name: str = "") -> pb.ListModelsResponse:
        """Returns the state of one model; of all, if `name` is empty.

        Raises:
            NotFound: there is no such model.
        """
        response = pb.ListModelsResponse()
        entries: dict[str, list[IndexEntry]] = {}
        for entry in self._repository.index(False):
            entries.setdefault(entry.name, []).append(entry)
        if name and name not in entries:
            raise NotFound(f"unknown model {quote(name)}")
        for model, of_model in entries.items():
            if name in ("", model):
                response.models.append(self._state(model, of_model))
        return response

    def change(self, verb: str, name: str, version: int, caller: Caller) -> pb.ModelState:
        """Makes a change, and returns the model's state after it.

        Args:
            verb: promote, rollback, pin or unpin.
            version: to promote or pin, or to roll back from; 0 to roll back from whichever serves.
        """
        with self.group.changing("follow", name, caller):
            self._make_change(verb, name, version, caller)
        state: pb.ModelState = self.models(name).models[0]
        return state

    def _make_change(self, verb: str, name: str, version: int, caller: Caller) -> None:
        promotions = self._repository.promotions
        match verb:
            case "promote" | "pin":
                if version < 1:
                    raise InvalidArgument(f"{verb} needs a version from 1 on, got {version}")
                (promotions.promote if verb == "promote" else promotions.pin)(name, version, caller)
            case "rollback":
                promotions.roll_back(name, version, caller)
            case _:
                promotions.unpin(name, caller)

    def _change(self, kind: type[Message], verb: str) -> Callable[[bytes, Caller], bytes]:
        def respond(request: Any, caller: Caller) -> pb.ModelState:
            return self.change(verb, request.name, getattr(request, "version", 0), caller)

        return handler(kind, respond)

    def _state(self, name: str, entries: list[IndexEntry]) -> pb.ModelState:
        serving, standing = self._repository.standing(name)
        states = dict.fromkeys(standing.present, ("UNAVAILABLE", "not loaded"))
        states |= {int(entry.version): (entry.state, entry.reason) for entry in entries if entry.version}
        message = pb.ModelState(name=name, serving=serving or 0, before=standing.target(serving) or 0)
        message.reason = standing.unreadable or next((entry.reason for entry in entries if not entry.version), "")
        for version, (state, reason) in sorted(states.items()):
            message.versions.add(version=version, state=state, reason=reason)
        if (promotion := standing.promotion) is not None:
            message.promoted, message.pinned = promotion.version, promotion.pinned
            message.choice, message.time = promotion.describe(), promotion.time
        return message
