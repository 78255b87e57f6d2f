"""Which backend an input gets: the rule, the switch, and the first use of the Triton kernels on a GPU.

GPUs are played: the rule sees the traits of a tensor on one, and what would run on it is replaced.
"""

import concurrent.futures
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mmubn
from mmubn import ops
from mmubn.ops import dispatch
from mmubn.ops.first_use import FirstUse, NotNowError
from mmubn.ops.triton import architecture, device, probe, runtime
from mmubn.ops.triton import backend as triton_backend

ROOT = Path(__file__).parents[2]
HANDLED = 'triton: the Triton kernels handle this input'


class OnGPU:
    """The traits of a tensor on a GPU."""

    is_cuda, dtype, layout, shape = True, torch.float32, torch.strided, torch.Size((2, 4, 8, 8))

    def __init__(self, index=0):
        self.device = torch.device('cuda', index)

    def dim(self):
        return len(self.shape)

    def numel(self):
        return self.shape.numel()


class Watch(TorchDispatchMode):
    """Sees every operator, and changes none."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **kwargs or {})


class GPUs:
    """GPUs on which the kernels work, unless ``failures`` has an error for their index."""

    def __init__(self):
        self.failures, self.tried = {}, []
        self.capability = (8, 0)
        self.is_capturing = False
        self.local = threading.local()

    def get_device_properties(self, device):
        major, minor = self.capability
        return SimpleNamespace(name='a GPU', major=major, minor=minor)

    def set_device(self, device):
        self.local.device = device

    def check(self, backend, device):
        """What runs on the GPU in a first use."""
        assert self.local.device == device
        self.tried.append(device.index)
        failure = self.failures.get(device.index)
        if callable(failure):
            failure = failure()
        if failure is not None:
            raise failure


@pytest.fixture
def gpus(monkeypatch):
    """As at the start of a process, on a machine with GPUs."""
    gpus = GPUs()
    monkeypatch.setattr(torch.cuda, 'get_device_properties', gpus.get_device_properties)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: gpus.capability)
    monkeypatch.setattr(torch.cuda, 'set_device', gpus.set_device)
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: gpus.is_capturing)
    monkeypatch.setattr(torch.version, 'hip', None)
    monkeypatch.setattr(dispatch, '_observer', lambda x: None)  # what is played is no plain tensor
    monkeypatch.setattr(runtime, 'TRITON_PROBLEM', None)
    monkeypatch.setattr(runtime, '_lacking', {})
    monkeypatch.setattr(triton_backend._first_use, 'outcomes', {})
    monkeypatch.setattr(probe, 'check', gpus.check)
    return gpus


@pytest.fixture(autouse=True)
def no_switch(monkeypatch):
    monkeypatch.setattr(dispatch, '_switch', None)


# For a new Python: imports of mmubn's rooms do not import OpenMMLab, which takes seconds.
WITHOUT_OPENMMLAB = (
    'import sys, types\npackage = sys.modules["mmubn"] = types.ModuleType("mmubn")\npackage.__path__ = ["mmubn"]\n'
)


def printed(program, **environment):
    """The lines that a new Python prints."""
    command, environment = [sys.executable, '-c', program], os.environ | environment
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def info(x):
    return mmubn.backend_info(mmubn.UBN(4), x)


class TestRule:
    @pytest.mark.parametrize('version', ['2.1.0', '3.0.0', '3.1.0', '3.2.0', '3.2.0+git0a1b2c3'])
    def test_an_old_triton(self, version):
        expected = f'the kernels need Triton 3.3 or later, which torch 2.7 brings, got Triton {version}'
        assert device.problem_of(version) == expected

    @pytest.mark.parametrize('version', ['3.3.0', '3.3.1+git0a1b2c3', '3.7.0', '3.10.0', '4.0'])
    def test_a_new_triton(self, version):
        assert device.problem_of(version) is None

    def test_an_import_with_an_old_triton(self):
        """Whose decorator does not take what the kernels say."""
        program = (
            f'{WITHOUT_OPENMMLAB}import triton, torch\n'
            'triton.__version__, triton.jit = "3.0.0", None\n'
            'from mmubn.ops.triton import operators, runtime\n'
            'with runtime.recorded(): print(runtime.lacking(torch.device("cuda", 0)))\n'
            'try: operators.instance_moments(torch.ones(1, 1, 2, 2))\n'
            'except ValueError as error: print(error)\n'
        )
        reason = 'the kernels need Triton 3.3 or later, which torch 2.7 brings, got Triton 3.0.0'
        assert printed(program) == [reason, f'mmubn kernels: {reason}.']

    def test_what_lacks_is_the_reason(self, gpus, monkeypatch):
        monkeypatch.setattr(runtime, 'TRITON_PROBLEM', 'a reason')
        assert info(OnGPU()) == 'torch: a reason'
        # Even where nothing would be launched: the kernels do not compile.
        with runtime.recorded():
            assert info(OnGPU()) == 'torch: a reason'

    def test_an_old_gpu(self, gpus):
        gpus.capability = (7, 5)
        assert info(OnGPU()) == 'torch: the kernels need a GPU of compute capability 8.0 or later, a GPU has 7.5'

    def test_a_device_is_asked_once(self, gpus, monkeypatch):
        assert info(OnGPU()) == info(OnGPU(1)) == HANDLED
        monkeypatch.setattr(torch.cuda, 'get_device_properties', None)
        assert info(OnGPU()) == info(OnGPU(1)) == HANDLED

    def test_sparse(self, gpus):
        x = OnGPU()
        x.layout = torch.sparse_coo
        assert info(x) == 'torch: the kernels take a dense tensor, got one of layout torch.sparse_coo'


class TestSwitch:
    def test_a_call_holds_from_then_on(self):
        x = torch.zeros(2, 4, 3, 3)
        mmubn.use_backend('reference')
        assert info(x) == "reference: use_backend('reference')"
        mmubn.use_backend('torch')
        assert info(x) == "torch: use_backend('torch')"
        mmubn.use_backend(None)
        assert info(x).startswith('cpp')

    def test_a_context_ends_as_it_began(self):
        x = torch.zeros(2, 4, 3, 3)
        mmubn.use_backend('torch')
        with mmubn.use_backend('reference'):
            assert info(x).startswith('reference')
            with mmubn.use_backend(None):
                assert info(x).startswith('cpp')
            mmubn.use_backend('cpp')
            assert info(x) == "cpp: use_backend('cpp')"
        assert info(x).startswith('torch')
        with pytest.raises(KeyError), mmubn.use_backend('reference'):
            raise KeyError
        assert info(x).startswith('torch')

    def test_a_context_may_begin_later(self):
        x = torch.zeros(2, 4, 3, 3)
        later = mmubn.use_backend('reference')
        mmubn.use_backend('torch')
        with later:
            assert info(x).startswith('reference')
        assert info(x).startswith('torch')

    def test_a_decorated_function_computes_by_it(self):
        x = torch.zeros(2, 4, 3, 3)

        @mmubn.use_backend('reference')
        def within():
            return info(x)

        assert info(x).startswith('cpp')
        assert within() == "reference: use_backend('reference')"
        assert info(x).startswith('cpp')

    @pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
    @pytest.mark.parametrize('name', ['cpp', 'triton'])
    def test_no_export_goes_through_kernels(self, name):
        with mmubn.use_backend(name), pytest.raises(ValueError, match=rf"use_backend\('{name}'\) leaves no other"):
            torch.jit.trace(mmubn.UBN(4).eval(), torch.zeros(2, 4, 3, 3))

    def test_there_is_no_such_backend(self):
        with pytest.raises(
            ValueError, match=r"no backend 'cuda': expected one of reference, torch, triton, cpp, or None"
        ):
            mmubn.use_backend('cuda')
        assert dispatch._switch is None

    @pytest.mark.parametrize('value', [None, ''])
    def test_no_environment_variable(self, value, monkeypatch):
        monkeypatch.delenv('MMUBN_BACKEND', raising=False)
        if value is not None:
            monkeypatch.setenv('MMUBN_BACKEND', value)
        assert dispatch._switch_of_environment() is None

    def test_the_environment_variable_is_read_at_the_import(self):
        program = (
            f'{WITHOUT_OPENMMLAB}import os\n'
            'try: import mmubn.ops\n'
            'except ValueError as error: print(error)\n'
            'os.environ["MMUBN_BACKEND"] = "torch"\n'
            'from mmubn import ops; import torch\n'
            'print(*ops.name_and_reason(torch.zeros(1, 1, 2, 2), 3))\n'
            'with ops.use_backend(None): print(*ops.name_and_reason(torch.zeros(1, 1, 2, 2), 4))\n'
        )
        assert printed(program, MMUBN_BACKEND='CPP') == [
            "MMUBN_BACKEND must be one of reference, torch, triton, cpp, got 'CPP'.",
            'torch MMUBN_BACKEND=torch',
            'torch the C++ kernels have kernel sizes 1, 3, 5, 7, got 4',
        ]

    @pytest.mark.parametrize('source', ["use_backend('triton')", 'MMUBN_BACKEND=triton'])
    def test_what_it_cannot_compute_is_an_error(self, source, monkeypatch):
        monkeypatch.setattr(runtime, 'TRITON_PROBLEM', None)
        monkeypatch.setattr(runtime, '_lacking', {})
        monkeypatch.setattr(dispatch, '_switch', dispatch.Switch('triton', source))
        message = f'the kernels take tensors on an NVIDIA GPU, got one on cpu; {source} leaves no other.'
        with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
            mmubn.UBN(4)(torch.zeros(2, 4, 3, 3))

    def test_what_watches_needs_plain_operators_all_the_same(self):
        x = torch.zeros(2, 4, 3, 3)
        mmubn.use_backend('triton')
        with Watch():
            assert info(x) == 'reference: a mode that watches or replaces operators needs plain operators'
        seen = []
        torch.vmap(lambda value: seen.append(info(value)) or value)(x[None])
        assert seen == ['reference: a transform of torch.func or forward-mode differentiation needs plain operators']
        parameter = type('Wrapper', (torch.Tensor,), {})(x)
        assert info(parameter) == 'reference: a Wrapper needs plain operators'

    def test_under_torch_compile(self):
        """A compiled layer takes the backend of the switch, and another one when it changes."""
        layer, x, graphs = mmubn.UBN(4).eval(), torch.randn(2, 4, 3, 3), []

        def keep(graph, _):
            graphs.append([str(node.target) for node in graph.graph.nodes])
            return graph.forward

        layer.compile(backend=keep, fullgraph=True)
        for name in (None, 'torch', 'reference', 'torch'):
            mmubn.use_backend(name)
            layer(x)
        by_rule, by_torch, *others = graphs
        assert by_rule != by_torch
        assert others == [by_rule]


class TestFirstUse:
    def test_it_works(self, gpus):
        assert info(OnGPU()) == HANDLED
        assert gpus.tried == []  # asking tries nothing
        for _ in range(2):
            assert ops.choose_backend(OnGPU(), 3).name == 'triton'
            assert ops.choose_backend(OnGPU(1), 3).name == 'triton'
        assert gpus.tried == [0, 1]
        assert info(OnGPU()) == HANDLED

    def test_a_failure_is_reported_once_for_each_device(self, gpus):
        gpus.failures = {1: RuntimeError('it is broken.\nand more')}
        with pytest.warns(RuntimeWarning) as caught:
            found = [ops.choose_backend(OnGPU(index), 3).name for index in (1, 0, 1, 0)]
        assert found == ['torch', 'triton', 'torch', 'triton']
        (warning,) = caught
        reason = 'the Triton kernels do not work on cuda:1: RuntimeError: it is broken; please report it'
        assert str(warning.message).startswith(f'mmubn: {reason}')
        assert 'MMUBN_BACKEND=torch' in str(warning.message)
        assert info(OnGPU()) == HANDLED
        assert info(OnGPU(1)).startswith(f'torch: {reason}')
        assert len(info(OnGPU(1)).splitlines()) == 1
        assert gpus.tried == [1, 0]

    def test_what_asks_for_the_kernels_gets_an_error(self, gpus):
        gpus.failures = {0: RuntimeError('it is broken')}
        mmubn.use_backend('triton')
        message = r"do not work on cuda:0: RuntimeError: it is broken; .*; use_backend\('triton'\) leaves no other\.$"
        with pytest.warns(RuntimeWarning, match='it is broken'), pytest.raises(ValueError, match=message):
            ops.choose_backend(OnGPU(), 3)
        with pytest.raises(ValueError, match=message):
            ops.choose_backend(OnGPU(), 3)
        with pytest.raises(ValueError, match=message):
            info(OnGPU())
        mmubn.use_backend('torch')
        assert ops.choose_backend(OnGPU(), 3).name == 'torch'
        assert gpus.tried == [0]

    def test_other_backends_try_nothing(self, gpus):
        gpus.failures = {0: RuntimeError('it is broken')}
        mmubn.use_backend('torch')
        assert ops.choose_backend(OnGPU(), 3).name == 'torch'
        mmubn.use_backend(None)
        x = OnGPU()
        x.dtype = torch.float64
        assert ops.choose_backend(x, 3).name == 'torch'
        assert gpus.tried == []

    def test_where_warnings_are_errors(self, gpus):
        gpus.failures = {0: RuntimeError('it is broken')}
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            with pytest.raises(RuntimeWarning, match='it is broken'):
                ops.choose_backend(OnGPU(), 3)
            assert ops.choose_backend(OnGPU(), 3).name == 'torch'

    def test_threads(self, gpus):
        """One tries, and the others wait for what it finds."""

        def fails_late():
            time.sleep(0.1)
            return RuntimeError('it is broken')

        gpus.failures = {0: fails_late}
        with concurrent.futures.ThreadPoolExecutor(8) as pool, pytest.warns(RuntimeWarning) as caught:
            found = list(pool.map(lambda _: ops.choose_backend(OnGPU(), 3).name, range(8)))
        assert found == ['torch'] * 8
        assert (gpus.tried, len(caught)) == ([0], 1)

    @pytest.mark.parametrize(
        'error',
        [torch.cuda.OutOfMemoryError('no'), RuntimeError('Triton Error [CUDA]: out of memory'), OSError(12, 'no')],
    )
    def test_no_memory_says_nothing_of_the_kernels(self, gpus, error):
        gpus.failures = {0: error}
        assert ops.choose_backend(OnGPU(), 3).name == 'triton'
        gpus.failures = {0: RuntimeError('it is broken')}
        with pytest.warns(RuntimeWarning, match='it is broken'):
            assert ops.choose_backend(OnGPU(), 3).name == 'torch'
        assert gpus.tried == [0, 0]

    def test_not_while_a_graph_is_captured(self, gpus):
        gpus.is_capturing = True
        assert ops.choose_backend(OnGPU(), 3).name == 'triton'
        assert gpus.tried == []
        gpus.is_capturing = False
        assert ops.choose_backend(OnGPU(), 3).name == 'triton'
        assert gpus.tried == [0]

    def test_not_while_launches_are_recorded(self, gpus):
        with runtime.recorded():
            assert ops.choose_backend(OnGPU(), 3).name == 'triton'
        assert gpus.tried == []

    def test_no_mode_of_the_caller_holds(self, gpus):
        """Nor does a random number go."""
        found = []

        def look():
            x = torch.zeros(1, device='cpu')
            found.append(
                (
                    type(x) is torch.Tensor,
                    torch.is_grad_enabled(),
                    torch.is_inference(x),
                    torch.is_autocast_enabled('cpu'),
                    torch._C._len_torch_dispatch_stack(),
                    torch.compiler.is_compiling(),
                )
            )

        gpus.failures = {0: look}
        state = torch.get_rng_state()
        with torch.inference_mode(), torch.autocast('cpu'), Watch(), torch.device('meta'):
            assert ops.choose_backend(OnGPU(), 3).name == 'triton'
        assert found == [(True, True, False, False, 0, False)]
        assert torch.equal(state, torch.get_rng_state())

    @pytest.mark.parametrize('works', [True, False])
    def test_while_torch_compile_traces(self, gpus, works):
        """One graph, which has none of the first use in it."""
        gpus.failures = {} if works else {0: RuntimeError('it is broken')}
        gpu = torch.device('cuda', 0)
        graphs = []

        def keep(graph, _):
            graphs.append([node.target for node in graph.graph.nodes if node.op not in ('placeholder', 'output')])
            return graph.forward

        @torch.compile(backend=keep, fullgraph=True)
        def choose(x):
            triton = dispatch.BACKENDS['triton']
            before = runtime.lacking(gpu) is None and triton_backend._trouble(gpu) is None
            return x + 1 if before and triton.prepare(gpu) is None and triton_backend._trouble(gpu) is None else x - 1

        x = torch.zeros(2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always', RuntimeWarning)
            first, second = choose(x), choose(x)
        assert sum(issubclass(each.category, RuntimeWarning) for each in caught) == (not works)
        assert torch.equal(first, x + 1 if works else x - 1)
        assert torch.equal(first, second)
        assert len(graphs) == len(graphs[0]) == 1
        assert gpus.tried == [0]


class TestReasons:
    """What Triton itself raises, and what is said of it."""

    @pytest.fixture
    def build(self, tmp_path, monkeypatch):
        """Triton's compilation of its launcher."""
        build = pytest.importorskip('triton.runtime.build')
        if not hasattr(build, 'compile_module_from_src'):
            pytest.skip('needs Triton 3.4')
        monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
        return lambda: build.compile_module_from_src('#include <Python.h>\n', 'launcher')

    def said(self, gpus, function):
        gpus.failures = {0: function}
        with pytest.warns(RuntimeWarning, match='the Triton kernels do not work on cuda:0') as caught:
            ops.choose_backend(OnGPU(), 3)
        assert len(caught) == 1
        head, _, tail = info(OnGPU()).partition('do not work on cuda:0: ')
        assert head == 'torch: the Triton kernels '
        assert tail in str(caught[0].message)
        return tail.split('; ')

    def test_no_compiler(self, gpus, build, monkeypatch):
        monkeypatch.setenv('PATH', '/nonexistent')
        monkeypatch.delenv('CC', raising=False)
        reason, remedy = self.said(gpus, build)
        assert reason.startswith('RuntimeError: Failed to find C compiler')
        assert remedy == 'install a C compiler such as gcc, or set CC to one'

    def test_a_compiler_that_is_not_there(self, gpus, build, monkeypatch):
        monkeypatch.setenv('CC', 'no-such-cc')
        reason, remedy = self.said(gpus, build)
        assert reason == "FileNotFoundError: [Errno 2] No such file or directory: 'no-such-cc'"
        assert 'set CC to a C compiler' in remedy

    def test_a_compiler_that_fails(self, gpus, build, monkeypatch):
        monkeypatch.setenv('CC', '/bin/false')
        assert self.said(gpus, build) == [
            '/bin/false fails with exit status 1',
            'see what the C compiler says above, or set CC to another',
        ]

    def test_no_headers_of_python(self, gpus, build, monkeypatch, tmp_path):
        paths = {'include': str(tmp_path)}
        monkeypatch.setattr('sysconfig.get_paths', lambda **_: paths)
        reason, remedy = self.said(gpus, build)
        assert reason.endswith('fails with exit status 1')
        assert remedy == 'install the headers of Python (python3-dev or python3-devel)'

    def test_a_folder_that_cannot_be_written(self, gpus, build, monkeypatch):
        monkeypatch.setenv('TRITON_CACHE_DIR', '/dev/null/triton')
        reason, remedy = self.said(gpus, build)
        assert reason.startswith("NotADirectoryError: [Errno 20] Not a directory: '/dev/null/triton")
        assert 'set TRITON_CACHE_DIR to a folder of yours' in remedy

    def test_a_folder_that_holds_no_programs(self, gpus):
        error = ImportError('launcher.so: failed to map segment from shared object: Operation not permitted')
        _, remedy = self.said(gpus, lambda: error)
        assert 'set TRITON_CACHE_DIR to a folder of yours' in remedy

    def test_no_libcuda(self, gpus, monkeypatch):
        driver = pytest.importorskip('triton.backends.nvidia.driver')
        monkeypatch.setattr(driver.subprocess, 'check_output', lambda *_, **__: b'')
        monkeypatch.delenv('LD_LIBRARY_PATH', raising=False)
        monkeypatch.delenv('TRITON_LIBCUDA_PATH', raising=False)
        reason, remedy = self.said(gpus, driver.libcuda_dirs.__wrapped__)
        assert reason == 'AssertionError: libcuda.so cannot found!'
        assert 'TRITON_LIBCUDA_PATH' in remedy

    def test_a_gpu_that_ptxas_does_not_know(self, gpus):
        errors = pytest.importorskip('triton.runtime.errors')
        if not hasattr(errors, 'PTXASError'):
            pytest.skip('needs Triton 3.3')
        error = errors.PTXASError(
            'Internal Triton PTX codegen error\n`ptxas` stderr:\n'
            "ptxas fatal   : Value 'sm_121a' is not defined for option 'gpu-name'\n\nRepro command: ptxas\n"
        )
        reason, remedy = self.said(gpus, lambda: error)
        assert reason == "PTXASError: ptxas fatal   : Value 'sm_121a' is not defined for option 'gpu-name'"
        assert remedy.startswith('install a newer Triton')

    @pytest.mark.skipif(device.TRITON_PROBLEM is not None, reason='needs Triton')
    def test_a_gpu_that_llvm_does_not_know(self, gpus, monkeypatch, tmp_path):
        """LLVM ends the process then: another one."""
        monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
        gpus.capability = (99, 0)
        reason, remedy = self.said(gpus, lambda: None)
        assert reason.startswith(
            'RuntimeError: this Triton does not know GPUs of compute capability 99.0: LLVM ERROR: Cannot select'
        )
        assert remedy.startswith('install a newer Triton')
        assert gpus.tried == []

    @pytest.mark.skipif(device.TRITON_PROBLEM is not None, reason='needs Triton')
    def test_a_gpu_that_llvm_knows(self, gpus, monkeypatch, tmp_path):
        monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
        monkeypatch.setattr(architecture, 'KNOWN', set())
        assert ops.choose_backend(OnGPU(), 3).name == 'triton'
        assert any(tmp_path.rglob('*.cubin'))
        assert gpus.tried == [0]

    def test_wrong_numbers(self, gpus):
        error = probe.WrongNumbersError('the output of a layer is off')
        reason, remedy = self.said(gpus, lambda: error)
        assert reason == 'the output of a layer is off'
        assert remedy.startswith('please report it')


