"""An actor that imports next to nothing, so that it starts quickly."""

import os
import time


class Worker:
    """An actor that says who did its work."""

    def work(self, seconds: float, value: int) -> tuple[int, int]:
        time.sleep(seconds)
        return value, os.getpid()

    def die(self) -> None:
        os._exit(1)
