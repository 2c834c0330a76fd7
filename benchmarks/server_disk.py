"""Fill the disk under a running server, and take its shared memory; check that streams survive the loss of ranks.

python benchmarks/server_disk.py --model tiny -pcp 2 --longest 1500 --output-json F

Two real disks of 1 MiB are mounted for this process and its children only (`unshare`). One holds the home, the
temporary folder and the server's log, the other is /dev/shm. What ranks share lies in memory without a name, which no
mount limits; a limit on the size of files stands for memory that is full.
"""

import asyncio
import os
import resource
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from server_common import Server, alone, arguments, requests, serve, stream, tiny_or, write
from server_faults import recovered

INSIDE = "TWOFOLD_INSIDE_A_NAMESPACE"


def fill(disk: Path) -> None:
    """Writes until there is no room for one byte."""
    with (disk / "full").open("wb", buffering=0) as file:
        for size in (1 << 12, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue


def limit_files(server: Server, size: int) -> None:
    """Of the server, and so of the ranks that it starts from now on."""
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


async def lose_ranks(server: Server, bodies: list[dict[str, Any]]) -> tuple[list[list[str]], float]:
    """Kills a rank under streams → what the streams said, and seconds until new ranks ran."""
    generated = server.metric("generation_tokens_total")
    async with server.async_client(timeout=600) as client:
        tasks = [asyncio.create_task(stream(client, body)) for body in bodies]
        while server.metric("generation_tokens_total") < generated + len(bodies):
            await asyncio.sleep(0.02)
        ranks = server.ranks()
        ranks[0].kill()
        seconds = await asyncio.to_thread(recovered, server, ranks)
        return [reading.texts for reading in await asyncio.gather(*tasks)], seconds


def trials(server: Server, disk: Path, bodies: list[dict[str, Any]]) -> dict[str, Any]:
    expected, result = alone(server, bodies), {}
    for state in ("full disk", "no shared memory either", "room again"):
        if state == "full disk":
            fill(disk)
            fill(Path("/dev/shm"))
        elif state == "no shared memory either":
            limit_files(server, 4096)
        else:
            limit_files(server, resource.RLIM_INFINITY)
            (disk / "full").unlink()
        texts, seconds = asyncio.run(lose_ranks(server, bodies))
        server.assert_idle()
        shared = all("twofold-weights" in Path(f"/proc/{rank.pid}/maps").read_text() for rank in server.ranks())
        same = sum(one == other for one, other in zip(texts, expected, strict=True))
        result[state] = {"streams": len(bodies), "same": same, "restart_seconds": seconds, "ranks_share_memory": shared}
        print(f"{state}: {result[state]}", file=sys.stderr)
    return result


def enter(args: Namespace) -> None:
    """Starts this program again in a namespace of its own."""
    command = ["unshare", "-rm", sys.executable, *sys.argv]
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        sys.exit("this needs `unshare -rm`, which is not allowed here")
    os.execvpe(command[0], command, os.environ | {INSIDE: "1"})


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--streams", type=int, default=24)
    args = parser.parse_args()
    if INSIDE not in os.environ:
        enter(args)
    with tempfile.TemporaryDirectory() as name:
        folder, disk = Path(name), Path(name, "disk")
        disk.mkdir()
        model = tiny_or(args.model, folder)
        for place in (disk, "/dev/shm"):
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place], check=True)
        os.environ |= {"HOME": str(disk), "TMPDIR": str(disk)}
        flags = ["-pcp", str(args.pcp), "--served-model-name", "model", *args.engine.split()]
        with serve(model, disk, *flags, faulty=False) as server:
            result = trials(server, disk, requests(args, args.streams))
        code = server.process.returncode
        subprocess.run(["umount", disk], check=True)
    write(args, {**result, "exit_code": code})
    well = all(one["same"] == one["streams"] for one in result.values()) and code == 0
    shared = [one["ranks_share_memory"] for one in result.values()]
    return 0 if well and shared == [True, False, True] else 1


if __name__ == "__main__":
    sys.exit(main())
