"""Training speed on one GPU, beside timm in the same run: images/s, memory, and the share of the chip's peak.

    python benchmarks/gpu_train.py                         # S/16, B/16, L/16, H/14, then Swin-T, PVT v2-B2, CaiT-S24
    python benchmarks/gpu_train.py --models vit_base_patch16_224 --batch-sizes 256 --attention
    python benchmarks/gpu_train.py --data train-0.zip      # also from files to updated weights, by the training job
    python benchmarks/gpu_train.py --device cpu --models vit_nano_patch4_32 --batch-sizes 8 --rounds 2 --steps 2

Synthetic images on the device, cross-entropy, fused AdamW, bfloat16 by autocast, no recomputation. Contenders take
turns, so that a change of the chip's clock meets all of them. A step's FLOPs are counted once: six times the forward's
multiply-adds (two for each, and three forwards' worth for a step), whatever a kernel really does.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.cli.show import plain_table
from vitrail.jobs.models import cost
from vitrail.models import registry
from vitrail.runtime import Runtime

SIZES = {
    "vit_small_patch16_224": 512,
    "vit_base_patch16_224": 256,
    "vit_large_patch16_224": 128,
    "vit_huge_patch14_224": 64,
    "deit_small_patch16_224": 512,
    "swin_tiny_patch4_window7_224": 256,
    "pvt_v2_b2": 256,
    "cait_s24_224": 128,
}
"""Networks and their batches where none are named."""

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
"""Dense bfloat16 products a second that the maker states, by a part of the device's name."""

WAYS = ("eager", "blocks", "whole", "graphs")
"""How a network is run: as written; each block compiled; compiled whole; compiled whole with CUDA graphs."""


@dataclass(frozen=True)
class Contender:
    """One network, run in one way."""

    maker: str
    way: str

    @property
    def name(self) -> str:
        return f"{self.maker} {self.way}"


@dataclass(frozen=True)
class Result:
    """One line of the table; rates in images a second."""

    contender: Contender
    best: float
    median: float
    memory: int
    """Bytes at the peak of a step, above what lay there before the network."""


def build(model: str, contender: Contender, device: torch.device) -> nn.Module:
    """The contender's network on the device, compiled as it asks."""
    torch.manual_seed(0)
    if contender.maker == "vitrail":
        network: Any = registry.create_model(model)
    else:
        import timm

        network = timm.create_model(model)
    network.to(device)
    if contender.way == "blocks":
        for block in blocks_of(network):
            block.compile()
    elif contender.way == "whole":
        network.compile()
    elif contender.way == "graphs":
        network.compile(mode="reduce-overhead")
    return network


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The transformer blocks of ours or of timm's network: the members of its lists that hold attention."""
    found = [
        member
        for part in network.modules()
        if isinstance(part, nn.ModuleList | nn.Sequential)
        for member in part
        if any("attention" in type(inner).__name__.lower() or "attn" in type(inner).__name__.lower()
               for inner in member.modules())
    ]  # fmt: skip
    inner = {id(part) for block in found for part in block.modules() if part is not block}
    return [block for block in found if id(block) not in inner] or [network]


def stepper(
    network: nn.Module, batch: int, size: tuple[int, int], device: torch.device
) -> Callable[[], Tensor]:
    """One training step on synthetic images; hands back the loss, and waits for nothing."""
    network.train()
    runtime = Runtime(device=device, precision="bf16")
    images = torch.randn(batch, 3, *size, device=device)
    targets = torch.randint(10, (batch,), device=device)
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.05, fused=True)

    def step() -> Tensor:
        with runtime.autocast():
            output: Any = network(images)
            loss = F.cross_entropy(getattr(output, "logits", output).float(), targets)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss.detach()

    return step


def forwarder(
    network: nn.Module, batch: int, size: tuple[int, int], device: torch.device
) -> Callable[[], Tensor]:
    """One forward pass in bfloat16, weights and all."""
    network.eval().to(torch.bfloat16)
    images = torch.randn(batch, 3, *size, device=device, dtype=torch.bfloat16)

    def forward() -> Tensor:
        with torch.inference_mode():
            output: Any = network(images)
            logits: Tensor = getattr(output, "logits", output)
            return logits

    return forward


def race(
    model: str,
    contenders: list[Contender],
    batch: int,
    device: torch.device,
    *,
    make: Callable[..., Callable[[], Tensor]],
    rounds: int,
    steps: int,
) -> list[Result]:
    """Every contender's rates, measured in turns; one that fails is said and left out."""
    size = registry.variant(model).img_size
    running: list[tuple[Contender, Callable[[], Tensor], int]] = []
    for contender in contenders:
        clear(device)
        before = allocated(device)
        try:
            go = make(build(model, contender, device), batch, size, device)
            for _ in range(3):  # compiling, recording graphs, the optimiser's state
                go()
            wait(device)
        except Exception as error:  # a peer without this network, no memory, a compiler that gives up
            print(f"{model}: {contender.name} left out: {' '.join(str(error).split())[:160]}")
            continue
        running.append((contender, go, peak(device) - before))
    times: list[list[float]] = [[] for _ in running]
    for _ in range(rounds):
        for (_, go, _), kept in zip(running, times, strict=True):
            wait(device)
            started = time.perf_counter()
            for _ in range(steps):
                go()
            wait(device)
            kept.append((time.perf_counter() - started) / steps)
    return [
        Result(contender, batch / min(kept), batch / statistics.median(kept), memory)
        for (contender, _, memory), kept in zip(running, times, strict=True)
    ]


