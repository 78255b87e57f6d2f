"""How the tools read checkpoints: nothing in a file runs, what is refused is named, real checkpoints are read."""

import argparse
import collections
import copy
import io
import multiprocessing
import os
import pickle
import subprocess
import sys
import tarfile
import textwrap
import time
from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import hostile
import mmengine.optim
import numpy as np
import pytest
import torch
from hostile import FORMS, NAMES, PAYLOADS, Call
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.runner import CheckpointLoader, checkpoint
from torch import nn

from mmubn import UBN
from mmubn.openmmlab import safe_reader
from mmubn.openmmlab.errors import UnreadCheckpointError
from mmubn.openmmlab.safe_reader import use_safe_reader

ONEDL = pytest.mark.skipif(not hasattr(checkpoint, 'get_torch_safe_globals'), reason='of onedl-mmengine')
TRUST = 'if you trust where it comes from, add --trust-checkpoint.'


def by_torch(path):
    return torch.load(path)


def by_torch_with_everything(path):
    """What a caller asks for does not count."""
    with torch.serialization.safe_globals([getattr, os.system, np.ndarray, HistoryBuffer]):
        return torch.load(path, map_location='cpu', pickle_module=pickle, weights_only=False)


def by_mmengine(path):
    return CheckpointLoader.load_checkpoint(str(path), map_location='cpu')


def by_mmengine_from_memory(path):
    """As from stores."""
    backend = SimpleNamespace(get=lambda name: path.read_bytes())
    with mock.patch.object(checkpoint, 'get_file_backend', return_value=backend):
        return checkpoint.load_from_ceph('s3://checkpoint')


READERS = [by_torch, by_torch_with_everything, by_mmengine, by_mmengine_from_memory]


# --- hostile files ----------------------------------------------------------------------------------------------------


@pytest.fixture
def marker(tmp_path):
    """The folder that the programs in hostile files make."""
    return tmp_path / 'program-ran'


def wait_for(marker):
    """For what a program started without waiting for it."""
    for _ in range(500):
        if marker.exists():
            return True
        time.sleep(0.01)
    return False


