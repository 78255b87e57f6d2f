"""The table of all that this package changes in other libraries, and the two functions that apply it.

docs/patches.md is this table in words; ``python -m mmubn.openmmlab`` prints that page. Needs the standard library
alone: what a row names is imported when the row is applied.
"""

from __future__ import annotations

import os
import pkgutil
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import util
from typing import Any

__all__ = ['ADDITIONS', 'PATCHES', 'SKIP', 'Addition', 'Patch', 'apply', 'install']

SKIP = 'MMUBN_SKIP_PATCHES'  # an environment variable
SAFE_READER = 'safe-reader'  # the row that it cannot name: tools have an option for it

# What applies a row, ``Patch.when``.
ON_IMPORT = 'import mmubn'
ON_INSTALL = 'mmubn.openmmlab.install()'
ON_PRETRAINED = 'import mmubn.openmmlab.pretrained'
ON_CPU_AMP = '--amp on a CPU (CPUAmpOptimWrapper)'
ON_ATOMIC_CHECKPOINTS = 'training with AtomicCheckpointHook'
ON_CONVERSION = 'mmubn.convert_norms()'
ON_PLOTS = 'import mmubn.analysis.plots'
ON_TOOLS = 'each tool of this package, at its start'


@dataclass(frozen=True)
class Patch:
    """A change in another library.

    Attributes:
        name: For :func:`install` and MMUBN_SKIP_PATCHES.
        symbols: What is changed, dotted; ``['key']`` is an entry of a registry or a dict.
        when: What applies it.
        why: What goes wrong without it, or is missing.
        others: What it does to models without a norm of this package.
        versions: Of the libraries that it was written for and is tested with.
        switch_off: How to do without, and what is then the case.
        replacement: ``module:function`` that makes the new value of each symbol from the old one.
        importers: Modules that import the symbol by its name, dotted: changed there too, in those that are loaded. One
            that is loaded later gets the new value by itself.
        action: ``module:function`` that makes the change, in place of ``replacement``; None, too, where the module that
            ``when`` names makes it.
    """

    name: str
    symbols: tuple[str, ...]
    when: str
    why: str
    others: str
    versions: str
    switch_off: str
    replacement: str | None = None
    importers: tuple[str, ...] = ()
    action: str | None = None


@dataclass(frozen=True)
class Addition:
    """Entries that are new in another library: nothing that was there before changes.

    Attributes:
        place: The registry or namespace.
        names: The entries; a ``*`` stands for any ending.
        when: What adds them.
    """

    place: str
    names: tuple[str, ...]
    when: str


MMENGINE = 'mmengine 0.10: onedl-mmengine 0.10.12 and mmengine 0.10.7'

