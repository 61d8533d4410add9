"""Time the linear KL with its gradient against its own three matrix multiplications, at the best chunk there is.

    python benchmarks/linear_kl.py

The floor is the two products that give the logits and the one that takes their gradient back, into buffers allocated
beforehand, in chunks of the size at which they are fastest. Both take turns; the figure is the ratio of the medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from sae_lens_e2e.splice.unembedding import linear_kl

SHAPES = {"tinystories-1m": (64, 50257, 2048), "gpt2-small": (768, 50257, 1024)}
CHUNKS = (32, 64, 128, 256, 512)


def three_products(spliced: torch.Tensor, clean: torch.Tensor, weight: torch.Tensor, chunk: int) -> Callable[[], None]:
    """The multiplications alone."""
    a, b = torch.empty(2, chunk, weight.shape[1])
    grad = torch.empty_like(spliced)

    def run() -> None:
        for start in range(0, len(spliced), chunk):
            rows = slice(start, min(start + chunk, len(spliced)))
            n = rows.stop - rows.start
            torch.mm(spliced[rows], weight, out=a[:n])
            torch.mm(clean[rows], weight, out=b[:n])
            torch.mm(b[:n], weight.T, out=grad[rows])

    return run


def compare(d_model: int, d_vocab: int, n_tokens: int, repeats: int) -> tuple[float, float, int]:
    """Median seconds of the linear KL, of its multiplications at their best chunk, and that chunk."""
    torch.manual_seed(0)
    weight = torch.randn(d_model, d_vocab) / d_model**0.5
    clean, spliced = torch.randn(2, n_tokens, d_model)
    spliced.requires_grad_()
    floors = [three_products(spliced.detach(), clean, weight, chunk) for chunk in CHUNKS]
    candidates: list[Callable[[], object]] = [lambda: linear_kl(spliced, clean, weight).backward(), *floors]
    times: list[list[float]] = [[] for _ in candidates]
    for _ in range(repeats + 1):
        for candidate, seconds in zip(candidates, times, strict=True):
            start = time.perf_counter()
            candidate()
            seconds.append(time.perf_counter() - start)
    ours, *of_chunks = (statistics.median(seconds[1:]) for seconds in times)
    return ours, min(of_chunks), CHUNKS[of_chunks.index(min(of_chunks))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| shape | tokens | linear KL and gradient s | three products s | at a chunk of | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, (d_model, d_vocab, n_tokens) in SHAPES.items():
        ours, floor, chunk = compare(d_model, d_vocab, n_tokens, repeats)
        print(f"| {name} | {n_tokens} | {ours:.3f} | {floor:.3f} | {chunk} | {ours / floor:.2f} |", flush=True)


if __name__ == "__main__":
    main()
