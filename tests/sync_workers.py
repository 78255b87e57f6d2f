"""What the processes of tests/layers/test_sync_ubn.py run; a module of its own, so that new processes can import it."""

import contextlib
import os

import torch
from torch import distributed as dist
from torch.utils.checkpoint import checkpoint

from mmubn.layers import SyncUBN
from mmubn.ops import use_backend


def run(rank, world, folder):
    """Run every scenario and save what this process saw of it."""
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=world)
    collectives = count_collectives()
    results = {}
    for name, scenario in torch.load(folder / 'scenarios.pt').items():
        with computing_by(scenario.get('backend')):
            results[name] = steps_of(scenario, rank, collectives)
    torch.save(results, f'{folder}/{rank}.pt')
    dist.barrier()
    os._exit(0)  # torch's tear-down of gloo may hang: it joins threads under the lock that they wait for


def steps_of(scenario, rank, collectives):
    # Every process makes every group, and is in one.
    groups = {ranks: dist.new_group(ranks) for ranks in scenario.get('groups', ())}
    own = [group for ranks, group in groups.items() if rank in ranks]
    options = dict(scenario['options'], process_group=own[0] if own else None)
    layer = SyncUBN(scenario['batches'][0][0].shape[1], **options).to(scenario['batches'][0][0].dtype)
    layer.load_state_dict(scenario['state_dict'])
    layer.train(scenario.get('training', True))
    if scenario.get('compiled'):
        layer.compile(backend='aot_eager', fullgraph=True)
    steps = []
    for parts in scenario['batches']:
        layer.zero_grad()
        collectives.update(dict.fromkeys(collectives, 0))
        x = parts[rank].clone().requires_grad_()
        if (reentrant := scenario.get('reentrant')) is None:
            y = layer(x)
        else:
            y = checkpoint(layer, x, use_reentrant=reentrant)
        (y * weights(y)).sum().backward()
        steps.append(
            {
                'y': y.detach(),
                'x.grad': x.grad,
                'grads': {key: parameter.grad for key, parameter in layer.named_parameters()},
                'buffers': {key: buffer.clone() for key, buffer in layer.named_buffers()},
                'collectives': dict(collectives),
            }
        )
    return steps


@contextlib.contextmanager
def computing_by(backend):
    """A backend, or what the layer chooses. The Triton kernels run in Triton's interpreter."""
    with contextlib.ExitStack() as stack:
        if backend == 'triton':
            from interpreter import interpreted_kernels

            stack.enter_context(interpreted_kernels())
        if backend is not None:
            stack.enter_context(use_backend(backend))
        yield


def weights(y):
    """Weights of a loss that depend on nothing but the channel and the place, so that every process has the same."""
    channels, height, width = y.shape[1:]
    plane = torch.linspace(-1, 2, channels * height * width, dtype=y.dtype)
    return plane.view(1, channels, height, width)


def count_collectives():
    counts = {'all_gather_into_tensor': 0, 'all_reduce': 0}

    def count(name, call):
        def counted(*args, **kwargs):
            if not torch.compiler.is_compiling():
                counts[name] += 1
            return call(*args, **kwargs)

        setattr(dist, name, counted)

    for name in counts:
        count(name, getattr(dist, name))
    return counts
