"""What the checks before a step add to a training step of the MLP 784-20-10, on every CPU backend.

    python -m benchmarks.step_checks [--threads N]

The same optimizer trains with its checks and with the checks replaced by nothing, in turns. A native step that repeats the
last one skips the check of gradients and state, because its plan has compared all of these tensors already.
"""

import argparse
from contextlib import ExitStack
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.timing import side_by_side, write_table
from learned_optim import LearnedOptimizer, optimizer
from meta_train.tasks.modules import mlp

STEPS = 20
CHECKS = ("check_fit", "check_group_options", "check_modes")


def nothing(*_: object) -> None:
    """Check nothing."""


def main() -> None:
    """Time every backend and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    torch.set_num_threads(parser.parse_args().threads)
    rows = []
    for backend in ("native", "reference", "compiled"):
        torch.manual_seed(0)
        module = mlp([784, 20, 10], nn.Sigmoid)
        learned = LearnedOptimizer(module.parameters(), backend=backend)
        inputs, labels = torch.randn(128, 784), torch.randint(0, 10, (128,))

        def train(
            module: nn.Module = module, learned: LearnedOptimizer = learned, batch: tuple[Tensor, Tensor] = (inputs, labels)
        ) -> None:
            for _ in range(STEPS):
                learned.zero_grad()
                cross_entropy(module(batch[0]), batch[1]).backward()
                learned.step()

        def train_unchecked(train=train) -> None:  # type: ignore[no-untyped-def]
            with ExitStack() as stack:
                for check in CHECKS:
                    stack.enter_context(mock.patch.object(optimizer, check, nothing))
                train()

        seconds = side_by_side({"with checks": train, "without": train_unchecked}, repeats=30)
        ratio = seconds["with checks"] / seconds["without"]
        print(f"{backend:<12}{ratio:.4f} x")
        rows.append({"backend": backend, "with_checks_over_without": f"{ratio:.4f}"})
    write_table("step_checks", rows)


if __name__ == "__main__":
    main()
