"""A client under constant load: `python load.py TARGET`. Stops when its standard input ends.

Prints one line of JSON at the end: the number of successful calls for each version, and the errors of the others.
"""

import collections
import json
import sys
import threading
import time

import numpy as np

from serving.client import Client, ClientError

NUM_CALLERS = 4
PAUSE_S = 0.02


def call(client: Client, stop: threading.Event, answered: collections.Counter[str], failed: list[str]) -> None:
    """Calls in a loop, and checks each answer: ten probabilities that add up to 1."""
    images = np.zeros((1, 1, 28, 28), np.uint8)
    while not stop.wait(PAUSE_S):
        try:
            answer = client.infer("mnist", {"images": images}, timeout_s=20)
            assert abs(float(answer["probabilities"].sum()) - 1) < 1e-3
            answered[answer.version] += 1
        except (ClientError, AssertionError) as error:
            failed.append(f"{time.strftime('%H:%M:%S')} {error}")


def main(target: str) -> None:
    """Calls until standard input ends."""
    stop, answered, failed = threading.Event(), collections.Counter[str](), list[str]()
    with Client(target) as client:
        callers = [threading.Thread(target=call, args=(client, stop, answered, failed)) for _ in range(NUM_CALLERS)]
        for caller in callers:
            caller.start()
        sys.stdin.read()
        stop.set()
        for caller in callers:
            caller.join()
    print(json.dumps({"answered": answered, "failed": failed}))


if __name__ == "__main__":
    main(sys.argv[1])
