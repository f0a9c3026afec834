"""What each of two processes does in test_engine.py, as torchrun begins them.

Gradients of two processes equal those of the joined batch; train.py trains, is interrupted in one
process, and resumes; one process writes; then one dies.
"""

import contextlib
import itertools
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import train
import utilities
from utilities import build_network, process_group, rank_and_size

SMALL = {
    "base_channels": 4, "input_size": (16, 16), "spacing": (16.0, 16.0), "max_epochs": 2,
    "device": "cpu", "batch_size": 1,
}  # fmt: skip


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    how = {"in_channels": 1, "out_channels": 2, "base_channels": 4, "input_size": (32, 32, 16)}
    return build_network("dynunet", **how)  # instance norm: no statistics over the batch


def compare_gradients(rank: int) -> None:
    torch.manual_seed(1)
    image, label = torch.randn(4, 1, 32, 32, 16), torch.randint(0, 2, (4, 1, 32, 32, 16))
    share, loss_function = slice(2 * rank, 2 * rank + 2), train.LOSSES["ce"](None)
    model = torch.nn.parallel.DistributedDataParallel(network())
    loss_function(model(image[share]), label[share]).backward()
    joined = network()
    loss_function(joined(image), label).backward()
    for ours, theirs in zip(model.parameters(), joined.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    dist.barrier()
    print(f"process {rank}: equal", flush=True)


@contextlib.contextmanager
def interrupt_second(*_, **__):
    """In the place of `delayed_interrupt`: asks process 1 alone to stop, in its third step."""
    asked = itertools.count()
    yield lambda: rank_and_size()[0] == 1 and next(asked) > 3


def work(data: Path, folder: Path) -> None:
    torch.set_num_threads(1)  # makes torch's pool after the fork, before threads ask for it
    with process_group(torch.device("cpu")):
        rank, processes = rank_and_size()
        assert processes == 2
        compare_gradients(rank)
        # in this group: a second one would meet what the first left in torchrun's store
        train.process_group = lambda _: contextlib.nullcontext()
        train.main(train.Config(data=data, run_folder=folder / "run", **SMALL))
        usual, utilities.delayed_interrupt = utilities.delayed_interrupt, interrupt_second
        try:
            train.main(train.Config(data=data, run_folder=folder / "broken", **SMALL))
        except KeyboardInterrupt:
            print(f"process {rank}: stopped", flush=True)
        utilities.delayed_interrupt = usual
        dist.barrier()
        train.main(train.Config(resume=folder / "broken", device="cpu"))
        sys.stdout.flush()
        dist.barrier()  # both have said and written everything
        if rank == 1:
            sys.exit("process 1 dies on purpose")
        dist.barrier()  # waits for nobody
