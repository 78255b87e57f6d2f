"""What the processes of tests/test_convert_processes.py run: a module, so that new processes can import it."""

import os

import torch
from helpers import batch
from torch import distributed as dist
from torch import nn

from mmubn import convert_norms

X = batch((8, 3, 6, 6))


class Net(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))


def step(model, x):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (model(x).square() * torch.linspace(0, 1, 4).view(1, 4, 1, 1)).mean().backward()
    optimizer.step()
    return {key.removeprefix('module.'): value.detach().clone() for key, value in model.state_dict().items()}


def work(rank, norm, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(convert_norms(Net(), norm), broadcast_buffers=False)
    torch.save(step(model, X[4 * rank : 4 * rank + 4]), f'{folder}/{rank}.pt')
    dist.barrier()
    os._exit(0)  # torch's tear-down of gloo may hang
