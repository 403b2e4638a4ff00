"""The path of an inference: request, plan, batcher, response.

`service` takes requests from the front ends, and runs each in the `pipeline` of its protocol: a `plan` checks it
against its model version, or the `plan_cache` has that of an earlier one; a `bound_request` has its inputs. The
`batcher` queues it (`request_queue`, `priority_queue`) and forms a `batch`, which an `instance` computes on its
backend; `outputs` checks the results, and each request gets its rows as a response (`answers`).
"""
