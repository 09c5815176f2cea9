"""Queues under load: full, late, left; and decoders that die."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import http.client
import json
import logging
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export.worlds import untyped

from tests.serve.service import Running, picture, running, save_model
from vitrail.engines import choose
from vitrail.errors import UserError
from vitrail.jobs.decode_worker import Bounds
from vitrail.jobs.serve import DecodedPicture, WarmUp
from vitrail.predict import Predictor
from vitrail.serve.admission import Admission
from vitrail.serve.batcher import Batcher, Engine
from vitrail.serve.decoders import Decoders
from vitrail.serve.refusals import Refusal


class Slow:
    """A model whose answer is its input's mean, given after a while; it remembers its batches."""

    name = "slow"

    def __init__(self, sizes: tuple[int, ...], seconds: float = 0.0, side_by_side: bool = False) -> None:
        self.warm_up = WarmUp(sizes, 0.0, dict.fromkeys(sizes, 0.01), side_by_side)
        self.seconds = seconds
        self.batches: list[int] = []
        self.inside = self.most_inside = 0
        self.fails = False

    def compute(self, batch: list[Any]) -> Any:
        self.batches.append(len(batch))
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        time.sleep(self.seconds)
        self.inside -= 1
        if self.fails:
            raise RuntimeError("told to")
        return [np.array([seen.pixels.mean()]) for seen in batch]


async def batcher_of(model: Slow, lanes: int = 1) -> tuple[Batcher, Engine]:
    engine = Engine(lanes, lanes)
    return Batcher(model, engine, lambda stage, value: None), engine  # type: ignore[arg-type]


def pixels(value: int) -> Any:
    return DecodedPicture(np.full((3, 2, 2), value, dtype=np.uint8), (2, 2))


def test_batches_grow_while_the_engine_is_busy_and_are_of_the_sizes_allowed() -> None:
    async def go() -> None:
        model = Slow((1, 4), 0.02)
        batcher, engine = await batcher_of(model)
        later = time.monotonic() + 60
        found = await asyncio.gather(*(batcher.submit(pixels(value), later) for value in range(11)))
        assert [float(row[0]) for row in found] == list(range(11))
        assert set(model.batches) <= {1, 4} and 4 in model.batches
        await batcher.close()
        engine.close()

    asyncio.run(go())


def test_pictures_are_computed_side_by_side_and_a_lone_one_with_every_core() -> None:
    async def go() -> None:
        model = Slow((1,), 0.05, side_by_side=True)
        batcher, engine = await batcher_of(model, lanes=3)
        later = time.monotonic() + 60
        lone = asyncio.create_task(batcher.submit(pixels(1), later))
        await asyncio.sleep(0.02)
        assert engine.whole.taken == 1 and not any(lane.taken for lane in engine.lanes)
        found = await asyncio.gather(*(batcher.submit(pixels(value), later) for value in range(9)))
        assert [float(row[0]) for row in found] == list(range(9)) and float((await lone)[0]) == 1
        assert model.most_inside == 3 and not engine.busy()
        await batcher.close()
        engine.close()

    asyncio.run(go())


def test_models_that_need_the_whole_engine_and_others_take_turns() -> None:
    async def go() -> None:
        one, many = Slow((1,), 0.02), Slow((1,), 0.02, side_by_side=True)
        first, engine = await batcher_of(one, lanes=2)
        second = Batcher(many, engine, lambda stage, value: None)  # type: ignore[arg-type]
        later = time.monotonic() + 60
        asked = [model.submit(pixels(value), later) for value in range(6) for model in (first, second)]
        await asyncio.gather(*asked)
        assert one.most_inside == 1 and one.batches == many.batches == [1] * 6
        for batcher in (first, second):
            await batcher.close()
        engine.close()

    asyncio.run(go())


