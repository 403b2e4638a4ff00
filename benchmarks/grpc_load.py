"""One client process that keeps requests in flight: a program that takes turns (`turns.py`).

    python benchmarks/grpc_load.py TARGET PAYLOAD SECONDS IN_FLIGHT

PAYLOAD is a file that holds a serialised ModelInferRequest. Its first run warms up; each later one lasts SECONDS and
returns the microseconds of each request.
"""

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from h2load import INFER
from turns import serve

WARM_UP_S = 0.3
TIMEOUT_S = 60


def main() -> None:
    target, payload, seconds, in_flight = sys.argv[1:]
    message = Path(payload).read_bytes()
    with grpc.insecure_channel(target, [("grpc.max_send_message_length", -1)]) as channel:
        infer = channel.unary_unary(INFER)

        def send() -> object:
            return infer(message, timeout=TIMEOUT_S)

        send()
        serve({}, lambda number: load(send, float(seconds) if number else WARM_UP_S, int(in_flight)))


def load(send: Callable[[], object], seconds: float, in_flight: int) -> dict[str, Any]:
    """Sends from that many threads until the time is over. Returns what each request that ended in it took."""
    until = time.perf_counter() + seconds
    times: list[float] = []

    def work() -> None:
        while True:
            began = time.perf_counter()
            send()
            ended = time.perf_counter()
            if ended > until:
                return
            times.append((ended - began) * 1e6)

    threads = [threading.Thread(target=work) for _ in range(in_flight)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"seconds": seconds, "times_us": times}


if __name__ == "__main__":
    main()
