"""Hooks that read a checkpoint of their own, as parts of OpenMMLab do, for configs of tests."""

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import load_checkpoint
from torch import nn


@HOOKS.register_module(force=True)
class TeacherHook(Hook):
    """Reads when it is built, as detectors with a teacher do."""

    def __init__(self, checkpoint):
        load_checkpoint(nn.Linear(2, 2), checkpoint)


@HOOKS.register_module(force=True)
class EverythingHook(Hook):
    """Reads before the training, and asks for everything."""

    def __init__(self, checkpoint):
        self.checkpoint = checkpoint

    def before_train(self, runner):
        torch.load(self.checkpoint, weights_only=False)