PATCHES = (
    Patch(
        'sync-bn-torch',
        ('torch.nn.SyncBatchNorm.convert_sync_batchnorm',),
        ON_IMPORT,
        why=(
            'The conversion takes every norm of this package for a BatchNorm and would replace it by a SyncBatchNorm '
            'without a word: the model would train as another one. It becomes a RuntimeError that names the layer and '
            'the `norm_cfg` to use instead. A SyncUBN stays as it is.'
        ),
        others='Nothing: the original runs, after one look at the types of the modules.',
        versions='torch 2, tested with 2.12.0',
        switch_off='The conversion then replaces every norm of this package silently, SyncUBN too.',
        replacement='mmubn.openmmlab.sync_guards:guard_torch',
    ),
    Patch(
        'sync-bn-mmengine',
        ('mmengine.model.utils.convert_sync_batchnorm',),
        ON_IMPORT,
        why="The same for the function that a Runner calls for `sync_bn='torch'` and `sync_bn='mmcv'`.",
        others='Nothing: the original runs, after one look at the types of the modules.',
        versions=MMENGINE,
        switch_off='A config with `sync_bn` then trains with another norm than it says.',
        replacement='mmubn.openmmlab.sync_guards:guard_mmengine',
        importers=(
            'mmengine.model.convert_sync_batchnorm',
            'mmengine.runner.runner.convert_sync_batchnorm',
            'mmengine._strategy.distributed.convert_sync_batchnorm',
        ),
    ),
    Patch(
        'replaced-norms',
        (
            'torch.nn.modules.module._global_module_registration_hooks',
            'torch.nn.modules.module._global_buffer_registration_hooks',
            'torch.nn.modules.module._global_parameter_registration_hooks',
        ),
        ON_IMPORT,
        why=(
            "Converters of other libraries (timm's `convert_sync_batchnorm`, detectron2's frozen norms, "
            '`torch.utils.mkldnn.to_mkldnn`, loops over `isinstance(m, nn.BatchNorm2d)`) put a norm of their own in '
            'the place of ours, made from its eps and tensors: the model would train or evaluate as another one. '
            "Torch's registration hooks tell of it, and it becomes a RuntimeError; a SyncUBN that is to become a "
            'SyncBatchNorm stays as it is. And the eps of ours becomes a plain number in the module that is given it.'
        ),
        others='Nothing: the hooks look at the type of the module that was in the place before, and at eps.',
        versions='torch 2, tested with 2.12.0',
        switch_off='Such converters then replace every norm of this package silently, SyncUBN too.',
        action='mmubn.layers.replacement:watch_replacements',
    ),
    Patch(
        'released-names',
        ('torch.nn.modules.module._global_module_registration_hooks',),
        ON_IMPORT,
        why=(
            "The networks of BNET's authors have the layer `bnet3` where others have `bn3`, and a layer is given the "
            "entries under its own name alone. Torch's registration hook tells of each norm of this package that gets "
            'such a name, and the module that it is in renames the entries when it loads a state dict.'
        ),
        others='Nothing: the hook looks at the type of the module that is set.',
        versions='torch 2, tested with 2.12.0',
        switch_off=(
            'Files of the authors are then not read, but into what `convert_norms` has converted; '
            '`mmubn.convert_state_dict(model, state_dict)` renames too.'
        ),
        action='mmubn.layers.released_names:watch_names',
    ),
    Patch(
        'plain-eps',
        ('torch.serialization.get_safe_globals()',),
        ON_IMPORT,
        why=(
            'The eps of a norm of this package is a float that refuses to be folded (`mmubn.layers.unfoldable_eps`). '
            'In a file that `torch.save` or `yaml.safe_dump` writes it is to be a plain number: the reader of '
            '`torch.load(weights_only=True)` is told that `float` is safe, and yaml how to write this type.'
        ),
        others='Nothing: no file of others names `float`, and the type is ours.',
        versions='torch 2.4 and newer, tested with 2.12.0; PyYAML 6',
        switch_off='`yaml.safe_dump(norm.eps)` and reading a saved eps fail; write `float(norm.eps)`.',
        action='mmubn.openmmlab.plain_eps:write_as_float',
    ),
    Patch(
        'timm-norm-act',
        ('timm.layers.create_norm_act.get_norm_act_layer',),
        ON_IMPORT,
        why=(
            'EfficientNet, RegNet, DenseNet and others of timm make a norm and its activation in one layer, and ask '
            "this function for its type. It knows timm's own types alone. What it cannot look into, such as the "
            "function that MMPretrain's TIMMBackbone makes of `norm_layer='UBN'`, never hears of the activation: a "
            'DenseNet would be built without any, and without a word. A norm of this package then has the activation '
            'as its child. timm is not imported for it: until somebody imports it, a finder waits in `sys.meta_path`.'
        ),
        others='Nothing: for any other norm the original runs.',
        versions='timm 0.9 and newer, tested with 0.9.16, 1.0.9, 1.0.16 and 1.0.31',
        switch_off="Networks that timm's function makes norms for end in its `No equivalent norm_act layer for ubn`.",
        importers=('timm.*.get_norm_act_layer',),
        action='mmubn.openmmlab.timm_norms:keep_activations',
    ),
    Patch(
        'own-configs',
        ('mmengine.config.Config._get_cfg_path',),
        ON_IMPORT,
        why=(
            "MMEngine notes at the values of `_base_ = 'PACKAGE::PATH'` to look their types up in the registries of "
            'that package. This one has none: what a config takes from `mmubn::PATH` would be built with warnings, or '
            'not at all. And a path that does not exist is an error that names those that are like it.'
        ),
        others='Nothing: for a config of any other package the original runs.',
        versions=MMENGINE,
        switch_off="In place of `_base_ = 'mmubn::PATH'` name the file; `python -m mmubn` prints its folder.",
        replacement='mmubn.openmmlab.own_configs:read_without_scope',
    ),
    Patch(
        'own-config-names',
        ('mmengine.config.utils._get_package_and_cfg_path',),
        ON_IMPORT,
        why=(
            '`get_config` and `get_model` of mmengine.hub say of `mmubn::PATH` with a wrong path that a function of '
            'theirs "is used for get external package", or that a file does not exist. It then is an error that names '
            'the configs that are like it, as for `_base_`.'
        ),
        others='Nothing: for a config of any other package the original runs.',
        versions=MMENGINE,
        switch_off="A wrong path is then an error in MMEngine's words.",
        replacement='mmubn.openmmlab.own_configs:read_by_name',
        importers=(
            'mmengine.config.config._get_package_and_cfg_path',
            'mmengine.hub.hub._get_package_and_cfg_path',
        ),
    ),
    Patch(
        'replaced-parameters',
        ('torch.optim.optimizer._global_optimizer_pre_hooks',),
        ON_CONVERSION,
        why=(
            'An optimizer that was built before `convert_norms` has the parameters of the old norms, and none of the '
            "new ones: they would stay as they are, without a word. Torch's hook tells of the first step of each "
            'optimizer, and it becomes a RuntimeError that names the parameter.'
        ),
        others='Nothing: each optimizer is looked through once after a conversion.',
        versions='torch 2, tested with 2.12.0',
        switch_off='It is not left out by MMUBN_SKIP_PATCHES. Without a call of `convert_norms` there is no hook.',
        action='mmubn.convert:watch_optimizers',
    ),
    Patch(
        'config-packages',
        ('mmengine.config.utils._get_package_and_cfg_path',),
        ON_INSTALL,
        why=(
            'A config `mmseg::PATH` is one of the package mmsegmentation for MMEngine. It does not see '
            'onedl-mmsegmentation, which has the same modules: as `_base_` it is "not installed", and `get_config` '
            'runs `pip install mmsegmentation`, over the files that are there. A package whose module is there is then '
            'found by it, and one that is not is an error.'
        ),
        others='The same for configs of any package. One that MMEngine finds by itself is read as ever.',
        versions=MMENGINE,
        switch_off='Use stock mmsegmentation, or the path of the config in place of `mmseg::PATH`.',
        replacement='mmubn.openmmlab.config_packages:find_by_module',
        importers=(
            'mmengine.config.config._get_package_and_cfg_path',
            'mmengine.hub.hub._get_package_and_cfg_path',
        ),
    ),
    Patch(
        'layout-report',
        ('mmengine.runner.checkpoint.load_state_dict',),
        ON_INSTALL,
        why=(
            'A layer reads several layouts of checkpoints. The log then says which, once per load: '
            '"mmubn: 53 UBN layers read: 53 from BatchNorm".'
        ),
        others='Nothing: the line is of norms of this package alone.',
        versions=MMENGINE,
        switch_off='The log does not have the line, but for loads by `init_cfg` with strict-pretrained.',
        replacement='mmubn.openmmlab.loading:log_layouts',
    ),
    Patch(
        'model-key',
        ('mmengine.runner.checkpoint.CheckpointLoader.load_checkpoint',),
        ON_INSTALL,
        why=(
            "torchvision's training scripts write `{'model': state_dict, ...}`. MMEngine looks for the key "
            '`state_dict` alone, finds no key of the model in such a file, and trains on from random weights with a '
            'warning. The state dict is then found under both keys.'
        ),
        others='It reads such checkpoints for any model. A checkpoint that has a `state_dict` is read as ever.',
        versions=MMENGINE,
        switch_off='`load_from` needs a file with the key `state_dict`; `init_cfg` with strict-pretrained reads both.',
        replacement='mmubn.openmmlab.loading:unwrap_model_key',
    ),
    Patch(
        'safe-globals',
        ('torch.serialization.get_safe_globals()',),
        ON_INSTALL,
        why=(
            '`torch.load(weights_only=True)`, the default since torch 2.6, refuses the log history in the checkpoints '
            "of MMEngine, and the `argparse.Namespace` in those of torchvision's training scripts. Added are "
            'HistoryBuffer, a `getattr` for four methods of it and nothing else, what builds NumPy arrays of six '
            'dtypes, under its names of NumPy 1 and 2, and Namespace. Stock MMEngine 0.10.7 cannot resume without; '
            'onedl-mmengine has a list of its own '
            'for its own loads.'
        ),
        others='The same checkpoints load, of any model, in all of the process. No code of a file can run by it.',
        versions=f'torch 2.6 and newer, tested with 2.12.0; {MMENGINE}',
        switch_off='Use onedl-mmengine, or `torch.load(weights_only=False)` for files that you trust.',
        action='mmubn.openmmlab.loading:accept_checkpoints',
    ),
    Patch(
        'flop-counter-mmengine',
        ('mmengine.analysis.jit_analysis._get_scoped_trace_graph',),
        ON_INSTALL,
        why=(
            "MMEngine's counter knows torch's operators alone and cannot count the norms of this package. It then "
            'traces operators of the same cost in their place; mmubn/openmmlab/counters.py has the formula.'
        ),
        others='Nothing: a model without such a norm is traced as it is.',
        versions=MMENGINE,
        switch_off='`get_model_complexity_info` counts what it finds in the norms: other numbers.',
        replacement='mmubn.openmmlab.counters:count_in_mmengine',
    ),
    Patch(
        'flop-counter-mmcv',
        ('mmcv.cnn.utils.flops_counter.get_modules_mapping',),
        ON_INSTALL,
        why="mmcv's counter counts layers whose very type is in this table, and takes any other to cost nothing.",
        others='Nothing: the table has the same entries for all other types.',
        versions='mmcv 2: onedl-mmcv 2.3.6 and mmcv 2.1.0',
        switch_off='`get_model_complexity_info` counts the norms of this package as 0.',
        replacement='mmubn.openmmlab.counters:count_in_mmcv',
    ),
    Patch(
        'strict-pretrained',
        ("mmengine.registry.WEIGHT_INITIALIZERS['Pretrained']",),
        ON_PRETRAINED,
        why=(
            "`init_cfg=dict(type='Pretrained', strict=True)`: a checkpoint that does not fit is an error, where "
            'MMEngine warns and trains on from random weights. It needs this very name: MMEngine runs an initializer '
            'of any other name first, and others then overwrite what it loaded.'
        ),
        others=(
            "Without `strict=True` the class loads as MMEngine's does. For any model it reads a state dict under the "
            'key `model` too, and takes `strict=True`.'
        ),
        versions=MMENGINE,
        switch_off='Do not import the module. A config with `strict=True` then ends in a TypeError.',
        action='mmubn.openmmlab.pretrained:register',
    ),
    Patch(
        SAFE_READER,
        ('torch.serialization.load',),
        ON_TOOLS,
        why=(
            'A checkpoint is a pickle, which can run any program. onedl-mmengine reads by a list of what is safe, with '
            'all of `getattr` on it, and where a file holds more, it reads everything. In the process of a tool every '
            "`torch.load` reads by torch's list and one of this package alone, whatever its caller asks for. All else "
            'is an error that names what the file holds ([checkpoints](checkpoints.md#what-a-tool-reads)).'
        ),
        others='The same for every file that the process reads by `torch.load`. Other processes keep their reader.',
        versions=f'torch 2, tested with 2.12.0; {MMENGINE}',
        switch_off=(
            '`--trust-checkpoint`, an option of the tools that read checkpoints: every `torch.load` of the process '
            'then reads everything. It is not left out by MMUBN_SKIP_PATCHES.'
        ),
        replacement='mmubn.openmmlab.safe_reader:read_by_list',
        importers=('torch.load',),
    ),
    Patch(
        'url-errors',
        ('mmengine.runner.checkpoint.load_url',),
        ON_TOOLS,
        why=(
            'Of several processes the first one reads a checkpoint at a URL, and the others wait at a barrier until it '
            'has. Where it raises an error, as for a file that is refused, they would wait for a process that has '
            'ended. It then comes to the barrier too, and each of them raises the error.'
        ),
        others='The same for a checkpoint of any model.',
        versions=MMENGINE,
        switch_off='The other processes end with their launcher, or when the process group times out.',
        replacement='mmubn.openmmlab.safe_reader:raise_everywhere',
    ),
    Patch(
        'bfloat16-operators',
        (
            'mmcv.ops.nms.NMSop.forward',
            'mmcv.ops.nms.SoftNMSop.forward',
            'mmcv.ops.roi_align.RoIAlignFunction.forward',
            'mmcv.ops.roi_align.RoIAlignFunction.backward',
        ),
        ON_CPU_AMP,
        why=(
            "mmcv's NMS and RoIAlign have CPU kernels for float32 and float64 alone, and raise on the bfloat16 that "
            'autocast gives them. Their inputs are widened, and a floating output gets the dtype that came in.'
        ),
        others='The same for any model in the process. Calls without bfloat16 are left as they are.',
        versions='mmcv 2, written for onedl-mmcv 2.3.6',
        switch_off='Detectors then train without `--amp` on a CPU.',
        replacement='mmubn.openmmlab.mixed_precision:widen_bfloat16',
    ),
    Patch(
        'atomic-local-files',
        (
            "mmengine.fileio.backends.registry_utils.backends['local']",
            "mmengine.fileio.backends.registry_utils.prefix_to_backends['']",
        ),
        ON_ATOMIC_CHECKPOINTS,
        why=(
            'MMEngine truncates a file and then writes it: a run that is killed in between leaves half a checkpoint, '
            'which it cannot resume from. Local files are then written beside the old one and renamed.'
        ),
        others='All that `mmengine.fileio` writes to local files of the process is written so, with the same contents.',
        versions=MMENGINE,
        switch_off='Files are written in place; the hook still removes the outdated checkpoint last.',
        action='mmubn.openmmlab.hooks.checkpoint:register_atomic_backend',
    ),
    Patch(
        'plot-style',
        (
            "matplotlib.rcParams['axes.grid']",
            "matplotlib.rcParams['backend']",
            "matplotlib.rcParams['figure.constrained_layout.use']",
            "matplotlib.rcParams['grid.alpha']",
            "matplotlib.rcParams['hatch.linewidth']",
            "matplotlib.rcParams['svg.fonttype']",
            "matplotlib.rcParams['svg.hashsalt']",
        ),
        ON_PLOTS,
        why='The tools that draw, each a process of its own, share a style, write files without a display, and write '
        'the same file from the same data.',
        others='Other figures of the same process have the style too. No training run imports these modules.',
        versions='matplotlib 3',
        switch_off=(
            'Do not import `mmubn.analysis` in a process that draws figures of its own: its modules set the style '
            'themselves, whatever the environment variable says.'
        ),
    ),
)

