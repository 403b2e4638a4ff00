"""Mutated messages for every front end, each with the response that is right for it.

`requests` makes valid requests, `wire`, `protobuf_mutations` and `json_mutations` change them, `oracle` says which
responses are right, `messages` puts these together: a message depends on a seed and a number alone. `senders` sends
messages, many at a time. Used by `tests/serving/test_conformance_fuzz.py` and `benchmarks/fuzz.py`.
"""
