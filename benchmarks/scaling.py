"""One optimizer step dealt over 1, 2 and 4 processes: the same prompts, the same gradient.

    python benchmarks/scaling.py [--shape tinystories-1m] [--processes 1 2 4] [--threads 1]

Each row is a `torchrun` of this file on this machine: a model with random weights, forward passes of one prompt, and the median step of rank 0
after two for warming up. Processes share what the machine has, so more of them than cores (or GPUs) bring nothing.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

import torch
from measure import SHAPES, Case, as_in_a_run, load_model, our_step

from sae_lens_e2e.training import ranks


def seconds_a_step(shape_name: str, steps: int) -> float:
    """In one of the processes, all of which are given the same prompts."""
    ranks.begin()
    shape = SHAPES[shape_name]
    step, group = our_step(load_model(shape), Case(shape_name, prompts_per_forward=1))
    generator = torch.Generator().manual_seed(1)
    seconds: list[float] = []
    with as_in_a_run(group, shape.n_pos):
        for _ in range(steps + 2):
            tokens = torch.randint(0, 50257, (shape.n_prompts, shape.n_pos), generator=generator)
            start = time.perf_counter()
            step(tokens)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="tinystories-1m")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        seconds = seconds_a_step(arguments.shape, arguments.steps)
        if ranks.is_first():
            print(f"SECONDS {seconds}")
        return
    n_tokens = SHAPES[arguments.shape].n_tokens
    print(
        f"{arguments.shape}, {n_tokens} tokens a step, {arguments.threads} thread(s) a process, {os.cpu_count()} cores"
    )
    print("| processes | s a step | tokens/s | times one |\n| --- | --- | --- | --- |")
    first: float | None = None
    for n in arguments.processes:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), "--standalone", __file__]
        given = ["--one", "--shape", arguments.shape, "--steps", str(arguments.steps)]
        environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
        run = subprocess.run([*command, *given], capture_output=True, text=True, check=False, env=environment)
        if run.returncode:
            raise RuntimeError(run.stderr[-2000:])
        seconds = float(next(line.split()[1] for line in run.stdout.splitlines() if line.startswith("SECONDS")))
        first = first or seconds
        print(f"| {n} | {seconds:.2f} | {n_tokens / seconds:.0f} | {first / seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
