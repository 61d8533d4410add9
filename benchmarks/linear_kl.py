"""Time the linear KL with its gradient against its own three matrix multiplications, at the default chunk.

    python benchmarks/linear_kl.py

The floor is the two products that give the logits and the one that takes their gradient back, on chunks of the same size,
into buffers allocated beforehand. Both take turns; the figure is the ratio of the medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from sae_lens_e2e.splice.unembedding import N_BUFFERS, chunk_size, linear_kl

SHAPES = {"tinystories-1m": (64, 50257, 2048), "gpt2-small": (768, 50257, 256)}


def three_products(spliced: torch.Tensor, clean: torch.Tensor, weight: torch.Tensor, chunk: int) -> Callable[[], None]:
    """The multiplications alone."""
    a, b, *_ = torch.empty(N_BUFFERS, chunk, weight.shape[1])
    grad = torch.empty_like(spliced)

    def run() -> None:
        for start in range(0, len(spliced), chunk):
            rows = slice(start, min(start + chunk, len(spliced)))
            n = rows.stop - rows.start
            torch.mm(spliced[rows], weight, out=a[:n])
            torch.mm(clean[rows], weight, out=b[:n])
            torch.mm(b[:n], weight.T, out=grad[rows])

    return run


def compare(d_model: int, d_vocab: int, n_tokens: int, repeats: int) -> tuple[float, float]:
    """Median seconds of the linear KL and of its multiplications."""
    torch.manual_seed(0)
    weight = torch.randn(d_model, d_vocab) / d_model**0.5
    clean, spliced = torch.randn(2, n_tokens, d_model)
    spliced.requires_grad_()
    chunk = chunk_size(d_vocab, weight.dtype, weight.device)
    floor = three_products(spliced.detach(), clean, weight, chunk)
    candidates: list[Callable[[], object]] = [lambda: linear_kl(spliced, clean, weight).backward(), floor]
    times: list[list[float]] = [[], []]
    for _ in range(repeats + 1):
        for candidate, seconds in zip(candidates, times, strict=True):
            start = time.perf_counter()
            candidate()
            seconds.append(time.perf_counter() - start)
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| shape | tokens | linear KL and gradient s | three products s | ratio |")
    print("| --- | --- | --- | --- | --- |")
    for name, (d_model, d_vocab, n_tokens) in SHAPES.items():
        ours, floor = compare(d_model, d_vocab, n_tokens, repeats)
        print(f"| {name} | {n_tokens} | {ours:.3f} | {floor:.3f} | {ours / floor:.2f} |")


if __name__ == "__main__":
    main()
