"""An actor that imports next to nothing, so that it starts quickly."""

import os
import time


class Worker:
    """An actor that holds weights and says with which it worked."""

    def __init__(self) -> None:
        self.weights = ""

    def load(self, weights: str) -> str:
        self.weights = weights
        return weights

    def work(self, seconds: float, value: int) -> tuple[int, str, int]:
        time.sleep(seconds)
        return value, self.weights, os.getpid()

    def die(self) -> None:
        os._exit(1)
