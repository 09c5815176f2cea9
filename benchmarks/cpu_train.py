"""Training on the CPU, beside timm and transformers in the same run.

    python benchmarks/cpu_train.py [MODEL] [--batch-size 16] [--repeats 8]

ViT-S/16 at batch 16 by default, in float32, and in bfloat16 where the chip computes in it (elsewhere torch imitates
bfloat16, many times slower, and nobody would train so). The contenders take turns; see vitrail/jobs/bench.py.
"""

from __future__ import annotations

import argparse

from vitrail.cli.show import plain_table
from vitrail.cli.verbs import bench_rows
from vitrail.jobs.bench import bench
from vitrail.runs import BenchRun
from vitrail.runtime import choose_device, has_bfloat16


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="vit_small_patch16_224")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=8)
    given = parser.parse_args()
    bf16 = has_bfloat16(choose_device("cpu"))
    for precision in ("fp32", "bf16") if bf16 else ("fp32",):
        run = BenchRun(
            model=given.model,
            mode="train",
            batch_size=given.batch_size,
            repeats=given.repeats,
            precision=precision,
            peers=True,
            device="cpu",
        )
        found = bench(run)
        print(f"\n{found.model}, batch {found.batch_size}, {precision}, {found.threads} threads")
        print(plain_table(*bench_rows(found)))
    if not bf16:
        print("\nThis chip has no bfloat16 units: bf16 is left out.")


if __name__ == "__main__":
    main()
