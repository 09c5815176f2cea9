"""The service under load: throughput beside the offline engine's, latency at 0.8 of capacity, overload at 5 times.

    python benchmarks/serve_load.py [MODEL_FOLDER] [--seconds 20] [--rounds 5] [--pictures FOLDER] [--killer SECONDS]
        [--engine auto] [--precision auto] [--peer fp32 bf16]

Without a folder, a ViT-Ti/16 at 224 with random weights. Every answer is compared with the offline prediction, and
the client's ledger (sent = answered + refused + failed) with the server's counters. The client shares the cores with
the service, so the service has less than the whole machine. Offline is `vitrail predict`'s own way (batches of 32 on
every core, decoding beside them) with the same engine in the same precision. `--peer` measures LitServe with
timm in the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Ledger:
    """What a client saw."""

    sent: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    answered: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    began: float = 0.0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Answers a second that came while requests were sent; those that were still in the queue then do not count."""
        return sum(moment <= self.began + self.seconds for moment in self.ended) / self.seconds

    def quantile(self, share: float, refused: bool = False) -> float:
        """Milliseconds."""
        times = sorted(self.refused if refused else self.answered)
        return 1000 * times[min(len(times) - 1, int(share * len(times)))] if times else float("nan")


class Client:
    """Keep-alive connections to one address; raw HTTP/1.1, so that it costs little beside the service."""

    def __init__(
        self, port: int, path: str, pictures: list[bytes], check: Callable[[int, bytes], bool]
    ) -> None:
        self.port, self.pictures, self.check = port, pictures, check
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/octet-stream\r\nContent-Length: "
        self.requests = [f"{head}{len(data)}\r\n\r\n".encode() + data for data in pictures]
        self.idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def one(self, ledger: Ledger, number: int) -> None:
        """One request, put down in the ledger."""
        place = number % len(self.pictures)
        ledger.sent += 1
        begun = time.perf_counter()
        try:
            reader, writer = (
                self.idle.pop() if self.idle else await asyncio.open_connection("127.0.0.1", self.port)
            )
            writer.write(self.requests[place])
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head.lower())
            body = await reader.readexactly(int(length.group(1)) if length else 0)
        except (OSError, asyncio.IncompleteReadError):
            ledger.statuses["failed"] += 1
            return
        took = time.perf_counter() - begun
        status = head[9:12].decode()
        ledger.statuses[status] += 1
        if b"connection: close" in head.lower():
            writer.close()
        else:
            self.idle.append((reader, writer))
        if status == "200":
            ledger.answered.append(took)
            ledger.ended.append(time.perf_counter())
            ledger.wrong += not self.check(place, body)
        elif status == "503":
            ledger.refused.append(took)

    async def closed(self, seconds: float, together: int) -> Ledger:
        """So many clients, each asking again when it has its answer."""
        ledger, end, numbers = Ledger(), time.perf_counter() + seconds, iter(range(10**9))
        ledger.began = begun = time.perf_counter()

        async def loop() -> None:
            while time.perf_counter() < end:
                refused = len(ledger.refused)
                await self.one(ledger, next(numbers))
                if len(ledger.refused) > refused:
                    await asyncio.sleep(0.1)

        await asyncio.gather(*(loop() for _ in range(together)))
        ledger.seconds = time.perf_counter() - begun
        return ledger

    async def opened(self, seconds: float, rate: float, seed: int = 0) -> Ledger:
        """Requests at random moments, whether answers come or not."""
        ledger, chance, tasks = Ledger(), random.Random(seed), set()
        ledger.began = begun = following = time.perf_counter()
        number = 0
        while following < begun + seconds:
            await asyncio.sleep(max(0.0, following - time.perf_counter()))
            task = asyncio.create_task(self.one(ledger, number))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            number += 1
            following += chance.expovariate(rate)
        spent = time.perf_counter() - begun
        await asyncio.gather(*tasks)
        ledger.seconds = spent
        return ledger

    async def close(self) -> None:
        for _, writer in self.idle:
            writer.close()
        self.idle.clear()


