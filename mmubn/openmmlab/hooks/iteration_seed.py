"""A hook that seeds the random generators for every training iteration, so that a resumed run is the whole one."""

from __future__ import annotations

import random

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

__all__ = ['IterationSeedHook']


def seed_global_generators(*key: int) -> int:
    """Seed Python's, NumPy's and torch's global generators on the CPU from all of ``key``; the seed they got."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    return seed


class _SeededFetch:
    """``dataset.__getitems__``, which a DataLoader calls for each batch, in a worker or without one.

    Batch number n of a run is fetched after seeding with n, whoever fetches it.
    """

    def __init__(self, dataset: Dataset, seed: int, rank: int) -> None:
        self.dataset, self.key = dataset, (seed, rank)
        self.fetch = getattr(dataset, '__getitems__', None)
        # The number of the first batch of the epoch; in shared memory, for workers that outlive an epoch.
        self.first = torch.zeros((), dtype=torch.int64).share_memory_()
        self.seen, self.fetched = -1, 0

    def __call__(self, indices: list) -> list:
        first = int(self.first)
        if first != self.seen:
            self.seen, self.fetched = first, 0
        worker = get_worker_info()  # batches go to the workers in turn
        number = first + (self.fetched if worker is None else self.fetched * worker.num_workers + worker.id)
        self.fetched += 1
        seed_global_generators(*self.key, number, 0)
        return self.fetch(indices) if self.fetch else [self.dataset[index] for index in indices]


@HOOKS.register_module()
class IterationSeedHook(Hook):
    """Seeds the global random generators for every training iteration, so that a resumed run draws the same numbers.

    MMEngine seeds once, at the start, and saves no generator: after a resumption RoI samplers, dropout and
    augmentations draw other numbers than the uninterrupted run. Here iteration i seeds with (seed, process, i) before
    its batch is fetched and before its forward pass: Python's, NumPy's and torch's global generators, in the training
    process and in data-loader workers, persistent or not, so nothing depends on the number of workers or on what
    validation draws. Order of the data, learning rates, momenta and buffers resume exactly already.

    Exact, on the CPU, are runs with ``randomness=dict(seed=...)`` in the config and as many processes, in epoch-based
    training and, with an InfiniteSampler, in iteration-based. On GPUs the numbers drawn are the same, but kernels may
    add in another order (``randomness.deterministic=True`` helps). With more than two processes a reduction may, too.
    Not covered: transforms that own a generator, iterable data sets, loaders without automatic batching and, with
    mmengine 0.10.7, augmentations in the workers of iteration-based training, which start before any hook.
    """

    priority = 'VERY_HIGH'

    def before_train(self, runner: Runner) -> None:
        self._fetch = None
        loader = getattr(runner.train_loop, 'dataloader', None)
        if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
            previous = getattr(loader.dataset, '__getitems__', None)
            if isinstance(previous, _SeededFetch):
                del loader.dataset.__getitems__
            # An attribute of the data set rather than a wrapper around it: hooks go on finding what they look for.
            self._fetch = _SeededFetch(loader.dataset, runner.seed, get_rank())
            loader.dataset.__getitems__ = self._fetch

    def before_train_epoch(self, runner: Runner) -> None:
        if self._fetch is not None:
            self._fetch.first.fill_(runner.iter)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        torch.manual_seed(seed_global_generators(runner.seed, get_rank(), runner.iter, 1))  # accelerators too
