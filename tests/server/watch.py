"""Measures, in a process of its own, how long a server keeps another client waiting: for /health and within a stream.

`python watch.py PORT` watches until its stdin is closed, then prints the longest waits in seconds.
"""

import http.client
import json
import sys
import threading
import time

BODY = {"prompt": [5], "max_tokens": 2000, "ignore_eos": True, "stream": True, "temperature": 0}


class Watch:
    def __init__(self, port: int) -> None:
        self.port, self.ended, self.health, self.stream = port, False, 0.0, 0.0

    def watch_health(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        while not self.ended:
            start = time.monotonic()
            connection.request("GET", "/health")
            assert connection.getresponse().read() == b'{"status":"ok"}'
            self.health = max(self.health, time.monotonic() - start)
            time.sleep(0.005)

    def watch_stream(self) -> None:
        while not self.ended:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
            connection.request("POST", "/v1/completions", json.dumps(BODY), {"Content-Type": "application/json"})
            response, last = connection.getresponse(), None
            while line := response.readline():
                if line.startswith(b"data: {"):
                    now = time.monotonic()
                    self.stream = max(self.stream, now - (last or now))
                    last = now
                    if self.ended:  # the last wait counts, too
                        break
            connection.close()


if __name__ == "__main__":
    watch = Watch(int(sys.argv[1]))
    threads = [threading.Thread(target=watch.watch_health), threading.Thread(target=watch.watch_stream)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    watch.health = watch.stream = 0.0  # the first of each have connections to make
    print("ready", flush=True)
    sys.stdin.read()
    watch.ended = True
    for thread in threads:
        thread.join()
    print(watch.health, watch.stream)
