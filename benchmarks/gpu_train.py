"""Training speed on one GPU, beside timm in the same run: images/s, memory, and the share of the chip's peak.

    python benchmarks/gpu_train.py                         # S/16, B/16, L/16, H/14, then Swin-T, PVT v2-B2, CaiT-S24
    python benchmarks/gpu_train.py --models vit_base_patch16_224 --batch-sizes 256 --attention
    python benchmarks/gpu_train.py --infer vit_base_patch16_224 vit_large_patch16_224    # inference too
    python benchmarks/gpu_train.py --models vit_large_patch16_224 --ways blocks fp8      # float8, which needs torchao
    python benchmarks/gpu_train.py --data train-0.zip      # also from files to updated weights, by the training job
    python benchmarks/gpu_train.py --device cpu --models vit_nano_patch4_32 --batch-sizes 8 --rounds 2 --steps 2

Synthetic images on the device, cross-entropy, fused AdamW, bfloat16 by autocast, no recomputation. Each contender lives
in a process of its own, so that all compile at the same time; once they are ready they take turns on the chip, so that
a change of its clock meets all of them, and give their memory back after each turn. A step's FLOPs are counted once:
six times the forward's multiply-adds (two for each, and three forwards' worth for a step), whatever a kernel really
does.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.cli.show import plain_table
from vitrail.jobs.models import cost
from vitrail.models import registry
from vitrail.nn.block import drop_by_subset
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

WAYS = ("eager", "blocks", "whole", "graphs", "fp8")
"""How a network is run: as written; each block compiled; compiled whole; compiled whole with CUDA graphs; each block
compiled with its linear layers in float8 (torchao, one scale a tensor; emulated where the device is no GPU)."""

INFER_BATCH = 256

LONGEST = 120.0
"""Seconds that a turn may take."""


@dataclass(frozen=True)
class Contender:
    """One network, run in one way."""

    model: str
    batch: int
    maker: str
    way: str
    task: str = "training"
    drop_path: float = 0.0
    subset: bool = False
    """Ours: drop path by a subset of the batch."""
    patch_drop: float = 0.0
    """Ours: share of the patches left out in training."""

    @property
    def name(self) -> str:
        return f"{self.maker} {self.way}"


@dataclass
class Seat:
    """A contender's process, from here."""

    contender: Contender
    process: Any
    pipe: Any
    memory: int = 0
    """Bytes at the peak of a step."""
    seconds: list[float] = field(default_factory=list)
    """Of one step, a number a round."""


def build(contender: Contender, device: torch.device) -> nn.Module:
    """The contender's network on the device, compiled as it asks."""
    torch.manual_seed(0)
    if contender.maker == "vitrail":
        with device:  # filled where it will run: the CPU takes seconds for a large one
            network: Any = registry.create_model(contender.model, drop_path_rate=contender.drop_path)
        if contender.subset:
            drop_by_subset(network)
        if contender.patch_drop:
            network.set_patch_drop(contender.patch_drop)
    else:
        import timm

        with device:
            network = timm.create_model(contender.model, drop_path_rate=contender.drop_path)
    network.to(device)
    if contender.way in ("blocks", "fp8"):
        ours = contender.maker == "vitrail"
        blocks = (
            [b for stage in network.backbone.stages for b in stage.blocks] if ours else blocks_of(network)
        )
        if contender.way == "fp8":
            for block in blocks:
                to_float8(block, device)
        if ours:
            Runtime(device=device).prepare(network, blocks, compile=True)
        else:
            for block in blocks:
                block.compile()
    elif contender.way == "whole":
        network.compile()
    elif contender.way == "graphs":
        network.compile(mode="reduce-overhead")
    return network


def to_float8(block: nn.Module, device: torch.device) -> None:
    """A block's linear layers compute in float8 from here on; their weights and the optimiser's stay in float32."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def fits(layer: nn.Module, name: str) -> bool:
        return isinstance(layer, nn.Linear) and not (layer.in_features % 16 or layer.out_features % 16)

    config = Float8LinearConfig(emulate=device.type != "cuda")
    convert_to_float8_training(block, config=config, module_filter_fn=fits)


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


def sit(contender: Contender, device_name: str, pipe: Any, room: Any) -> None:
    """A contender's process: gets ready, says so, and then times as many steps as it is told, again and again."""
    device = torch.device(device_name)
    with tensor_cores(), contextlib.suppress(EOFError):
        try:
            with room:
                go, memory = start(contender, device)
            pipe.send(("ready", memory))
        except Exception as error:  # a peer without this network, no memory, a compiler that gives up
            pipe.send(("left out", " ".join(str(error).split())[:160]))
            return
        while steps := pipe.recv():
            go()  # takes the memory again
            wait(device)
            started = time.perf_counter()
            for _ in range(steps):
                go()
            wait(device)
            passed = (time.perf_counter() - started) / steps
            clear(device)
            pipe.send(passed)


