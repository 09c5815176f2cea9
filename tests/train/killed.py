"""Started by test_kill.py: one run to its end, and the same run killed again and again.

    killed.py FOLDER KILLS EPOCHS SEED

The modules are imported once (some only to spare every sitting their import); every sitting is a fork of this process,
which has touched no thread pool.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy
import torch
import torch._dynamo
import torch.utils.tensorboard
from PIL import Image

from vitrail.jobs.train import train
from vitrail.runs import TrainRun


def pictures(folder: Path) -> None:
    """48 training and 12 validation pictures of three classes: noise on red, green or blue."""
    generator = numpy.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        for number, name in enumerate(("apple", "grass", "sky")):
            place = folder / split / name
            place.mkdir(parents=True)
            for index in range(count):
                noise = generator.integers(0, 120, (16, 16, 3))
                noise[:, :, number] += 100
                Image.fromarray(noise.astype(numpy.uint8)).save(place / f"{index:03d}.png")


def sit(data: Path, output: Path, epochs: int) -> None:
    """One sitting, in this process."""
    train(
        TrainRun(
            data=(str(data),),
            output=str(output),
            model="vit_tiny_patch16_224",
            img_size=(16,),
            model_kwargs=("patch_size=4", "width=32", "depth=2", "heads=2", "hidden=64", "drop_rate=0.1"),
            epochs=epochs,
            batch_size=4,
            grad_accum_steps=2,
            workers=2,
            mixup=0.2,
            cutmix=1.0,
            drop_path=0.1,
            model_ema=0.9,
            aa="rand",
            reprob=0.25,
            save_every=0.34,
            deterministic=True,
            device="cpu",
            seed=3,
        )
    )


def start(data: Path, output: Path, epochs: int) -> int:
    """A sitting in a process of its own; its number."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        sit(data, output, epochs)
        status = 0
    finally:
        os._exit(status)


def finish(process: int) -> None:
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if status:
        sys.exit(f"a sitting ended with {status}")


def main(folder: Path, kills: int, epochs: int, seed: int) -> None:
    torch.set_num_threads(1)
    chance = random.Random(seed)
    pictures(folder / "data")
    began = time.monotonic()
    finish(start(folder / "data", folder / "whole", epochs))
    duration = time.monotonic() - began
    done = 0
    while done < kills:
        process = start(folder / "data", folder / "killed", epochs)
        # Long enough to come forward now and then, short enough to be cut off nearly always.
        time.sleep(chance.uniform(0.1, 0.4) * duration)
        os.kill(process, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        done += status == -signal.SIGKILL
        place = folder / "killed" / "checkpoints" / "latest"
        print(f"killed {done}: {place.read_text() if place.exists() else 'before the first checkpoint'}")
        if status == 0:  # it was through already: start over, so that every kill hits a running run
            (folder / "killed").rename(folder / f"through-{done}-{time.monotonic_ns()}")
    finish(start(folder / "data", folder / "killed", epochs))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(word) for word in sys.argv[2:]))
