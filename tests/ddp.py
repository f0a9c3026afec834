"""Run by torchrun in test_engine.py, in two processes: `ddp.py DATA RUN_FOLDER`.

Gradients of two processes equal those of the joined batch; train.py trains and one of them writes;
then one dies.
"""

import runpy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from children import draw_nothing

from train import CrossEntropy
from utilities import build_network, process_group, rank_and_size

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--base-channels 4 --input-size 16 16 --spacing 16 16 --max-epochs 2 --device cpu"


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    size = (32, 32, 16)
    return build_network(
        "dynunet", in_channels=1, out_channels=2, base_channels=4, input_size=size
    )  # instance norm: no statistics over the batch


def compare_gradients() -> None:
    torch.manual_seed(1)
    image, label = torch.randn(4, 1, 32, 32, 16), torch.randint(0, 2, (4, 1, 32, 32, 16))
    with process_group(torch.device("cpu")):
        rank, processes = rank_and_size()
        assert processes == 2
        share = slice(2 * rank, 2 * rank + 2)
        model = torch.nn.parallel.DistributedDataParallel(network())
        CrossEntropy()(model(image[share]), label[share]).backward()
        joined = network()
        CrossEntropy()(joined(image), label).backward()
        for ours, theirs in zip(model.parameters(), joined.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
        dist.barrier()
    print(f"process {rank}: equal", flush=True)


def main() -> None:
    data, run = sys.argv[1:]
    compare_gradients()
    draw_nothing()
    sys.argv = ["train.py", "--data", data, "--run-folder", run, *SMALL.split()]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    with process_group(torch.device("cpu")):
        if rank_and_size()[0] == 1:
            sys.exit("process 1 dies on purpose")
        dist.barrier()


if __name__ == "__main__":
    main()