class TestHostileFiles:
    @pytest.mark.parametrize('reader', READERS)
    @pytest.mark.parametrize('form', FORMS)
    @pytest.mark.parametrize('payload', PAYLOADS)
    def test_are_refused_and_named(self, tmp_path, marker, payload, form, reader):
        path = tmp_path / 'hostile.pth'
        path.write_bytes(FORMS[form](PAYLOADS[payload](marker)))
        use_safe_reader(trust=False)
        with pytest.raises(UnreadCheckpointError) as refused:
            reader(path)
        name = path if reader is not by_mmengine_from_memory else 'a checkpoint'
        holds = NAMES[payload]
        assert str(refused.value) == f'{name} holds {holds}, which could run a program, so it is not read; {TRUST}'
        assert not marker.exists()

    @pytest.mark.parametrize('form', FORMS)
    @pytest.mark.parametrize('payload', PAYLOADS)
    def test_run_where_they_are_trusted(self, tmp_path, marker, payload, form):
        """So what is tested above is hostile. A pickle by itself is no checkpoint, but what is in it runs first."""
        path = tmp_path / 'hostile.pth'
        path.write_bytes(FORMS[form](PAYLOADS[payload](marker)))
        use_safe_reader(trust=True)
        outcome = pytest.raises(UnreadCheckpointError, match='cannot be read: ') if form == 'bare' else nullcontext()
        with outcome:
            by_mmengine(path)
        assert wait_for(marker)

    @ONEDL
    @pytest.mark.parametrize('payload', PAYLOADS)
    def test_a_program_of_a_file_runs_by_default(self, tmp_path, marker, payload):
        """onedl-mmengine's own reader runs each of them; ``import mmubn``, done here, changes nothing in that."""
        path = tmp_path / 'hostile.pth'
        path.write_bytes(hostile.archive(PAYLOADS[payload](marker)))
        by_mmengine(path)
        assert wait_for(marker)

    @ONEDL
    def test_the_list_of_onedl_mmengine_lets_a_program_run(self, tmp_path, marker):
        """Without its second look, at everything: why the reader of the tools cannot have that list."""
        path = tmp_path / 'hostile.pth'
        path.write_bytes(hostile.archive(hostile.instance_attribute(marker)))
        own = checkpoint.get_torch_safe_globals()
        # Alone: torch keeps one entry for a name, any of them, and `import mmubn` adds a getattr of its own.
        with mock.patch.object(safe_reader, '_LIST', own), safe_reader._list_alone():
            torch.load(path, weights_only=True)
        assert marker.exists()

    @pytest.mark.parametrize('place', ['message_hub', 'meta', 'optimizer', 'ema_state_dict', 'state_dict'])
    def test_wherever_the_program_is(self, tmp_path, marker, place):
        tensors = nn.Linear(2, 2).state_dict()
        program = Call(os.mkdir, str(marker))
        content = {
            'meta': {'epoch': 1, 'more': [program] if place == 'meta' else []},
            'state_dict': tensors | ({'layer.weight': program} if place == 'state_dict' else {}),
            'ema_state_dict': tensors | ({'steps': program} if place == 'ema_state_dict' else {}),
            'optimizer': {'state': {0: {'step': program if place == 'optimizer' else 1}}},
            'message_hub': {'runtime_info': {'x': program if place == 'message_hub' else 1}},
        }
        for is_zip in (True, False):
            path = tmp_path / f'{is_zip}.pth'
            torch.save(content, path, _use_new_zipfile_serialization=is_zip)
            use_safe_reader(trust=False)
            with pytest.raises(UnreadCheckpointError, match=r'holds posix\.mkdir, which could run a program'):
                by_mmengine(path)
            assert not marker.exists()
            use_safe_reader(trust=True)
            assert by_mmengine(path)['meta']['epoch'] == 1
            marker.rmdir()

    @pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
    def test_in_every_protocol(self, tmp_path, marker, protocol):
        path = tmp_path / 'hostile.pth'
        for form in FORMS.values():
            path.write_bytes(form({'x': ['posix', 'system', Call(os.mkdir, str(marker))]}, protocol))
            use_safe_reader(trust=False)
            with pytest.raises(UnreadCheckpointError, match=r'holds posix\.mkdir, which could run a program'):
                by_torch(path)
            assert not marker.exists()
            use_safe_reader(trust=True)
            with pytest.raises(UnreadCheckpointError) if form is hostile.pickled else nullcontext():
                by_torch(path)
            marker.rmdir()

    def test_what_entries_of_the_list_are_not_for(self, tmp_path):
        """Nothing but what builds arrays of numbers and the objects of real checkpoints: no object of any bytes."""
        zeros = bytearray(8)
        attempts = {
            'numpy.ndarray()': Call(np.ndarray, (1,), 'O', zeros),
            "numpy.dtype('O')": Call(np.dtype, 'O'),
            "numpy.dtype('V8')": Call(np.dtype, 'V8'),
            'numpy.dtype()': Call(np.dtype, [('x', 'f8')]),
            'mmengine.logging.history_buffer.HistoryBuffer()': Call(HistoryBuffer, [1.0], [1.0]),
            'argparse.Namespace()': Call(argparse.Namespace),
            "builtins.getattr of 'register_statistics'": Call(getattr, HistoryBuffer, 'register_statistics'),
            "builtins.getattr of 'mro'": Call(getattr, argparse.Namespace, 'mro'),
            'numpy.dtypes.Float64DType': Call(type(np.dtype('f8'))),
        }
        for holds, attempt in attempts.items():
            path = tmp_path / 'attempt.pth'
            path.write_bytes(hostile.archive({'x': attempt}))
            use_safe_reader(trust=False)
            with pytest.raises(UnreadCheckpointError) as refused:
                by_mmengine(path)
            assert f' holds {holds}, which could' in str(refused.value)
            use_safe_reader(trust=True)
            by_mmengine(path)  # it is pickled right
        # NumPy itself refuses this one.
        path.write_bytes(hostile.archive(Call(np._core.multiarray._reconstruct, HistoryBuffer, (0,), b'b')))
        use_safe_reader(trust=False)
        with pytest.raises(UnreadCheckpointError, match=r'holds numpy\.core\.multiarray\._reconstruct\(\), which'):
            by_mmengine(path)

    @pytest.mark.parametrize(
        'state',
        [
            (3, '>', None, None, None, -1, -1, 0),
            (3, '<', None, ('a',), {'a': (np.dtype('f8'), 800000)}, 8, 1, 63),  # NumPy would read far from the array
            (3, '<', None, None, None, -1, -1, 63),  # and would take its numbers for objects
        ],
    )
    def test_of_the_state_of_a_dtype_the_order_of_bytes_alone_counts(self, tmp_path, state):
        class Type:
            def __reduce__(self):
                return np.dtype, ('f8', False, False), state

        class Array:
            def __reduce__(self):
                values = np.arange(2.0).astype(f'{state[1]}f8').tobytes()
                return np._core.multiarray._reconstruct, (np.ndarray, (0,), b'b'), (1, (2,), Type(), False, values)

        path = tmp_path / 'dtype.pth'
        path.write_bytes(hostile.archive({'x': [Array()]}))
        use_safe_reader(trust=False)
        (read,) = by_mmengine(path)['x']
        assert type(read) is np.ndarray
        assert read.dtype is not np.dtype('f8')
        assert (read.dtype, read.dtype.flags, read.dtype.names) == (np.dtype('f8'), 0, None)
        assert read.tolist() == [0, 1]
        assert np.dtype('f8').byteorder == '=', 'NumPy has one for all'

    def test_what_a_file_says_cannot_command_a_terminal(self, tmp_path):
        path = tmp_path / 'hostile.pth'
        path.write_bytes(hostile.archive(b'\x80\x02cos\x1b[2J\nsystem\n.'))
        use_safe_reader(trust=False)
        with pytest.raises(UnreadCheckpointError, match=r'holds os\?\[2J\.system, which'):
            by_mmengine(path)


