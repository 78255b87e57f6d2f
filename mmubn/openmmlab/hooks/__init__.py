"""MMEngine hooks. Importing this package registers those that look into the norm layers while a model trains.

``custom_hooks = [dict(type='FeatureCondensationHook'), dict(type='CovariateShiftHook')]``. The others are for tools:
``class_count`` checks a config, ``class_names`` and ``sample_errors`` the data and ``resumed_model`` a resumption;
``checkpoint`` and ``iteration_seed`` are registered by :mod:`mmubn.openmmlab.resumption`.
"""

from mmubn.openmmlab.hooks.covariate_shift import CovariateShiftHook
from mmubn.openmmlab.hooks.feature_condensation import FeatureCondensationHook

__all__ = ['CovariateShiftHook', 'FeatureCondensationHook']