@contextlib.contextmanager
def started(command: list[str], sign: str) -> Any:
    """A server in a process of its own; the number in the line that `sign` matches is its port."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr
    lines = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(sign, line):
            break
    else:
        raise SystemExit("the server did not start:\n" + "".join(lines))
    threading.Thread(target=lambda: [None for _ in process.stderr or ()], daemon=True).start()
    try:
        yield process, int(found.group(1))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        with contextlib.suppress(ProcessLookupError):  # LitServe leaves its workers behind, at work
            os.killpg(process.pid, signal.SIGKILL)


def worked(session: int) -> tuple[float, float]:
    """CPU seconds so far: of all the machine, and of the processes of a session with this one."""
    tick, own = os.sysconf("SC_CLK_TCK"), time.process_time()
    for place in Path("/proc").iterdir():
        if place.name.isdecimal():
            with contextlib.suppress(OSError):
                fields = (place / "stat").read_text().rpartition(")")[2].split()
                own += (int(fields[11]) + int(fields[12])) / tick if int(fields[3]) == session else 0.0
    user, nice, system = (int(word) for word in Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / tick, own


def offline(
    folder: str, pictures: list[bytes], options: argparse.Namespace
) -> tuple[float, list[list[dict[str, Any]]]]:
    """Pictures a second through `vitrail predict`'s Predictor, and the answer for each picture alone."""
    from vitrail.predict import Predictor

    predictor = Predictor(folder, options.engine, options.precision, device="cpu")
    alone = [[guess.__dict__ for guess in predictor(data)[0].top] for data in pictures]
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < options.seconds / 2:
        count += len(predictor(pictures * max(1, 64 // len(pictures))))
    return count / (time.perf_counter() - begun), alone


def default_model(folder: str) -> str:
    """ViT-Ti/16 at 224, with random weights."""
    import torch

    import vitrail

    torch.manual_seed(0)
    model: Any = vitrail.create_model("vit_tiny_patch16_224")
    with torch.no_grad():
        model.head.linear.weight.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder


def default_pictures(count: int = 16) -> list[bytes]:
    """JPEG files of 400 x 500 pixels."""
    import io

    import numpy as np
    from PIL import Image

    found = []
    for seed in range(count):
        blocks = np.random.default_rng(seed).integers(0, 256, (12, 15, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(blocks).resize((500, 400), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=88)
        found.append(buffer.getvalue())
    return found


PEER = """
import io, sys
import litserve, timm, torch
from PIL import Image
class Api(litserve.LitAPI):
    def setup(self, device):
        self.model = timm.create_model("vit_tiny_patch16_224", pretrained=False).eval()
        self.transform = timm.data.create_transform(**timm.data.resolve_model_data_config(self.model))
    def decode_request(self, request):
        return self.transform(Image.open(io.BytesIO(request["image"].file.read())).convert("RGB"))
    def batch(self, inputs):
        return torch.stack(inputs)
    def predict(self, batch):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=sys.argv[2] == "bf16"):
            return self.model(batch).float().softmax(-1)
    def unbatch(self, output):
        return list(output)
    def encode_response(self, output):
        score, index = output.topk(5)
        return {"score": score.tolist(), "index": index.tolist()}
if __name__ == "__main__":
    api = Api(max_batch_size=8, batch_timeout=0.005)
    print("litserve at", sys.argv[1], file=sys.stderr, flush=True)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(port=int(sys.argv[1]), log_level="warning", generate_client_file=False)
"""


def counters(port: int) -> dict[str, float]:
    """The service's counts for /predict."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30).read().decode()
    found = dict(re.findall(r'vitrail_requests_total\{route="/predict",status="(\d+)"\} ([0-9.e+]+)', text))
    memory = re.search(r"process_resident_memory_bytes ([0-9.e+]+)", text)
    batch = [float(found) for found in re.findall(r"vitrail_batch_images_(?:sum|count) ([0-9.e+]+)", text)]
    batch.sort()  # a batch has at least one picture: the sum is the larger
    counts = {name: float(value) for name, value in found.items()}
    return counts | {
        "memory": float(memory.group(1)) if memory else 0.0,
        "batch": batch[1] / max(1.0, batch[0]),
    }


async def measure(folder: str, pictures: list[bytes], options: argparse.Namespace) -> None:
    if options.engine == "auto":  # what the service would find at its first start, so that both take the same
        from vitrail.jobs.serve import find_engine

        find_engine(folder, "cpu", options.precision)
    rate, alone = offline(folder, pictures, options)
    print(f"offline (Predictor, {len(pictures)} pictures): {rate:.1f} images/s")

    def right(place: int, body: bytes) -> bool:
        return bool(json.loads(body)["results"][0]["predictions"] == alone[place])

    command = [sys.executable, "-m", "vitrail", "serve", f"it={folder}", "--port", "0", "--device", "cpu"]
    command += ["--engine", options.engine, "--precision", options.precision, *options.flags.split()]
    with started(command, r"serving http://127\.0\.0\.1:(\d+)") as (process, port):
        ledgers = []

        async def run(name: str, how: Callable[[Client], Any]) -> Ledger:
            client = Client(port, "/predict", pictures, right)
            before, work = counters(port), worked(process.pid)
            begun, mine = time.perf_counter(), time.process_time()
            ledger: Ledger = await how(client)
            await client.close()
            spent = time.perf_counter() - begun
            mine = (time.process_time() - mine) / spent
            total, own = (now - then for now, then in zip(worked(process.pid), work, strict=True))
            after = counters(port)
            ledgers.append(ledger)
            counted = {
                status: int(after.get(status, 0) - before.get(status, 0))
                for status in ("200", "503", "504", "499")
            }
            agree = all(counted[status] == ledger.statuses.get(status, 0) for status in ("200", "503", "504"))
            print(
                f"{name}: sent {ledger.sent} = {dict(ledger.statuses)}, {ledger.rate:.1f} answers/s,"
                f" wrong {ledger.wrong};"
                f" p50 {ledger.quantile(0.5):.0f} p99 {ledger.quantile(0.99):.0f} ms;"
                f" refusals p50 {ledger.quantile(0.5, True):.1f} p99 {ledger.quantile(0.99, True):.1f} ms;"
                f" server's counts {'agree' if agree else counted}; memory {after['memory'] / 2**20:.0f} MiB;"
                f" mean batch {after['batch']:.1f}; cores busy with this {own / spent:.2f}"
                f" ({mine:.2f} of them with the client),"
                f" with other work {(total - own) / spent:.2f}",
                flush=True,
            )
            return ledger

        told = json.loads(urllib.request.urlopen(f"http://127.0.0.1:{port}/models", timeout=30).read())[
            "models"
        ][0]
        print(
            f"{told['engine']} in {told['precision']}, batch sizes {told['batch_sizes']}, side by side:"
            f" {told['side_by_side']}, largest difference of any batch {told['batch_difference']:.1g}"
        )
        await run("warm", lambda client: client.closed(3, 4))
        full: Ledger = await run(
            "saturation", lambda client: client.closed(options.seconds, options.together)
        )
        again, _ = offline(folder, pictures, options)
        print(f"offline again, with the idle service beside it: {again:.1f} images/s;"
              f" the service's share {full.rate / ((rate + again) / 2):.2f}")  # fmt: skip
        steady = await run("0.8 of capacity", lambda client: client.opened(options.seconds, 0.8 * full.rate))
        print(f"  p99 / p50 = {steady.quantile(0.99) / steady.quantile(0.5):.2f}")
        if options.killer:
            await killed(process.pid, options.killer, run, full.rate)
        shares = []
        for _ in range(options.rounds):  # a chip's clock and its neighbours change within a minute
            flood = functools.partial(Client.opened, seconds=options.seconds, rate=5 * full.rate)
            over = await run("5 times capacity", flood)
            also = await run("saturation", lambda client: client.closed(options.seconds, options.together))
            shares.append(over.rate / ((full.rate + also.rate) / 2))
            full = also
        print(f"  goodput / capacity = {', '.join(f'{share:.2f}' for share in shares)};"
              f" median {statistics.median(shares):.2f}")  # fmt: skip
        await run("after it", lambda client: client.opened(5, 0.5 * full.rate))
    print(f"the service ended with {process.returncode}")
    for precision in options.peer:
        await peer(pictures, options, precision, full.rate)


async def killed(parent: int, every: float, run: Callable[..., Any], rate: float) -> None:
    """A decoder is killed again and again, under half load."""

    async def kill() -> None:
        while True:
            await asyncio.sleep(every)
            found = subprocess.run(
                ["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True
            ).stdout
            rows = [line.split(None, 2) for line in found.splitlines()[1:]]
            servers = [int(row[0]) for row in rows if int(row[1]) == parent and "forkserver" in row[2]]
            decoders = [int(row[0]) for row in rows if int(row[1]) in servers]
            if decoders:
                os.kill(random.choice(decoders), signal.SIGKILL)

    killer = asyncio.create_task(kill())
    await run(f"a decoder killed every {every:g} s", lambda client: client.opened(20, 0.5 * rate))
    killer.cancel()


async def peer(pictures: list[bytes], options: argparse.Namespace, precision: str, ours: float) -> None:
    """LitServe with timm, the same network and pictures."""
    with tempfile.TemporaryDirectory() as place:
        script = Path(place) / "peer.py"
        script.write_text(PEER)
        with started([sys.executable, str(script), "8231", precision], r"litserve at (\d+)") as (_, port):
            boundary = b'--sill\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n'
            boundary += b"Content-Type: image/jpeg\r\n\r\n"
            bodies = [boundary + data + b"\r\n--sill--\r\n" for data in pictures]
            client = Client(port, "/predict", bodies, lambda place, body: b"score" in body)
            client.requests = [
                request.replace(b"application/octet-stream", b"multipart/form-data; boundary=sill", 1)
                for request in client.requests
            ]
            for _ in range(120):
                probe = Ledger()
                await client.one(probe, 0)
                if not probe.statuses.get("failed"):
                    break
                await asyncio.sleep(1)
            if not probe.statuses.get("200"):
                print(f"LitServe with timm in {precision} does not answer: {dict(probe.statuses)} (is"
                      " python-multipart installed?)")  # fmt: skip
                return
            await client.closed(3, 4)
            ledger = await client.closed(options.seconds, options.together)
            await client.close()
            print(
                f"LitServe with timm in {precision}: {dict(ledger.statuses)}, {ledger.rate:.1f} answers/s,"
                f" p50 {ledger.quantile(0.5):.0f} p99 {ledger.quantile(0.99):.0f} ms;"
                f" vitrail is {ours / max(ledger.rate, 1e-9):.2f} times as fast"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--together", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1, help="turns of overload and saturation")
    parser.add_argument("--pictures")
    parser.add_argument("--peer", nargs="*", default=(), choices=("fp32", "bf16"))
    parser.add_argument("--killer", type=float, default=0)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--flags", default="--deadline 30", help="further flags for vitrail serve")
    options = parser.parse_args()
    if options.pictures:
        pictures = [path.read_bytes() for path in sorted(Path(options.pictures).iterdir()) if path.is_file()]
    else:
        pictures = default_pictures()
    print(f"load of the machine before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as place:
        asyncio.run(measure(options.model or default_model(place), pictures, options))
    print(f"load of the machine after: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
