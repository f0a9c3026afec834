"""What each of two processes does in test_engine.py, as torchrun begins them.

Gradients of two processes equal those of the joined batch; train.py trains and one of them writes;
then one dies.
"""

import contextlib
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import train
from utilities import build_network, process_group, rank_and_size

SMALL = {
    "base_channels": 4, "input_size": (16, 16), "spacing": (16.0, 16.0), "max_epochs": 2,
    "device": "cpu",
}  # fmt: skip


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    size = (32, 32, 16)
    return build_network(
        "dynunet", in_channels=1, out_channels=2, base_channels=4, input_size=size
    )  # instance norm: no statistics over the batch


def compare_gradients(rank: int) -> None:
    torch.manual_seed(1)
    image, label = torch.randn(4, 1, 32, 32, 16), torch.randint(0, 2, (4, 1, 32, 32, 16))
    share = slice(2 * rank, 2 * rank + 2)
    model = torch.nn.parallel.DistributedDataParallel(network())
    train.CrossEntropy()(model(image[share]), label[share]).backward()
    joined = network()
    train.CrossEntropy()(joined(image), label).backward()
    for ours, theirs in zip(model.parameters(), joined.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    dist.barrier()
    print(f"process {rank}: equal", flush=True)


def work(data: Path, run: Path) -> None:
    torch.set_num_threads(1)  # makes torch's pool after the fork, before threads ask for it
    with process_group(torch.device("cpu")):
        rank, processes = rank_and_size()
        assert processes == 2
        compare_gradients(rank)
        # in this group: a second one would meet what the first left in torchrun's store
        train.process_group = lambda _: contextlib.nullcontext()
        train.main(train.Config(data=data, run_folder=run, **SMALL))
        sys.stdout.flush()
        dist.barrier()  # both have said and written everything
        if rank == 1:
            sys.exit("process 1 dies on purpose")
        dist.barrier()  # waits for nobody