# --- what is no checkpoint --------------------------------------------------------------------------------------------


def in_tar(path, inner):
    with tarfile.open(path, 'w') as file:
        file.add(inner, 'pickle')


class TestOtherFiles:
    @pytest.mark.parametrize('trust', [False, True])
    @pytest.mark.parametrize('content', [b'', b'abc', b'no checkpoint', b'<html>\n<body>not found', b'PK\x03\x04zip?'])
    def test_that_are_none(self, tmp_path, content, trust):
        path = tmp_path / 'file.pth'
        path.write_bytes(content)
        use_safe_reader(trust)
        for reader in READERS[:3]:
            with pytest.raises(UnreadCheckpointError) as error:
                reader(path)
            what = 'cannot be read' if trust else 'is no checkpoint, or only a part of one'
            what = f'{what}: ' if content else 'is no checkpoint: the file is empty; copy or save it again'
            assert str(error.value).startswith(f'{path} {what}')
            assert '\n' not in str(error.value)
            assert '--trust-checkpoint' not in str(error.value)

    @pytest.mark.parametrize('is_zip', [True, False])
    def test_that_are_cut_off(self, tmp_path, is_zip):
        file = io.BytesIO()
        torch.save({'state_dict': nn.Linear(40, 40).state_dict()}, file, _use_new_zipfile_serialization=is_zip)
        content, path = file.getvalue(), tmp_path / 'part.pth'
        use_safe_reader(trust=False)
        for length in range(1, len(content), 97):
            path.write_bytes(content[:length])
            with pytest.raises(UnreadCheckpointError, match=r'is no checkpoint, or only a part of one: .*\.$'):
                by_mmengine(path)

    def test_torch_script(self, tmp_path):
        """torch before 2.6 runs it, whatever it is asked for."""
        path = tmp_path / 'script.pth'
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
        use_safe_reader(trust=False)
        for f in (path, io.BytesIO(path.read_bytes())):
            with pytest.raises(UnreadCheckpointError, match=r' is a TorchScript program and no checkpoint\.$'):
                torch.load(f)

    def test_tar(self, tmp_path):
        """torch before 2.6 unpacks it, whatever it is asked for."""
        (tmp_path / 'pickle').write_bytes(hostile.pickled({'x': 1}))
        in_tar(tmp_path / 'tar.pth', tmp_path / 'pickle')
        use_safe_reader(trust=False)
        with pytest.raises(UnreadCheckpointError, match=f'tar.pth is in an old tar format of torch, .* {TRUST}$'):
            by_mmengine(tmp_path / 'tar.pth')

    def test_that_cannot_be_opened(self, tmp_path):
        use_safe_reader(trust=False)
        with pytest.raises(FileNotFoundError):
            torch.load(tmp_path / 'none.pth')
        with pytest.raises(UnreadCheckpointError, match=f'{tmp_path} cannot be read: Is a directory'):
            torch.load(tmp_path)

    @pytest.mark.parametrize('protocol', [0, 1, 4, 5])
    def test_protocols_that_the_reader_of_torch_does_not_know(self, tmp_path, protocol):
        path, content = tmp_path / 'file.pth', {'x': [1.5, 'text', None, True, 2]}
        name = protocol if protocol > 1 else '0 or 1'
        for form in (hostile.archive, hostile.old):
            path.write_bytes(form(content, protocol))
            use_safe_reader(trust=False)
            with pytest.raises(UnreadCheckpointError, match=f'is a pickle of protocol {name}, which .*; {TRUST}'):
                by_mmengine(path)
            use_safe_reader(trust=True)
            assert by_mmengine(path) == content

    def test_a_torch_whose_reader_knows_little(self, tmp_path, monkeypatch):
        """torch 2.4 restores no object, and whatever its reader does not know is a RuntimeError."""
        torch.save({'x': HistoryBuffer()}, tmp_path / 'file.pth')
        error = RuntimeError('Trying to instantiate unsupported class HistoryBuffer')
        for version, sentence in {
            (2, 4): f'is no checkpoint that is safe to read: {error}; {TRUST}',
            (2, 5): f'is no checkpoint, or only a part of one: {error}.',
        }.items():
            monkeypatch.setattr(safe_reader, '_TORCH', version)
            assert safe_reader._sentence(tmp_path / 'file.pth', 0, error) == f'{tmp_path}/file.pth {sentence}'

    def test_the_error_of_torch_is_its_cause(self, tmp_path):
        (tmp_path / 'file.pth').write_bytes(b'abc')
        use_safe_reader(trust=False)
        with pytest.raises(UnreadCheckpointError) as error:
            torch.load(tmp_path / 'file.pth')
        assert isinstance(error.value.__cause__, IndexError)


