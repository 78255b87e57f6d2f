"""A toy whose metric depends on the norm statistics of the process that validates."""

import numpy as np
import torch
import toy
from mmengine.evaluator import BaseMetric
from mmengine.registry import DATASETS, METRICS, MODELS


@DATASETS.register_module(force=True)
class FixedDataset(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return dict(inputs=torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(index)))


@MODELS.register_module(force=True)
class Predicting(toy.ToyModel):
    def forward(self, inputs, mode):
        if mode == 'loss':
            return super().forward(inputs, mode)
        return list(self.layers(torch.stack(inputs)))


@METRICS.register_module(force=True)
class MeanPrediction(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results += [float(each) for each in data_samples]

    def compute_metrics(self, results):
        return dict(mean=float(np.mean(results)))


def config(work_dir, **hook):
    """One that trains, validates and evaluates; with the averaged model of ``hook`` if there is one."""
    cfg = toy.config(work_dir, epochs=2)
    cfg.custom_imports.imports = ['own_statistics']
    cfg.model = dict(type='Predicting', threshold=0.99)
    loader = dict(cfg.val_dataloader, batch_size=1, dataset=dict(type='FixedDataset'))
    metric = dict(type='MeanPrediction')
    cfg.update(val_dataloader=loader, test_dataloader=loader, val_evaluator=metric, test_evaluator=metric)
    cfg.update(test_cfg=dict(), custom_hooks=[dict(type='EMAHook', **hook)] if hook else [])
    cfg.default_hooks.checkpoint.update(save_best='mean', rule='greater')
    return cfg
