"""How far FAVOR+ is from softmax attention, against the number of random features: a table and a picture.

    python benchmarks/favor_error.py [--draws 20] [--picture docs/pictures/favor_error.png]

One head of 64, 196 tokens (a 224-pixel image in patches of 16). Error: length of the difference of the outputs over
the length of the exact output, mean over draws of W. "average" is what plain averaging of the values gives: features
that do worse have learned nothing of the scores. Queries and keys of standard deviation 0.25 and 0.5 are those of a
network that learns with FAVOR+; 1 is a softmax network's start; clusters are pictures of a few things.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vitrail.nn.attention import attention_weights
from vitrail.nn.performer import Kernel, draw_projection, linear_attention

TOKENS, WIDTH = 196, 64
FEATURES = (16, 32, 64, 128, 266, 512, 1024, 2048, 4096)

Triple = tuple[Tensor, Tensor, Tensor]


def gaussian(deviation: float) -> Triple:
    """Queries, keys and values without structure."""
    queries, keys = (torch.randn(TOKENS, WIDTH) * deviation for _ in range(2))
    return queries, keys, torch.randn(TOKENS, WIDTH)


def clusters(length: float, count: int = 14) -> Triple:
    """Tokens of a few kinds, whose queries and keys agree; each is `length` long after the scaling by E^(-1/4)."""
    kinds = torch.nn.functional.normalize(torch.randn(count, WIDTH), dim=1)
    centres = torch.randn(count, WIDTH)
    kind = torch.randint(count, (TOKENS,))
    tokens = torch.nn.functional.normalize(kinds[kind] + 0.05 * torch.randn(TOKENS, WIDTH), dim=1)
    tokens = tokens * length * WIDTH**0.25
    return tokens, tokens, centres[kind] + 0.1 * torch.randn(TOKENS, WIDTH)


INPUTS: dict[str, Callable[[], Triple]] = {
    "Gaussian, 0.25": lambda: gaussian(0.25),
    "Gaussian, 0.5": lambda: gaussian(0.5),
    "Gaussian, 1": lambda: gaussian(1.0),
    "clusters, length 1": lambda: clusters(1.0),
    "clusters, length 2": lambda: clusters(2.0),
}

ROWS: dict[str, Callable[[int], Tensor]] = {
    "orthogonal": lambda count: draw_projection(count, WIDTH),
    "sqrt(E) long": lambda count: draw_projection(count, WIDTH, "width"),
    "independent": lambda count: torch.randn(count, WIDTH),
}


def error(triple: Triple, projection: Tensor) -> float:
    """Of FAVOR+ with these random rows, against softmax attention."""
    queries, keys, values = triple
    exact = attention_weights(queries, keys, WIDTH**-0.5) @ values
    kernel = Kernel()
    phi_q = kernel.features(queries, projection, keys=False)
    phi_k = kernel.features(keys, projection, keys=True)
    return float((linear_attention(phi_q, phi_k, values) - exact).norm() / exact.norm())


def average_error(triple: Triple) -> float:
    """Of the values' plain average, against softmax attention."""
    queries, keys, values = triple
    exact = attention_weights(queries, keys, WIDTH**-0.5) @ values
    return float((values.mean(dim=0) - exact).norm() / exact.norm())


def measure(draws: int) -> dict[str, dict[str, list[float]]]:
    """Errors by input and kind of rows, one for each count of features; and the average's, repeated."""
    table: dict[str, dict[str, list[float]]] = {}
    for name, make in INPUTS.items():
        torch.manual_seed(0)
        triples = [make() for _ in range(draws)]
        lines = {
            kind: [mean(error(triple, draw(count)) for triple in triples) for count in FEATURES]
            for kind, draw in ROWS.items()
        }
        lines["average"] = [mean(average_error(triple) for triple in triples)] * len(FEATURES)
        table[name] = lines
    return table


def mean(values: object) -> float:
    numbers = list(values)  # type: ignore[call-overload]
    return math.fsum(numbers) / len(numbers)


def show(table: dict[str, dict[str, list[float]]]) -> None:
    print(f"{'input':20s} {'rows':13s} " + " ".join(f"m={count:<6d}" for count in FEATURES))
    for name, lines in table.items():
        for kind, errors in lines.items():
            print(f"{name:20s} {kind:13s} " + " ".join(f"{value:<8.3f}" for value in errors))


def draw(table: dict[str, dict[str, list[float]]], place: Path) -> None:
    """One panel an input, error against m, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(table), figsize=(3.1 * len(table), 3.4), sharey=True)
    for panel, (name, lines) in zip(panels, table.items(), strict=True):
        for kind, errors in lines.items():
            style = {"color": "grey", "linestyle": "--"} if kind == "average" else {"marker": "."}
            panel.loglog(
                FEATURES, errors, label="average of the values" if kind == "average" else kind, **style
            )
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("random features m")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("error against softmax attention")
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    place.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(place, dpi=110)
    print(f"picture: {place}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="FAVOR+ against softmax attention, by the number of features."
    )
    parser.add_argument("--draws", type=int, default=20, help="inputs and draws of W that are averaged")
    parser.add_argument("--picture", type=Path, default=Path("docs/pictures/favor_error.png"))
    chosen = parser.parse_args(arguments)
    with torch.inference_mode():
        table = measure(chosen.draws)
    show(table)
    draw(table, chosen.picture)


if __name__ == "__main__":
    main()
