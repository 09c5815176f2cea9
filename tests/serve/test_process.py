"""The service as a process of its own: stopped, swapped and hurt while it is asked.

VITRAIL_SERVE_ROUNDS multiplies how often: 1 by default; 10 gives 50 restarts and 50 swaps.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.serve.service import picture, save_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
ROUNDS = int(os.environ.get("VITRAIL_SERVE_ROUNDS", "1"))


class Process:
    """`vitrail serve` with its log, line by line."""

    def __init__(self, *arguments: str) -> None:
        command = [
            sys.executable,
            "-m",
            "vitrail",
            "serve",
            *arguments,
            "--port",
            "0",
            "--log",
            "json",
            "--decoders",
            "2",
        ]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self.port = 0
        self.ready = threading.Event()
        self.reader = threading.Thread(target=self._read)
        self.reader.start()
        assert self.ready.wait(180) and self.port, "".join(self.lines)

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r'"serving http://127\.0\.0\.1:(\d+)"', line):
                self.port = int(found.group(1))
                self.ready.set()
        self.ready.set()

    def stop(self, seconds: float = 60) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.ended(seconds)

    def ended(self, seconds: float = 60) -> int:
        code = self.process.wait(seconds)
        self.reader.join(30)
        assert not self.reader.is_alive(), f"a child still holds its end: {family()}"
        assert self.process.stderr
        self.process.stderr.close()
        return code

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]  # with --log json, every line is one


@contextmanager
def serving(*arguments: str) -> Iterator[Process]:
    process = Process(*arguments)
    try:
        yield process
    finally:
        if process.process.poll() is None:
            process.process.kill()
            process.ended()


class Askers:
    """Clients that ask without pause, each request under an id of its own."""

    def __init__(self, port: int, count: int = 6) -> None:
        self.port = port
        self.pictures = [picture(seed) for seed in range(8)]
        self.over = threading.Event()
        self.seen: dict[str, int] = {}
        """Id -> status; 0 where the connection ended without an answer."""
        self.bodies: list[dict[str, Any]] = []
        self.threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(count)]
        for thread in self.threads:
            thread.start()

    def _ask(self, asker: int) -> None:
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        for number in range(10**9):
            if self.over.is_set():
                break
            name = f"{asker}-{number}"
            try:
                link.request("POST", "/predict", self.pictures[number % 8], {"X-Request-ID": name})
                answer = link.getresponse()
                body = answer.read()
                self.seen[name] = answer.status
                if answer.status == 200:
                    self.bodies.append(json.loads(body) | {"asked": number % 8})
            except (OSError, http.client.HTTPException):
                self.seen[name] = 0
                link.close()
                time.sleep(0.02)
        link.close()

    def end(self) -> Counter[int]:
        self.over.set()
        for thread in self.threads:
            thread.join(120)
        return Counter(self.seen.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("served") / "model")


@pytest.mark.parametrize("seconds", [0.5, 1.5, 3.0, 5.0])
def test_a_stop_of_the_whole_group_while_the_service_begins_is_no_failure(
    folder: Path, seconds: float
) -> None:
    command = [sys.executable, "-m", "vitrail", "serve", str(folder), "--port", "0", "--log", "json"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert any(json.loads(line)["message"].startswith("stopped") for line in said.splitlines()), said


@pytest.mark.parametrize("number", range(5 * ROUNDS))
def test_a_stop_under_load_loses_no_accepted_request(folder: Path, number: int) -> None:
    with serving(str(folder)) as process:
        askers = Askers(process.port)
        time.sleep(random.Random(number).uniform(0.2, 1.5))
        begun = time.monotonic()
        assert process.stop() == 0
        spent = time.monotonic() - begun
        statuses = askers.end()
    log = process.log()
    print(f"stop {number}: {spent:.1f} s, {log[-1]['drain_seconds']} drain, {log[-1]['close_seconds']} close")
    assert spent < 30
    accepted = {line["id"]: line["status"] for line in log if line.get("admitted") and "id" in line}
    assert accepted and statuses[200] > 0
    lost = {name: status for name, status in accepted.items() if askers.seen.get(name) != status}
    assert not lost
    assert set(accepted.values()) == {200}
    final = log[-1]
    assert final["event"] == "stopped" and final["admitted"] == final["finished"] == len(accepted)


def test_told_twice_it_leaves_at_once(folder: Path) -> None:
    with serving(str(folder), "--drain", "60") as process:
        slow = http.client.HTTPConnection("127.0.0.1", process.port)
        slow.putrequest("POST", "/predict")
        slow.putheader("Content-Length", "100")
        slow.endheaders(b"half")
        time.sleep(0.5)
        process.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.process.poll() is None
        assert process.stop(10) == 1
        slow.close()


def test_swaps_under_load_fail_no_request(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", 0)
    others = [save_model(tmp_path / f"other{seed}", seed) for seed in (1, 2)]
    with serving(f"it={folder}", "--watch", "0.1") as process:
        askers = Askers(process.port, 4)
        refused = 0
        for number in range(5 * ROUNDS):
            if number == 2:
                weights = (folder / "model.safetensors").read_bytes()
                half = weights[: len(weights) // 2]
                (folder / "model.safetensors").write_bytes(half)  # in place, as cp would
                refused += 1
                wait_for(process, "refused", refused)
            for name in ("model.safetensors", "config.json"):
                shutil.copy(others[number % 2] / name, folder / f".{name}")
                os.replace(folder / f".{name}", folder / name)
            wait_for(process, "taken", number + 1)
        statuses = askers.end()
        assert process.stop() == 0
    assert set(statuses) == {200}
    answers: dict[tuple[str, int], Any] = {}
    for body in askers.bodies:  # each answer is one version's, whole
        assert answers.setdefault((body["version"], body["asked"]), body["results"]) == body["results"]
    assert len({version for version, _ in answers}) == 3


def wait_for(process: Process, outcome: str, count: int) -> None:
    line = f'vitrail_swaps_total{{model="it",outcome="{outcome}"}} {float(count)}'
    end = time.monotonic() + 120
    while line not in metrics(process.port):
        assert time.monotonic() < end, process.lines[-5:]
        time.sleep(0.1)


def metrics(port: int) -> str:
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    link.request("GET", "/metrics")
    text = link.getresponse().read().decode()
    link.close()
    return text


def test_killed_decoders_cost_their_own_requests(folder: Path) -> None:
    with serving(str(folder)) as process:
        askers = Askers(process.port, 4)
        kills = 0
        for _ in range(4 * ROUNDS):
            time.sleep(2)
            for decoder in random.sample(decoders(process.process.pid), 1):
                os.kill(decoder, signal.SIGKILL)
                kills += 1
        time.sleep(1)
        statuses = askers.end()
        restarts = re.search(r"vitrail_decoder_restarts_total ([0-9.]+)", metrics(process.port))
        assert restarts and float(restarts.group(1)) == kills
        assert process.stop() == 0
    assert set(statuses) <= {200, 503} and statuses[503] <= kills
    refused = [line for line in process.log() if line.get("refused")]
    assert {line["refused"] for line in refused} <= {"decoder_lost"}


def family() -> str:
    """Every process that looks like a child of the service's, for a test that has failed."""
    told = subprocess.run(
        ["ps", "-eo", "pid,ppid,stat,etimes,args"], capture_output=True, text=True, check=False
    )
    return "\n".join(
        line[:160] for line in told.stdout.splitlines() if "forkserver" in line or "resource_tracker" in line
    )


def decoders(parent: int) -> list[int]:
    """Process numbers of a service's decoders: children of the process that forks them."""
    found: dict[int, tuple[int, str]] = {}
    for place in Path("/proc").iterdir():
        if place.name.isdecimal():
            try:
                text = (place / "stat").read_text()
                line = (place / "cmdline").read_bytes().decode()
            except OSError:
                continue
            found[int(place.name)] = (int(text.rpartition(")")[2].split()[1]), line)
    forkers = [number for number, (above, line) in found.items() if above == parent and "forkserver" in line]
    return [number for number, (above, _) in found.items() if above in forkers]