# --- real checkpoints -------------------------------------------------------------------------------------------------


def read_both(content, tmp_path, **how):
    """What the reader makes of ``content``, in both formats of torch."""
    use_safe_reader(trust=False)
    for is_zip in (True, False):
        torch.save(content, tmp_path / 'real.pth', _use_new_zipfile_serialization=is_zip, **how)
        for reader in READERS:
            yield reader(tmp_path / 'real.pth')


def trained_model():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model(torch.randn(2, 3, 5, 5)).sum().backward()
    return model


class TestRealCheckpoints:
    @pytest.mark.parametrize('protocol', [2, 3])
    def test_state_dict(self, tmp_path, protocol):
        state_dict = trained_model().state_dict()
        for read in read_both(state_dict, tmp_path, pickle_protocol=protocol):
            assert list(read) == list(state_dict)
            assert all(torch.equal(read[key], value) for key, value in state_dict.items())
            assert read._metadata == state_dict._metadata  # versions of layers

    def test_tensors_of_every_dtype_and_kind(self, tmp_path):
        dtypes = (torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64, torch.complex64)
        base = torch.arange(6.0)
        content = {str(dtype): torch.ones(3).to(dtype) for dtype in dtypes}
        content |= {'view': base[2:4], 'base': base, 'parameter': nn.Parameter(base), 'empty': torch.empty(0, 3)}
        for read in read_both(content, tmp_path):
            assert read.keys() == content.keys()
            assert all(torch.equal(read[key], value) for key, value in content.items())
            assert read['view'].data_ptr() == read['base'][2:].data_ptr()

    def test_message_hub(self, tmp_path):
        hub = MessageHub.get_instance('test_safe_reader')
        hub.update_scalar('loss', 1.5)
        hub.update_scalar('loss', 2.5)
        hub.update_scalar('accuracy', np.float32(0.5))
        hub.update_info('ids', np.arange(3))
        for read in read_both({'message_hub': hub.state_dict(), 'instance': hub}, tmp_path):
            for loaded in (read['message_hub']['log_scalars'], read['instance']._log_scalars):
                loss = loaded['loss']
                assert type(loss) is HistoryBuffer
                assert type(loss._log_history) is np.ndarray
                assert (loss.mean(), loss.current(), loss.statistics('max')) == (2, 2.5, 2.5)
                loss.update(4.0)
                assert loss.min() == 1.5
            assert type(read['instance']) is MessageHub
            other = MessageHub.get_instance('test_safe_reader_other')
            other.load_state_dict(read['message_hub'])
            assert other.get_info('ids').tolist() == [0, 1, 2]
            assert pickle.loads(pickle.dumps(read['message_hub'])).keys() == read['message_hub'].keys()

    def test_arrays_and_numbers_of_numpy(self, tmp_path):
        codes = ['?', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'f2', 'f4', 'f8', '>f4', '>i8']
        content = {code: np.arange(6).reshape(2, 3).astype(code) for code in codes}
        content |= {f'number {code}': np.dtype(code).type(1) for code in codes}
        content |= {'transposed': np.arange(6.0).reshape(2, 3).T, 'empty': np.zeros((0, 2)), 'zero': np.array(1.5)}
        nested = {'nested': (1, [content['f8']], {'x': content['f8']})}
        for read in read_both(content | nested, tmp_path):
            assert read['nested'][1][0] is read['nested'][2]['x'] is read['f8']
            for key, value in pickle.loads(pickle.dumps(content)).items():
                assert type(read[key]) is type(value)
                assert read[key].dtype == value.dtype
                np.testing.assert_array_equal(read[key], value)
                assert (value.flags.writeable, value.flags.f_contiguous) == (
                    read[key].flags.writeable,
                    read[key].flags.f_contiguous,
                )

    @pytest.mark.parametrize('core', ['core', '_core'])
    def test_names_of_numpy_1_and_2(self, tmp_path, core):
        content = pickle.dumps({'array': np.arange(3.0), 'number': np.float64(2.5)}, 2)
        for old in (b'numpy.core.multiarray', b'numpy._core.multiarray'):
            content = content.replace(old, f'numpy.{core}.multiarray'.encode())
        assert content.count(f'cnumpy.{core}.multiarray\n'.encode()) == 2
        (tmp_path / 'file.pth').write_bytes(hostile.archive(content))
        use_safe_reader(trust=False)
        read = by_mmengine(tmp_path / 'file.pth')
        assert read['array'].tolist() == [0, 1, 2]
        assert read['number'] == 2.5

    @pytest.mark.parametrize('name', ['SGD', 'Adam', 'AdamW', 'RMSprop', 'Adagrad', 'NAdam', 'LBFGS'])
    def test_optimizers(self, tmp_path, name):
        model = trained_model()
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1)
        optimizer.step(*([lambda: 0.0] if name == 'LBFGS' else []))
        state = optimizer.state_dict()
        for read in read_both({'optimizer': state}, tmp_path):
            assert read['optimizer']['param_groups'] == state['param_groups']
            optimizer.load_state_dict(read['optimizer'])

    @pytest.mark.parametrize(
        ('name', 'arguments'),
        [
            ('MultiStepLR', dict(milestones=[1, 3])),
            ('CosineAnnealingLR', dict(T_max=5)),
            ('LinearLR', {}),
            ('PolyLR', {}),
            ('OneCycleLR', dict(eta_max=1.0, total_steps=10)),
            ('ReduceOnPlateauLR', {}),
        ],
    )
    def test_schedulers_of_mmengine(self, tmp_path, name, arguments):
        optimizer = torch.optim.SGD(trained_model().parameters(), lr=0.1)
        scheduler = getattr(mmengine.optim, name)(optimizer, **arguments)
        state = scheduler.state_dict()
        for read in read_both({'param_schedulers': [state]}, tmp_path):
            assert read['param_schedulers'][0] == state

    def test_training_scripts_of_torchvision(self, tmp_path):
        model = trained_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer.step()
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=2)
        main = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 4])
        scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, main], milestones=[2])
        content = {
            'model': model.state_dict(),
            'optimizer': optimizer.state_dict(),
            'lr_scheduler': scheduler.state_dict(),
            'epoch': 3,
            'args': argparse.Namespace(lr=0.1, weights=None, output_dir='.', lr_steps=[3, 4], device='cuda'),
            'model_ema': torch.optim.swa_utils.AveragedModel(model).state_dict(),
            'scaler': torch.amp.GradScaler('cpu').state_dict(),
        }
        for read in read_both(content, tmp_path):
            assert read['args'] == content['args']
            assert read['lr_scheduler'] == content['lr_scheduler']
            assert read['model_ema']['n_averaged'] == 0
            optimizer.load_state_dict(read['optimizer'])

    def test_other_contents(self, tmp_path):
        content = {
            'ordered': collections.OrderedDict(a=1),
            'counter': collections.Counter('aab'),
            'set': {1, 2},
            'bytes': b'\x00\xff',
            'slice': slice(1, 2),
            'eps': UBN(2).eps,
            'size': torch.Size([1, 2]),
            'dtype': torch.float32,
            'device': torch.device('cpu'),
            'integer': 2**80,
            'random': torch.get_rng_state().tolist()[:3],
        }
        for read in read_both(content, tmp_path):
            assert read == content

    def test_tensors_still_go_between_processes(self):
        """A pickled tensor is read by torch.load; results of evaluations are sent so."""
        use_safe_reader(trust=False)
        tensors = [torch.arange(3), torch.ones(2, dtype=torch.bfloat16), torch.ones(2).to_sparse(), torch.ones(2) > 0]
        for tensor in tensors:
            read = pickle.loads(pickle.dumps(tensor))
            assert torch.equal(read.to_dense(), tensor.to_dense())
            assert torch.equal(copy.deepcopy(tensor).to_dense(), tensor.to_dense())


