"""MMEngine hooks that look into the norm layers while a model trains: ``custom_hooks = [dict(type=...)]``."""

from mmubn.hooks.covariate_shift import CovariateShiftHook
from mmubn.hooks.feature_condensation import FeatureCondensationHook

__all__ = ['CovariateShiftHook', 'FeatureCondensationHook']
