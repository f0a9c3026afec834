"""What each of two processes does in test_engine.py, as torchrun begins them.
train.py trains, is interrupted in one process, and resumes; one process writes; then one dies."""

import contextlib
import itertools
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import train
import utilities
from utilities import process_group, rank_and_size, settings

SMALL = {
    "base_channels": 4, "input_size": (16, 16), "spacing": (16.0, 16.0), "max_epochs": 2,
    "device": "cpu", "batch_size": 1,
}  # fmt: skip


USUAL = utilities.validate


@contextlib.contextmanager
def interrupt_second(*_, **__):
    """In the place of `delayed_interrupt`: asks process 1 alone to stop, in its third step."""
    asked = itertools.count()
    yield lambda: rank_and_size()[0] == 1 and next(asked) > 3


def validate_alike(*given, **how):
    """In the place of `validate`: every process must ask the network that is saved."""
    row, run = USUAL(*given, **how), given[0]
    first, second = utilities.gather([float(v.sum()) for v in run.kept.state_dict().values()])
    if first != second:
        print("the processes validate different networks", flush=True)
    return row


def work(data: Path, folder: Path) -> None:
    torch.set_num_threads(1)  # makes torch's pool after the fork, before threads ask for it
    with process_group(torch.device("cpu")):
        rank, processes = rank_and_size()
        assert processes == 2
        # in this group: a second one would meet what the first left in torchrun's store
        utilities.process_group = lambda _: contextlib.nullcontext()
        utilities.validate = validate_alike
        train.main(train.Config(data=data, run_folder=folder / "run", **SMALL))
        usual, settings.delayed_interrupt = settings.delayed_interrupt, interrupt_second
        try:
            train.main(train.Config(data=data, run_folder=folder / "broken", **SMALL))
        except KeyboardInterrupt:
            print(f"process {rank}: stopped", flush=True)
        settings.delayed_interrupt = usual
        dist.barrier()
        train.main(train.Config(resume=folder / "broken", device="cpu"))
        sys.stdout.flush()
        dist.barrier()  # both have said and written everything
        if rank == 1:
            sys.exit("process 1 dies on purpose")
        dist.barrier()  # waits for nobody