def test_nothing_late_or_left_enters_a_batch() -> None:
    async def go() -> None:
        model = Slow((1,), 0.2)
        batcher, engine = await batcher_of(model)
        now = time.monotonic()
        first = asyncio.create_task(batcher.submit(pixels(1), now + 60))
        await asyncio.sleep(0.05)
        late = asyncio.create_task(batcher.submit(pixels(2), now + 0.1))
        left = asyncio.create_task(batcher.submit(pixels(3), now + 60))
        last = asyncio.create_task(batcher.submit(pixels(4), now + 60))
        await asyncio.sleep(0.01)
        left.cancel()
        assert float((await first)[0]) == 1 and float((await last)[0]) == 4
        with pytest.raises(Refusal) as told:
            await late
        assert told.value.code == "deadline"
        assert model.batches == [1, 1]
        await batcher.close()
        engine.close()

    asyncio.run(go())


def test_a_batch_that_fails_fails_alone() -> None:
    async def go() -> None:
        model = Slow((1,))
        batcher, engine = await batcher_of(model)
        later = time.monotonic() + 60
        model.fails = True
        with pytest.raises(Refusal, match="failed"):
            await batcher.submit(pixels(1), later)
        model.fails = False
        assert float((await batcher.submit(pixels(2), later))[0]) == 2
        await batcher.close()
        engine.close()

    asyncio.run(go())


def test_admission_is_bounded_in_pictures_and_bytes() -> None:
    admission = Admission(4, 1000, lambda: 2.0)
    tickets = [admission.enter(1, 300) for _ in range(3)]
    with pytest.raises(Refusal) as told:
        admission.enter(1, 300)
    assert (told.value.code, told.value.retry_after) == ("full", 6)
    with pytest.raises(Refusal):
        tickets[0].resize(3, 300)
    tickets[0].resize(2, 10)
    for ticket in tickets * 2:
        ticket.release()
    assert (admission.images, admission.bytes) == (0, 0)


def test_who_would_be_late_is_not_let_in() -> None:
    pace = [5.0]
    admission = Admission(100, 1000, lambda: pace[0], patience=6.0)
    admission.enter(1, 1)  # an empty service takes anybody
    with pytest.raises(Refusal, match="full"):
        admission.enter(1, 1)
    pace[0] = 1.0
    for _ in range(5):
        admission.enter(1, 1)
    with pytest.raises(Refusal, match="full"):
        admission.enter(1, 1)


@pytest.fixture
def small(folders: tuple[Path, Path]) -> Iterator[Running]:
    """A service that holds few pictures."""
    with running(str(folders[0]), queue_images=4, decoders=2, decode_seconds=2.0) as found:
        yield found


def held(service: Running) -> threading.Event:
    """Keeps the engine busy until the event is set."""
    free = threading.Event()
    compute = service.backend.slots["first"].version.served.compute

    def wait(batch: Any) -> Any:
        free.wait(30)
        return compute(batch)

    service.backend.slots["first"].version.served.compute = wait
    return free


def until(condition: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


def test_a_full_house_refuses_at_once_and_every_request_is_accounted_for(
    small: Running, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vitrail.serve")
    free = held(small)
    inside = small.backend.slots["first"].admission
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(small.predict, picture(seed)) for seed in range(4)]
        until(lambda: inside.images == 4)
        begun = time.monotonic()
        refused = [small.predict(picture()) for _ in range(5)]
        assert time.monotonic() - begun < 2
        assert {(answer.status, answer.json["code"]) for answer in refused} == {(503, "full")}
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert small.ask("GET", "/health/ready").status == 200
        free.set()
        assert [one.result().status for one in waiting] == [200] * 4
    until(lambda: inside.images == 0 and inside.bytes == 0)

    def statuses() -> dict[str, float]:
        return {
            status: small.count("requests_total", route="/predict", status=status)
            for status in ("200", "503")
        }

    until(lambda: sum(statuses().values()) == 9)  # a request is counted after its last byte has left
    assert statuses() == {"200": 4, "503": 5}
    lines = [record.getMessage() for record in caplog.records]
    assert not any("503" in line for line in lines) and any("refused since" in line for line in lines)
    assert small.count("admitted_total") == small.count("finished_total") == 4


def test_a_connection_that_was_refused_for_want_of_room_is_answered_later(small: Running) -> None:
    free = held(small)
    inside = small.backend.slots["first"].admission
    body = picture(size=(600, 500))
    assert len(body) > 65_536  # it comes in pieces, most of them after the answer
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(small.predict, picture(seed)) for seed in range(4)]
        until(lambda: inside.images == 4)
        lasting = http.client.HTTPConnection("127.0.0.1", small.port, timeout=30)
        for identity in ("one", "two"):
            lasting.request("POST", "/predict", body, {"X-Request-Id": identity, "Connection": "keep-alive"})
            refused = lasting.getresponse()
            assert (refused.status, json.loads(refused.read())["code"]) == (503, "full")
            assert refused.headers["x-request-id"] == identity and refused.headers["x-content-type-options"]
        free.set()
        assert [one.result().status for one in waiting] == [200] * 4
    same = lasting.sock
    lasting.request("POST", "/predict", body)
    answered = lasting.getresponse()
    assert answered.status == 200 and json.loads(answered.read())["results"]
    assert lasting.sock is same
    lasting.close()