def rows(model: str, batch: int, results: list[Result], device: torch.device, passes: int) -> list[list[str]]:
    """Lines of the table; `passes` forwards' worth of multiply-adds an image (1, or 3 for training)."""
    with torch.device("meta"):
        network = registry.create_model(model)
    flops = 2 * passes * cost(network, network.config.img_size, 3).multiply_adds
    limit = chip_peak(device)
    peers = [result.best for result in results if result.contender.maker != "vitrail"]
    return [
        [
            model,
            str(batch),
            result.contender.name,
            f"{result.best:,.0f}",
            f"{result.median:,.0f}",
            f"{result.best / max(peers):.2f}" if peers else "",
            f"{100 * result.best * flops / limit:.1f} %" if limit else "",
            f"{result.memory / 2**30:.1f}" if device.type == "cuda" else "",
        ]
        for result in results
    ]


HEAD = ["model", "batch", "contender", "best img/s", "median", "x best peer", "of peak", "GiB"]


def attention_table(device: torch.device, batch: int = 128, rounds: int = 20) -> list[list[str]]:
    """Milliseconds of forward and backward of each attention kernel, at the shapes of ViT training."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    table = []
    for heads, tokens, width in ((6, 197, 64), (12, 197, 64), (16, 197, 64), (16, 257, 80), (12, 577, 64)):
        shape = (batch, heads, tokens, width)
        q, k, v = (
            torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
        )
        line = ["x".join(map(str, shape))]
        for kernel in kernels:
            try:
                with sdpa_kernel(kernel):
                    best = min(timed_attention(q, k, v, device) for _ in range(rounds))
                line.append(f"{1e3 * best:.2f}")
            except RuntimeError:
                line.append("-")
        table.append(line)
    return table


def timed_attention(q: Tensor, k: Tensor, v: Tensor, device: torch.device) -> float:
    wait(device)
    started = time.perf_counter()
    F.scaled_dot_product_attention(q, k, v).sum().backward()
    wait(device)
    return time.perf_counter() - started


def end_to_end(model: str, data: list[str], batch: int, device: str, steps: int) -> float:
    """Images/s of the training job from files to updated weights, its start left out."""
    import tempfile

    from vitrail.jobs.train import train
    from vitrail.runs import TrainRun
    from vitrail.train.log import Progress

    seen: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        run = TrainRun(
            data=tuple(data), val_share=0.0, model=model, steps=steps, batch_size=batch, device=device,
            precision="bf16", compile=device != "cpu", eval_every=0, save_every=0, output=folder,
        )  # fmt: skip

        def note(record: object) -> None:
            if isinstance(record, Progress):
                seen.append(record.images_per_second)

        train(run, note)
    return statistics.median(seen[len(seen) // 2 :])


@contextmanager
def tensor_cores() -> Iterator[None]:
    """float32 products by TF32, as every peer's training script has it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clear(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def chip_peak(device: torch.device) -> float | None:
    """FLOP/s in bfloat16 that the maker states, where this script knows the chip."""
    return next((rate for part, rate in PEAKS.items() if part in device_name(device)), None)


def parse(doc: str | None) -> argparse.Namespace:
    """The flags of both GPU benchmarks."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(SIZES))
    parser.add_argument("--batch-sizes", nargs="+", type=int, help="one for each model, or one for all")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["eager", "whole", "graphs"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="steps in one round")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--attention", action="store_true", help="first time every attention kernel")
    parser.add_argument("--data", nargs="+", help="archives or folders for the way from files to weights")
    given = parser.parse_args()
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu tries the script with small networks")
    sizes = given.batch_sizes or [SIZES.get(model, 64) for model in given.models]
    given.batch_sizes = sizes * len(given.models) if len(sizes) == 1 else sizes
    if len(given.batch_sizes) != len(given.models):
        parser.error(
            f"{len(given.models)} models need as many batch sizes, or one; got {len(given.batch_sizes)}"
        )
    return given


def main(
    make: Callable[..., Callable[[], Tensor]] = stepper, passes: int = 3, doc: str | None = __doc__
) -> None:
    given = parse(doc)
    device = torch.device(given.device)
    print(f"{device_name(device)}, torch {torch.__version__}, bfloat16")
    if given.attention:
        print(
            plain_table(["B x H x N x E", "cudnn ms", "flash", "efficient", "math"], attention_table(device))
        )
    table: list[list[str]] = []
    with tensor_cores():
        for model, batch in zip(given.models, given.batch_sizes, strict=True):
            contenders = [Contender(maker, way) for maker in ("vitrail", "timm") for way in given.ways]
            found = race(model, contenders, batch, device, make=make, rounds=given.rounds, steps=given.steps)
            table += rows(model, batch, found, device, passes)
            torch.compiler.reset()
    print(plain_table(HEAD, table))
    if given.data and passes > 1:
        for model, batch in zip(given.models, given.batch_sizes, strict=True):
            rate = end_to_end(model, given.data, batch, given.device, steps=60)
            print(f"{model}: {rate:,.0f} images/s from files to updated weights")


if __name__ == "__main__":
    main()