# --- whose reader it is -----------------------------------------------------------------------------------------------


def python(code, *arguments, **environment):
    command = [sys.executable, '-W', 'ignore', '-c', textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


class TestWhoseReader:
    @pytest.mark.parametrize('import_', ['import mmubn', 'import mmubn.cli', 'import mmubn.openmmlab.safe_reader'])
    def test_an_import_changes_none(self, import_):
        result = python(
            f"""
            import torch, mmengine.runner.checkpoint as checkpoint
            readers = lambda: [torch.load, torch.serialization.load,
                getattr(checkpoint, '_safe_torch_load', None), checkpoint._load_checkpoint, checkpoint.load_from_local,
                vars(checkpoint.CheckpointLoader)['load_checkpoint'], dict(checkpoint.CheckpointLoader._schemes)]
            before = readers()
            {import_}
            after = readers()
            assert after == before, [each for each in zip(before, after) if each[0] != each[1]]
            """
        )
        assert result.returncode == 0, result.stderr

    def test_the_optional_changes_have_none_of_it(self, marker, tmp_path):
        path = tmp_path / 'hostile.pth'
        path.write_bytes(hostile.archive(Call(os.mkdir, str(marker))))
        result = python(
            'import mmubn.openmmlab.installed, sys, torch; torch.load(sys.argv[1], weights_only=False)', path
        )
        assert result.returncode == 0, result.stderr
        assert marker.exists()

    def test_the_list_of_torch_is_as_before(self, tmp_path, marker):
        torch.save({'x': HistoryBuffer()}, tmp_path / 'real.pth')
        (tmp_path / 'hostile.pth').write_bytes(hostile.archive(Call(os.mkdir, str(marker))))
        use_safe_reader(trust=False)
        with torch.serialization.safe_globals([argparse.Namespace, (print, 'x.y')]):
            before = set(torch.serialization.get_safe_globals())
            by_torch(tmp_path / 'real.pth')
            assert set(torch.serialization.get_safe_globals()) == before
            with pytest.raises(UnreadCheckpointError):
                by_torch(tmp_path / 'hostile.pth')
            assert set(torch.serialization.get_safe_globals()) == before

    def test_a_forked_process_has_it(self, tmp_path, marker):
        """As the workers of a dataloader are."""
        path = tmp_path / 'hostile.pth'
        path.write_bytes(hostile.archive(Call(os.mkdir, str(marker))))
        use_safe_reader(trust=False)
        with multiprocessing.get_context('fork').Pool(1) as pool, pytest.raises(UnreadCheckpointError):
            pool.apply(by_torch_with_everything, (path,))
        assert not marker.exists()

    @pytest.mark.parametrize('names', ['all', 'safe-globals'])
    def test_no_environment_variable_takes_it_away(self, tmp_path, marker, names):
        path = tmp_path / 'hostile.pth'
        path.write_bytes(hostile.archive(Call(os.mkdir, str(marker))))
        result = python(
            """
            import sys, torch, mmubn.cli
            from mmubn.openmmlab import safe_reader
            mmubn.openmmlab.install()
            safe_reader.use_safe_reader(trust=False)
            torch.load(sys.argv[1], weights_only=False)
            """,
            path,
            MMUBN_SKIP_PATCHES=names,
            TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD='1',
        )
        assert 'UnreadCheckpointError' in result.stderr
        assert not marker.exists()

    def test_the_last_call_counts(self, tmp_path, marker):
        path = tmp_path / 'hostile.pth'
        path.write_bytes(hostile.archive(Call(os.mkdir, str(marker))))
        for _ in range(2):
            use_safe_reader(trust=False)
            with pytest.raises(UnreadCheckpointError):
                torch.load(path)
            use_safe_reader(trust=True)
            torch.load(path, weights_only=True)
            marker.rmdir()

    def test_the_reader_of_torch_is_what_the_list_was_written_for(self):
        """Its own list, which is not ours to write: a new entry that can call anything would be a way around ours."""
        allowed = torch._weights_only_unpickler._get_allowed_globals()
        modules = {name.rpartition('.')[0] for name in allowed}
        assert {name for name in modules if name.partition('.')[0] != 'torch'} == {'collections', '_codecs', 'builtins'}
        builtins = {name for name in allowed if name.startswith('builtins.')}
        assert builtins <= {'builtins.bytearray', 'builtins.set', 'builtins.complex'}
        assert not set(allowed) & {f'{each.__module__}.{each.__qualname__}' for each in safe_reader._LIST}