ADDITIONS = (
    Addition(
        'mmengine.registry.MODELS', ('UBN', 'SyncUBN', 'RBN', 'BNET', 'IEBN', 'UnitizedBN', 'ConvertNorms'), ON_IMPORT
    ),
    Addition(
        'mmengine.registry.HOOKS', ('CovariateShiftHook', 'FeatureCondensationHook', 'PaddingAwareHook'), ON_IMPORT
    ),
    Addition('mmengine.config.utils.MODULE2PACKAGE', ('mmubn',), ON_IMPORT),
    Addition('yaml.representer.SafeRepresenter.yaml_representers', ('UnfoldableEps',), ON_IMPORT),
    Addition('torch.ops', ('mmubn::is_recomputation',), ON_IMPORT),
    Addition('torch.ops', ('mmubn::*',), f'{ON_IMPORT}, where Triton is installed'),
    Addition(
        'mmpretrain.registry.MODELS',
        ('InceptionV4', 'InceptionV4_CIFAR', 'ResNeXt_CIFAR'),
        'import mmubn.openmmlab.models',
    ),
    Addition(
        'mmengine.registry.HOOKS', ('AtomicCheckpointHook', 'IterationSeedHook'), 'import mmubn.openmmlab.resumption'
    ),
    Addition('mmengine.registry.OPTIM_WRAPPERS', ('CPUAmpOptimWrapper',), 'import mmubn.openmmlab.mixed_precision'),
)

