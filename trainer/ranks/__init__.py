"""The ranks of a run: their world, collectives, rendezvous, heartbeats and failures. Start reading at `world`.

Only this package calls the collectives of `torch.distributed`.
"""
