"""The path of an inference: request, plan, batcher, response.

`service` takes requests from the front ends. A `plan` checks one against its model version; `plan_cache` keeps plans
for requests of the same form. The `batcher` queues requests (`request_queue`, `priority_queue`) and forms a `batch`,
which an `instance` computes on its backend; `outputs` checks the results, and each request gets its rows as a response.
"""