_applied: set[str] = set()  # names


def apply(when: str) -> None:
    """Apply the rows of the table that belong to ``when``, once per process.

    Left out are those that MMUBN_SKIP_PATCHES names and those of libraries that are not installed.

    Raises:
        ValueError: MMUBN_SKIP_PATCHES names no row of the table.
        RuntimeError: A library does not have what is to be changed.
    """
    _apply(patch for patch in PATCHES if patch.when == when)


def install(*names: str) -> None:
    """Apply the optional rows of the table: those of these names, or all.

    Those that MMUBN_SKIP_PATCHES names are left out all the same.

    Raises:
        ValueError: A name is none of an optional row.
        RuntimeError: A library does not have what is to be changed.
    """
    optional = {patch.name: patch for patch in PATCHES if patch.when == ON_INSTALL}
    if unknown := sorted(set(names) - set(optional)):
        raise ValueError(f'install: expected names of optional patches ({", ".join(optional)}), got {unknown}.')
    _apply(optional[name] for name in names or optional)


def _apply(chosen: Iterable[Patch]) -> None:
    skipped = _skipped()
    for patch in chosen:
        library = patch.symbols[0].partition('.')[0]
        if patch.name in _applied or patch.name in skipped:
            continue
        if sys.modules.get(library) is None and util.find_spec(library) is None:  # a stand-in of a test has no spec
            continue
        if patch.replacement is not None:
            _replace(patch)
        elif patch.action is not None:
            pkgutil.resolve_name(patch.action)()
        _applied.add(patch.name)