class TestForks:
    @pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork')
    @pytest.mark.filterwarnings('ignore:.*fork.*:DeprecationWarning')
    def test_a_fork_while_another_thread_is_at_it(self):
        """The new process has neither that thread nor what it holds."""
        started, go_on = threading.Event(), threading.Event()

        def get_ready(_):
            if threading.current_thread().name == 'first':
                started.set()
                go_on.wait()

        first_use = FirstUse(get_ready, print)
        thread = threading.Thread(target=first_use, args=(torch.device('cpu'),), name='first')
        thread.start()
        started.wait()
        if (child := os.fork()) == 0:
            os._exit(0 if first_use(torch.device('cpu')) is None else 1)
        end = time.monotonic() + 10
        while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
            time.sleep(0.01)
        go_on.set()
        thread.join()
        if done == (0, 0):
            os.kill(child, 9)
            os.waitpid(child, 0)
        assert done == (child, 0)

    def test_not_now(self):
        answers = iter([NotNowError(), 'a failure'])
        reported = []

        def get_ready(_):
            answer = next(answers)
            if isinstance(answer, Exception):
                raise answer
            return answer

        first_use = FirstUse(get_ready, reported.append)
        device = torch.device('cpu')
        assert first_use(device) is None
        assert first_use.outcomes == {}
        assert first_use(device) == first_use(device) == first_use.outcomes[device] == 'a failure'
        assert reported == ['a failure']
