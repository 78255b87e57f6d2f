"""Configs written before 0.1.0 import modules by names that are no longer theirs."""

import subprocess
import sys

import pytest

OLD = {
    'mmubn.models': [
        ('mmpretrain.registry.MODELS', name) for name in ('InceptionV4', 'InceptionV4_CIFAR', 'ResNeXt_CIFAR')
    ],
    'mmubn.pretrained': [('mmengine.registry.WEIGHT_INITIALIZERS', 'Pretrained')],
    'mmubn.faults': [('mmengine.registry.HOOKS', name) for name in ('AtomicCheckpointHook', 'IterationSeedHook')],
}


@pytest.mark.parametrize(('name', 'registered'), OLD.items(), ids=OLD)
def test_an_old_config_still_works(tmp_path, name, registered):
    path = tmp_path / 'config.py'
    path.write_text(f"custom_imports = dict(imports=['mmubn', {name!r}], allow_failed_imports=False)\n")
    code = f"""
import pkgutil
from mmengine.config import Config
Config.fromfile({str(path)!r})
for place, name in {registered!r}:
    print(pkgutil.resolve_name(place).get(name).__module__)
"""
    result = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = result.stdout.splitlines()[-len(registered) :]
    assert len(found) == len(registered)
    assert all(module.startswith('mmubn.openmmlab.') for module in found)