def _skipped() -> set[str]:
    """The names in MMUBN_SKIP_PATCHES, checked."""
    names = set(filter(None, re.split(r'[,\s]+', os.environ.get(SKIP, ''))))
    known = [patch.name for patch in PATCHES if patch.name != SAFE_READER]
    if 'all' in names:
        return set(known)
    if unknown := sorted(names - set(known)):
        raise ValueError(f'{SKIP}: expected names of patches ({", ".join(known)}) or all, got {unknown}.')
    return names


def _replace(patch: Patch) -> None:
    """Set every symbol of ``patch``, and its copies in modules that imported it, to the replacement."""
    replacement = pkgutil.resolve_name(patch.replacement)
    for symbol in patch.symbols:
        owner, name = owner_of(symbol)
        if name not in vars(owner):
            raise RuntimeError(
                f'mmubn cannot apply {patch.name}: there is no {symbol} (written for {patch.versions}). '
                f'{SKIP}={patch.name} leaves it out: {patch.switch_off}'
            )
        original = vars(owner)[name]  # of a class, not by getattr: a classmethod stays one
        new = replacement(original)
        setattr(owner, name, new)
        for importer in patch.importers:
            module, _, copy = importer.rpartition('.')
            if vars(sys.modules.get(module, object)).get(copy) is original:
                setattr(sys.modules[module], copy, new)


def owner_of(symbol: str) -> tuple[Any, str]:
    """The module or class that has a symbol, imported, and its name there."""
    path, _, name = symbol.rpartition('.')
    return pkgutil.resolve_name(path), name