def start(contender: Contender, device: torch.device) -> tuple[Callable[[], Tensor], int]:
    """The contender's step, compiled and warm, and the bytes at its peak."""
    import torch._functorch.config as settings

    if hasattr(settings, "force_non_lazy_backward_lowering"):
        # Else a step holds its activations while the backward is compiled, and many do so at once.
        setattr(settings, "force_non_lazy_backward_lowering", True)  # noqa: B010
    size = registry.variant(contender.model).img_size
    make = stepper if contender.task == "training" else forwarder
    go = make(build(contender, device), contender.batch, size, device)
    for left in reversed(range(20)):  # others get ready too, and may hold the memory at the moment
        try:
            for _ in range(3):  # compiling, recording graphs, the optimiser's state
                go()
            wait(device)
            clear(device)
            go()
            wait(device)
            break
        except RuntimeError as error:  # cuBLAS and cuDNN have words of their own for it
            if not left or not ("out of memory" in str(error) or "ALLOC_FAILED" in str(error)):
                raise
        clear(device)  # not inside `except`, whose traceback keeps the activations
        time.sleep(5)
    # What a replayed graph takes was set aside when it was recorded.
    measured = reserved(device) if contender.way == "graphs" else peak(device)
    clear(device)
    return go, measured


def ready(contenders: list[Contender], device: str, at_once: int, patience: float) -> list[Seat]:
    """The contenders that are ready within `patience` seconds; the others are said and left out."""
    spawn = multiprocessing.get_context("spawn")
    room = spawn.BoundedSemaphore(at_once)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")
    seats = []
    for contender in contenders:
        here, there = spawn.Pipe()
        process = spawn.Process(target=sit, args=(contender, device, there, room), daemon=True)
        process.start()
        there.close()
        seats.append(Seat(contender, process, here))
    began, present = time.perf_counter(), []
    for seat in seats:
        what: tuple[str, Any] = ("left out", "its process ended")
        left = max(0.0, patience - (time.perf_counter() - began))
        with contextlib.suppress(EOFError):
            what = (
                seat.pipe.recv()
                if seat.pipe.poll(left)
                else ("left out", f"not ready after {patience:.0f} s")
            )
        if what[0] == "ready":
            seat.memory = what[1]
            present.append(seat)
            continue
        seat.process.kill()
        print(
            f"{seat.contender.model}: {seat.contender.name}, {seat.contender.task}, left out: {what[1]}",
            flush=True,
        )
    print(
        f"{len(present)} of {len(seats)} contenders ready after {time.perf_counter() - began:.0f} s",
        flush=True,
    )
    return present


def take_turns(seats: list[Seat], rounds: int, steps: int) -> list[Seat]:
    """Times them in turns, and sends them home; those that failed or hung on the way are left out."""
    playing = list(seats)
    for _ in range(rounds):
        for seat in list(playing):
            try:
                seat.pipe.send(steps)
                if not seat.pipe.poll(LONGEST):
                    raise EOFError
                seat.seconds.append(seat.pipe.recv())
            except (EOFError, OSError):
                print(f"{seat.contender.model}: {seat.contender.name} fell out", flush=True)
                seat.process.kill()
                playing.remove(seat)
    for seat in playing:
        seat.pipe.send(0)
        seat.process.join(20)
    return playing


def rows(seats: list[Seat], device: torch.device) -> list[list[str]]:
    """Lines of the table for one network and one task."""
    with torch.device("meta"):
        network = registry.create_model(seats[0].contender.model)
    passes = 3 if seats[0].contender.task == "training" else 1
    flops = 2 * passes * cost(network, network.config.img_size, 3).multiply_adds
    limit = chip_peak(device)
    best = [seat.contender.batch / min(seat.seconds) for seat in seats]
    peers = [rate for seat, rate in zip(seats, best, strict=True) if seat.contender.maker != "vitrail"]
    return [
        [
            seat.contender.model,
            str(seat.contender.batch),
            seat.contender.name,
            f"{rate:,.0f}",
            f"{seat.contender.batch / statistics.median(seat.seconds):,.0f}",
            f"{rate / max(peers):.2f}" if peers else "",
            f"{100 * rate * flops / limit:.1f} %" if limit else "",
            f"{seat.memory / 2**30:.1f}" if device.type == "cuda" else "",
        ]
        for seat, rate in zip(seats, best, strict=True)
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
        # As a block has them: views of one product, and a gradient that lies like the tokens.
        qkv = torch.randn(
            batch, tokens, 3, heads, width, device=device, dtype=torch.bfloat16, requires_grad=True
        )
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, N, E] each
        gradient = torch.randn(batch, tokens, heads, width, device=device, dtype=torch.bfloat16).transpose(
            1, 2
        )
        line = [f"{batch}x{heads}x{tokens}x{width}"]
        for kernel in kernels:
            try:
                with sdpa_kernel(kernel):
                    best = min(timed_attention(q, k, v, gradient, device) for _ in range(rounds))
                line.append(f"{1e3 * best:.2f}")
            except RuntimeError:
                line.append("-")
        table.append(line)
    clear(device)
    return table