def test_deadlines_and_clients_that_leave(small: Running) -> None:
    free = held(small)
    inside = small.backend.slots["first"].admission
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(small.predict, picture())
        until(lambda: small.backend.engine.busy())
        late = small.predict(picture(), "?deadline_ms=100")
        assert (late.status, late.json["code"]) == (504, "deadline")
        gone = http.client.HTTPConnection("127.0.0.1", small.port)
        gone.request("POST", "/predict", picture())
        until(lambda: inside.images == 2)
        gone.close()
        until(lambda: inside.images == 1)
        free.set()
        assert first.result().status == 200
    until(lambda: small.count("finished_total") == small.count("admitted_total"))
    assert small.count("requests_total", route="/predict", status="499") == 1
    assert small.count("refusals_total", code="failed") == 0
    assert small.count("batch_images_sum") == 1  # neither of the two was computed


def test_a_killed_decoder_costs_its_own_request_one_503(small: Running) -> None:
    processes = small.backend.decoders.processes
    until(lambda: len(processes) == 2)
    before = dict(processes)
    os.kill(before[0], signal.SIGSTOP)
    os.kill(before[1], signal.SIGSTOP)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(small.predict, picture(seed)) for seed in range(2)]
        time.sleep(0.3)
        os.kill(before[0], signal.SIGKILL)
        until(lambda: any(one.done() for one in asked))
        os.kill(before[1], signal.SIGCONT)
        answers = sorted(one.result().status for one in asked)
    assert answers == [200, 503]
    until(lambda: len(processes) == 2)
    assert before[0] not in processes.values() and before[1] in processes.values()
    assert [small.predict(picture(seed)).status for seed in range(4)] == [200] * 4
    assert small.count("decoder_restarts_total") == 1


def test_an_idle_decoder_that_is_killed_costs_nothing(small: Running) -> None:
    for process in dict(small.backend.decoders.processes).values():
        os.kill(process, signal.SIGKILL)
    until(lambda: small.count("decoder_restarts_total") == 2)
    assert small.predict(picture()).status == 200


