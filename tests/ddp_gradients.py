"""Run by torchrun in test_engine.py: gradients of two processes equal those of the joined batch."""

import sys

import torch
import torch.distributed as dist

from train import CrossEntropy
from utilities import build_network, process_group, rank_and_size


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    size = (32, 32, 16)
    return build_network(
        "dynunet", in_channels=1, out_channels=2, base_channels=4, input_size=size
    )  # instance norm: no statistics over the batch


def main() -> None:
    torch.manual_seed(1)
    image, label = torch.randn(4, 1, 32, 32, 16), torch.randint(0, 2, (4, 1, 32, 32, 16))
    with process_group(torch.device("cpu")):
        rank, processes = rank_and_size()
        if sys.argv[1:] == ["die"] and rank == 1:
            sys.exit("process 1 dies on purpose")
        assert processes == 2
        share = slice(2 * rank, 2 * rank + 2)
        model = torch.nn.parallel.DistributedDataParallel(network())
        CrossEntropy()(model(image[share]), label[share]).backward()
        joined = network()
        CrossEntropy()(joined(image), label).backward()
        for ours, theirs in zip(model.parameters(), joined.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
        dist.barrier()
    print(f"process {rank}: equal")


if __name__ == "__main__":
    main()