def timed_attention(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, device: torch.device) -> float:
    wait(device)
    started = time.perf_counter()
    torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), (q, k, v), gradient)
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
            precision="bf16", compile=device != "cpu", resident=True, eval_every=0, save_every=0, output=folder,
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


def reserved(device: torch.device) -> int:
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def chip_peak(device: torch.device) -> float | None:
    """FLOP/s in bfloat16 that the maker states, where this script knows the chip."""
    return next((rate for part, rate in PEAKS.items() if part in device_name(device)), None)


def parse(doc: str | None, models: list[str]) -> argparse.Namespace:
    """The flags of both GPU benchmarks."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", default=models, help="networks that are trained")
    parser.add_argument("--batch-sizes", nargs="+", type=int, help="one for each of them, or one for all")
    parser.add_argument("--infer", nargs="*", default=[], help="networks that only answer")
    parser.add_argument("--infer-batch", type=int, default=INFER_BATCH)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["eager", "blocks", "whole", "graphs"])
    parser.add_argument("--infer-ways", nargs="+", choices=WAYS, default=["eager", "whole", "graphs"])
    parser.add_argument(
        "--timm-ways", nargs="+", choices=WAYS, help="of timm in training; by default the same"
    )
    parser.add_argument("--drop-path", type=float, default=0.0, help="of ours and timm's")
    parser.add_argument("--drop-path-subset", action="store_true", help="ours computes only what stays")
    parser.add_argument("--patch-drop", type=float, default=0.0, help="share of patches that ours leaves out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="steps in one round")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--at-once", type=int, default=os.cpu_count() or 1, help="contenders that get ready together"
    )
    parser.add_argument(
        "--patience", type=float, default=900.0, help="seconds after which one not ready is left out"
    )
    parser.add_argument(
        "--brief",
        action="store_true",
        help="ours by blocks alone from the third network on, timm eager and whole",
    )
    parser.add_argument(
        "--hold", help="begin the race when this file is there, so that nothing else runs beside it"
    )
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


def entered(given: argparse.Namespace) -> list[Contender]:
    """Every contender that the flags ask for; the networks that compile longest come first."""
    found: list[Contender] = []
    for model, batch in zip(given.models, given.batch_sizes, strict=True):
        for maker, ways in (("vitrail", given.ways), ("timm", given.timm_ways or given.ways)):
            if given.brief and model not in given.models[:2]:
                ways = ["blocks"] if maker == "vitrail" else ["eager", "whole"]
            if "huge" in model:  # 32 blocks in one piece take minutes to compile
                ways = [way for way in ways if way == "fp8"] + ["blocks"]
            ours = maker == "vitrail"
            found += [
                Contender(
                    model, batch, maker, way, "training", given.drop_path,
                    ours and given.drop_path_subset, given.patch_drop if ours else 0.0,
                )
                for way in ways
            ]  # fmt: skip
    for model in given.infer:
        for maker in ("vitrail", "timm"):
            found += [
                Contender(model, given.infer_batch, maker, way, "inference") for way in given.infer_ways
            ]
    return sorted(found, key=lambda contender: WAYS.index(contender.way), reverse=True)


def main(doc: str | None = __doc__, models: list[str] | None = None, infer: list[str] | None = None) -> None:
    given = parse(doc, list(SIZES) if models is None else models)
    given.infer = given.infer or infer or []
    device = torch.device(given.device)
    print(f"{device_name(device)}, torch {torch.__version__}, bfloat16")
    seats = ready(entered(given), given.device, given.at_once, given.patience)
    for _ in range(600):
        if not given.hold or os.path.exists(given.hold):
            break
        time.sleep(0.5)
    if given.attention:
        print(
            plain_table(["B x H x N x E", "cudnn ms", "flash", "efficient", "math"], attention_table(device))
        )
    for task, names in (("training", given.models), ("inference", given.infer)):
        table: list[list[str]] = []
        for model in names:
            mine = [seat for seat in seats if (seat.contender.model, seat.contender.task) == (model, task)]
            mine.sort(key=lambda seat: (seat.contender.maker != "vitrail", WAYS.index(seat.contender.way)))
            if done := take_turns(mine, given.rounds, given.steps):
                found = rows(done, device)
                print(*("  ".join(row) for row in found), sep="\n", flush=True)
                table += found
        if table:
            print(f"\n{task}\n{plain_table(HEAD, table)}")
    if given.data:
        for model, batch in zip(given.models, given.batch_sizes, strict=True):
            rate = end_to_end(model, given.data, batch, given.device, steps=60)
            print(f"{model}: {rate:,.0f} images/s from files to updated weights")


if __name__ == "__main__":
    main()