def test_a_changed_folder_is_taken_over_and_a_corrupt_one_is_not(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", 0)
    other = save_model(tmp_path / "other", 1)
    with running(f"it={folder}") as service:
        first = service.predict(picture()).json
        (folder / "model.safetensors").write_bytes(b"\0" * 1000)
        until(lambda: service.count("swaps_total", model="it", outcome="refused") == 1)
        assert service.predict(picture()).json == first
        for name in ("model.safetensors", "config.json"):
            shutil.copy(other / name, folder / f".{name}")
            os.replace(folder / f".{name}", folder / name)
        until(lambda: service.count("swaps_total", model="it", outcome="taken") == 1)
        second = service.predict(picture()).json
        assert second["version"] != first["version"] and second["results"] != first["results"]


def test_other_class_names_are_another_version(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", 0)
    with running(f"it={folder}") as service:
        first = service.predict(picture())
        config = json.loads((folder / "config.json").read_text())
        config["label_names"] = ["gnu", *config["label_names"][1:]]
        (folder / ".config.json").write_text(json.dumps(config))
        os.replace(folder / ".config.json", folder / "config.json")
        until(lambda: service.count("swaps_total", model="it", outcome="taken") == 1)
        second = service.predict(picture())
        assert service.ask("GET", "/models").json["models"][0]["labels"][0] == "gnu"
        assert first.headers["x-model-version"] == first.json["version"] != second.json["version"]
    with running(f"it={folder}") as service:  # the same state is the same version
        assert service.predict(picture()).json["version"] == second.json["version"]


def test_other_preprocessing_alone_is_taken_over(tmp_path: Path) -> None:
    """In a folder of transformers', preprocessor_config.json says how pictures are prepared, and nothing else does."""
    folder = save_model(tmp_path / "model", 0)
    config = json.loads((folder / "config.json").read_text())
    del config["pretrained_cfg"]
    (folder / "config.json").write_text(json.dumps(config))
    told = folder / "preprocessor_config.json"
    wanted = json.loads(told.read_text())
    with running(f"it={folder}") as service:
        first = service.predict(picture()).json
        (folder / ".told").write_text(json.dumps({**wanted, "image_mean": [0.1, 0.1, 0.1]}))
        os.replace(folder / ".told", told)
        until(lambda: service.count("swaps_total", model="it", outcome="taken") == 1)
        second = service.predict(picture()).json
        assert second["version"] != first["version"] and second["results"] != first["results"]
        offline = Predictor(folder, "torch", device="cpu")(picture())[0]
        assert second["results"][0]["predictions"] == [guess.__dict__ for guess in offline.top]
        told.write_text("{")  # no JSON any more
        until(lambda: service.count("swaps_total", model="it", outcome="refused") == 1)
        assert service.predict(picture()).json == second


def test_the_quickest_engine_is_found_at_the_start_and_kept_in_a_swap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr("vitrail.jobs.serve.EXPECTED_IMAGES", 10**12)
    monkeypatch.setattr(choose, "installed", lambda: ["openvino"])
    monkeypatch.setattr(choose, "speeds", lambda engines, images: {"torch": 1.0, "openvino": 2.0})
    folder, other = save_model(tmp_path / "model", 0), save_model(tmp_path / "other", 1)

    def check(service: Running) -> None:
        assert service.ask("GET", "/models").json["models"][0]["engine"] == "openvino"
        found = service.predict(picture()).json["results"][0]["predictions"]
        offline = Predictor(folder, "openvino", "fp32", device="cpu")
        assert offline.engine.name == "openvino"
        offline.top_k = len(found)
        assert found == [guess.__dict__ for guess in offline([picture()])[0].top]

    with untyped(), running(f"it={folder}", engine="auto", precision="fp32") as service:
        check(service)
        assert Predictor(folder, precision="fp32", device="cpu").engine.name == "openvino"  # it is remembered
        for name in ("model.safetensors", "config.json"):
            shutil.copy(other / name, folder / f".{name}")
            os.replace(folder / f".{name}", folder / name)
        until(lambda: service.count("swaps_total", model="it", outcome="taken") == 1)
        check(service)


def test_a_model_that_never_answers_turns_liveness_red(
    small: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = held(small)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(small.predict, picture())
        until(lambda: small.backend.engine.busy())
        assert small.ask("GET", "/health/live").status == 200
        monkeypatch.setattr("vitrail.serve.backend.STUCK_SECONDS", 0.05)
        until(lambda: small.ask("GET", "/health/live").status == 503)
        assert small.ask("GET", "/v2/health/live").json["code"] == "not_ready"
        free.set()
        assert asked.result().status == 200
    until(lambda: small.ask("GET", "/health/live").status == 200)


NO_FORKS = [BlockingIOError(errno.EAGAIN, "no more processes"), EOFError("unexpected EOF")]


@pytest.mark.parametrize("trouble", NO_FORKS, ids=["no process", "no forker"])
def test_a_decoder_that_cannot_be_started_is_told_at_the_start(
    monkeypatch: pytest.MonkeyPatch, trouble: Exception
) -> None:
    def fork(self: Decoders) -> Any:
        raise trouble

    monkeypatch.setattr(Decoders, "_fork", fork)

    async def go() -> None:
        pool = Decoders(2, Bounds(), lambda stage, value: None)
        with pytest.raises(UserError, match="decoder cannot be started"):
            async with asyncio.timeout(10):
                await pool.start()
        await pool.close()

    asyncio.run(go())


def test_a_forker_that_a_signal_ended_while_the_service_began_is_started_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fork, ended = Decoders._fork, [EOFError("unexpected EOF")]

    def once(self: Decoders) -> Any:
        if ended:
            raise ended.pop()
        return fork(self)

    monkeypatch.setattr(Decoders, "_fork", once)

    async def go() -> None:
        pool = Decoders(2, Bounds(), lambda stage, value: None)
        async with asyncio.timeout(30):
            await pool.start()
        assert len(pool.processes) == 2
        await pool.close()

    asyncio.run(go())


@pytest.mark.parametrize("trouble", NO_FORKS, ids=["no process", "no forker"])
def test_a_decoder_that_cannot_be_replaced_is_tried_again(
    small: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, trouble: Exception
) -> None:
    tries: list[int] = []
    fork = Decoders._fork

    def at_times(self: Decoders) -> Any:
        tries.append(1)
        if len(tries) < 3:
            raise trouble
        return fork(self)

    monkeypatch.setattr(Decoders, "_fork", at_times)
    processes = small.backend.decoders.processes
    until(lambda: len(processes) == 2)
    os.kill(processes[0], signal.SIGKILL)
    until(lambda: len(tries) == 3 and len(processes) == 2)
    assert [small.predict(picture(seed)).status for seed in range(4)] == [200] * 4
    assert sum("tried again" in record.getMessage() for record in caplog.records) == 2


def test_a_stop_answers_what_was_let_in_and_refuses_the_rest(folders: tuple[Path, Path]) -> None:
    with running(str(folders[0])) as service:
        free = held(service)
        open_connection = http.client.HTTPConnection("127.0.0.1", service.port)
        open_connection.request("GET", "/health/ready")
        assert open_connection.getresponse().read() and True
        with ThreadPoolExecutor(1) as pool:
            let_in = pool.submit(service.predict, picture())
            until(lambda: service.backend.slots["first"].admission.images == 1)
            service.call(service.service.stop)
            try:
                open_connection.request("GET", "/health/ready")
                answer = open_connection.getresponse()
                assert answer.status == 503 and answer.getheader("connection") == "close"
            except (ConnectionError, http.client.HTTPException):
                pass  # it may have been closed already: nothing was let in
            free.set()
            assert let_in.result().status == 200
        open_connection.close()


def test_a_stop_waits_for_nobody_who_holds_no_request_or_reads_no_answer(folders: tuple[Path, Path]) -> None:
    with running(str(folders[0]), drain=60) as service:
        idle = socket.create_connection(("127.0.0.1", service.port))
        half = socket.create_connection(("127.0.0.1", service.port))
        half.sendall(b"POST /predict HT")
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", service.port))
        deaf.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 600)
        connections = service.service.server.server_state.connections
        until(lambda: any(one.transport.get_write_buffer_size() for one in connections))
        begun = time.monotonic()
        service.call(service.service.stop)
        until(lambda: not connections)
        assert time.monotonic() - begun < 10
        for link in (idle, half, deaf):
            link.close()


def test_a_stop_does_not_wait_for_an_explanation_that_nobody_reads(folders: tuple[Path, Path]) -> None:
    """Threads cannot be ended; that one is still at work is known, so that the process need not wait for it."""
    with running(str(folders[0]), drain=1, ends=1) as service:
        free = threading.Event()
        served = service.backend.slots["first"].version.served
        served.explain = lambda seen, asked: free.wait(30)
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(service.ask, "POST", "/explain", picture())
            until(lambda: service.backend.busy())
            service.call(service.service.stop)
            with contextlib.suppress(ConnectionError, http.client.HTTPException):
                asked.result(20)
        assert service.backend.busy()
        free.set()
        until(lambda: not service.backend.busy())
