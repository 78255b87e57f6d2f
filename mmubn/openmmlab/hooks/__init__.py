"""MMEngine hooks. Importing this package registers those that a config may name.

``FeatureCondensationHook`` and ``CovariateShiftHook`` look into the norm layers while a model trains,
``PaddingAwareHook`` lets them leave out the padding of a batch in evaluation:
``custom_hooks = [dict(type='PaddingAwareHook')]``. The others are for tools:
``class_count`` checks a config, ``class_names`` and ``sample_errors`` the data and ``resumed_model`` a resumption;
``checkpoint`` and ``iteration_seed`` are registered by :mod:`mmubn.openmmlab.resumption`.
"""

from mmubn.openmmlab.hooks.covariate_shift import CovariateShiftHook
from mmubn.openmmlab.hooks.feature_condensation import FeatureCondensationHook
from mmubn.openmmlab.hooks.padding_aware import PaddingAwareHook

__all__ = ['CovariateShiftHook', 'FeatureCondensationHook', 'PaddingAwareHook']
