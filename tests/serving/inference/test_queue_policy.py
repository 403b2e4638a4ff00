"""What the parameters `priority` and `timeout` of a request mean: a deadline, or a time in the queue."""

import pytest

from serving.errors import InvalidArgument
from serving.inference.queue_policy import QueuePolicies, QueuePolicy, Scheduling, scheduling_of

POLICIES = QueuePolicies(
    (QueuePolicy(timeout_us=500), QueuePolicy(timeout_us=500, allows_override=True), QueuePolicy(delays=True)),
    default=1,
)


@pytest.mark.parametrize(
    ("parameters", "policies", "expected"),
    [
        ({"timeout": 0, "priority": 1}, None, Scheduling()),
        ({"timeout": 2_500_000, "priority": 1}, None, Scheduling(timeout_s=2.5)),
        ({"timeout": 2_500_000, "priority": 1}, POLICIES, Scheduling(0, 500, 2.5)),
        ({"timeout": 100, "priority": 2}, POLICIES, Scheduling(1, 100)),
        ({"timeout": 100, "priority": 3}, POLICIES, Scheduling(2, 0)),
        ({}, POLICIES, Scheduling(1, 500)),
    ],
)
def test_a_time_out_is_a_deadline_unless_a_policy_interprets_it(
    parameters: dict[str, int], policies: QueuePolicies | None, expected: Scheduling
) -> None:
    assert scheduling_of(parameters, policies) == expected


@pytest.mark.parametrize("value", [-1, True, 1.0, "7"])
def test_a_time_out_is_a_whole_number(value: object) -> None:
    with pytest.raises(InvalidArgument, match=r"^parameter 'timeout' must be a whole number of microseconds, got "):
        scheduling_of({"timeout": value}, None)
