"""What surrounds the kernels in training: graphs, compilers, streams, threads, checkpoints, mixed precision, processes.

A layer that is run in one of these ways gives what it gives when it is simply called, mostly to the bit.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.checkpoint import checkpoint

from mmubn.analysis.gpu_check.device import (
    by_backend,
    captured,
    is_gpu,
    need_gpu,
    need_kernels,
    need_memory,
    on_side_stream,
    synchronize,
    without_waiting,
)
from mmubn.analysis.gpu_check.kernels import OFFSETS, numbers, on_device
from mmubn.analysis.gpu_check.layers import KINDS, Input, compare, draw, make_layer, state_of, step
from mmubn.analysis.gpu_check.outcome import Check, Skip
from mmubn.layers import UBN, SyncUBN
from mmubn.layers.unified_norm import UnifiedNorm

__all__ = ['checks']

SHAPE, SMALL_SHAPE = (4, 64, 28, 28), (2, 4, 4, 5)
MANY = (132, 64, 512, 512)  # more than 2^31 values


def checks(device: torch.device) -> list[Check]:
    """The checks of this stage. Those that take longest come first, each in another process."""
    functions: dict[str, Callable] = {
        'more than 2^31 values, NCHW': functools.partial(more_than_2_to_31_values, 'nchw'),
        'more than 2^31 values, channels-last': functools.partial(more_than_2_to_31_values, 'channels_last'),
        'torch.compile, one graph, two sizes': compiled_in_one_graph,
        'torch.compile, reduce-overhead': compiled_with_cuda_graphs,
        'opcheck of the operators': operators,
        'CUDA graph of a step, replayed with new data': cuda_graph,
        'SyncUBN, one process as a group': synchronized,
        'SyncUBN, CUDA graph of a step': synchronized_cuda_graph,
        'automatic mixed precision with GradScaler': mixed_precision,
        'threads': threads,
        'a second device': second_device,
        'the same bits again': same_bits_again,
        'a side stream': side_stream,
        'gradients of other strides': strided_gradients,
        'inputs of other strides': strided_inputs,
        'parameters cut from one vector': flattened_parameters,
        'no samples, one sample': few_samples,
        'checkpoint, reentrant': functools.partial(checkpointed, True),
        'checkpoint, not reentrant': functools.partial(checkpointed, False),
        'a step leaves no memory': no_memory_left,
    }
    for kind in KINDS:
        functions[f'no waiting for the device, {kind}'] = functools.partial(no_waiting, kind, None)
    functions["no waiting for the device, UBN by torch's operators"] = functools.partial(no_waiting, 'UBN', 'torch')
    return [Check(name, functools.partial(function, device)) for name, function in functions.items()]


# --- what they share --------------------------------------------------------------------------------------------------


def ubn(device: torch.device) -> UnifiedNorm:
    return make_layer('UBN', shape_on(device)[1], device)


def shape_on(device: torch.device) -> tuple[int, int, int, int]:
    return SHAPE if is_gpu(device) else SMALL_SHAPE


def data_on(device: torch.device, seed: int = 0) -> Input:
    return draw(shape_on(device), torch.float32, 'nchw', device, seed)


def require_same(found: dict[str, Tensor], expected: dict[str, Tensor], way: str = '') -> None:
    """Raise an AssertionError unless all bits are the same."""
    for name, value in expected.items():
        if not torch.equal(found[name], value):
            far = float((found[name].double() - value.double()).abs().max())
            raise AssertionError(f'{name} is not that of a plain step{way}, but off by {far:.3g}')


def require_near(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """Raise an AssertionError unless all is the same to the rounding of float32."""
    try:
        compare(found, expected, torch.float32)
    except AssertionError as error:
        raise AssertionError(f'{what}: {error}') from None


def plain_step(device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    return step(ubn(device), data_on(device, seed))


# --- the checks -------------------------------------------------------------------------------------------------------


def same_bits_again(device: torch.device) -> None:
    expected = plain_step(device)
    for _ in range(4):
        require_same(plain_step(device), expected)


def strided_gradients(device: torch.device) -> None:
    """A gradient that is expanded, channels-last or cut out, for an x in NCHW."""
    x, dy = data_on(device)
    wide = torch.stack([dy, dy], dim=-1).flatten(3)
    for other in (dy[:1, :1, :1, :1].expand_as(dy), dy.contiguous(memory_format=torch.channels_last), wide[..., ::2]):
        expected = step(ubn(device), Input(x, other.contiguous()))
        require_near(step(ubn(device), Input(x, other)), expected, f'a gradient of strides {other.stride()}')


def strided_inputs(device: torch.device) -> None:
    """An x that is cut out, transposed, negated lazily, or not at 16 bytes, in NCHW."""
    x, dy = data_on(device)
    wide = torch.stack([x, x], dim=-1).flatten(3)
    inputs = {
        'every other column': wide[..., ::2],
        'a transposed map': x.transpose(2, 3).contiguous().transpose(2, 3),
        'a negated view': torch._neg_view(-x),
        'memory that is not aligned': x.new_zeros(x.numel() + 1)[1:].view_as(x).copy_(x),
    }
    expected = step(ubn(device), Input(x, dy))
    for name, other in inputs.items():
        require_near(step(ubn(device), Input(other, dy)), expected, f'an x of {name}')


def flattened_parameters(device: torch.device) -> None:
    """As FSDP and ZeRO have them: views into one vector, wherever they come to lie there."""
    layer = ubn(device)
    vector = torch.cat([torch.zeros(1, device=device), *(p.detach().flatten() for p in layer.parameters())])
    start = 1
    for parameter in layer.parameters():
        parameter.data = vector[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    compare(step(layer, data_on(device)), plain_step(device), torch.float32)


def few_samples(device: torch.device) -> None:
    x, dy = data_on(device)
    empty = step(ubn(device), Input(x[:0], dy[:0]))
    if empty['y'].shape != x[:0].shape or any(bool(value.any()) for name, value in empty.items() if name[:2] == 'd_'):
        raise AssertionError('no samples: expected an output without elements, and gradients of 0')
    one = Input(x[:1], dy[:1])
    reference = ubn(device).double()
    compare(step(ubn(device), one), step(reference, one.double(), 'reference'), torch.float32)


def checkpointed(reentrant: bool, device: torch.device) -> None:
    """The same bits; and the host does not wait, at the second time, when what runs once only is done."""
    expected = plain_step(device)
    for guard in (contextlib.nullcontext(), without_waiting(device)):
        layer, (x, dy) = ubn(device), data_on(device)
        x = x.requires_grad_()
        with by_backend(device), guard:
            y = checkpoint(layer, x, use_reentrant=reentrant)
            y.backward(dy)
        assert x.grad is not None
        require_same({'y': y.detach(), 'dx': x.grad} | state_of(layer), expected)


def mixed_precision(device: torch.device) -> None:
    """Three steps of a convolution and a norm in half precision, with the scaled gradients of a GradScaler."""
    torch.manual_seed(0)
    channels = shape_on(device)[1]
    net = nn.Sequential(nn.Conv2d(channels, channels, 1), make_layer('UBN', channels, device)).to(device)
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**12)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    half = torch.float16 if is_gpu(device) else torch.bfloat16
    losses = []
    for _ in range(3):
        with torch.autocast(device.type, half), by_backend(device):
            y = net(data_on(device).x)
        if y.dtype != half:
            raise AssertionError(f'the output is {y.dtype}, expected {half}')
        loss = y.float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    parameters = list(net.parameters())
    if not all(bool(parameter.isfinite().all()) for parameter in parameters):
        raise AssertionError('a parameter is not finite')
    if all(torch.equal(*pair) for pair in zip(parameters, before, strict=True)) or losses[-1] >= losses[0]:
        raise AssertionError(f'nothing was learned: losses {losses}, scale {scaler.get_scale():g}')


def compiled_in_one_graph(device: torch.device) -> None:
    """By Inductor on a GPU; the second size makes sizes dynamic."""
    layer = ubn(device)
    layer.compile(fullgraph=True, backend='inductor' if is_gpu(device) else 'aot_eager')
    x, dy = data_on(device)
    for data in (Input(x, dy), Input(x[..., :-1, :-2].contiguous(), dy[..., :-1, :-2].contiguous())):
        plain = ubn(device)
        plain.load_state_dict(layer.state_dict())
        expected = step(plain, data)
        compare(step(layer, data), expected, torch.float32)


def compiled_with_cuda_graphs(device: torch.device) -> None:
    need_gpu(device, 'a CUDA graph')
    layer, plain = ubn(device), ubn(device)
    compiled = torch.compile(layer, mode='reduce-overhead')
    for seed in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        x, dy = data_on(device, seed)
        x.requires_grad_()
        layer.zero_grad(set_to_none=True)
        y = compiled(x)
        y.backward(dy)
        assert x.grad is not None
        found = {'y': y.detach().clone(), 'dx': x.grad} | state_of(layer)
        compare(found, step(plain, data_on(device, seed)), torch.float32)


def operators(device: torch.device) -> None:
    """Schema, fake implementation and dispatch of each operator agree with what it does."""
    need_kernels(device)
    tests = numbers()
    case = tests.make_case((2, 3, 2, 3), 'channels_last', torch.float16, 3, 'rectified', True, True)
    calls = tests.arguments_of_operators(on_device(case, OFFSETS['unaligned'], device))
    if missing := set(tests.operators.__all__) - calls.keys():
        raise AssertionError(f'there are no arguments for {sorted(missing)}')
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(torch.ops.mmubn, name), arguments)


def side_stream(device: torch.device) -> None:
    expected = plain_step(device)
    layer, data = ubn(device), data_on(device)
    with on_side_stream(device):
        found = step(layer, data)
    require_same(found, expected)


def threads(device: torch.device) -> None:
    """Four at once, each on a stream of its own."""
    need_gpu(device, 'a stream for each thread')
    expected = plain_step(device)
    layers, data = [ubn(device) for _ in range(4)], data_on(device)
    synchronize(device)
    found: list[list[dict[str, Tensor]]] = [[] for _ in layers]
    errors = []

    def work(index: int) -> None:
        try:
            torch.cuda.set_device(device)
            with on_side_stream(device):
                found[index].append(step(layers[index], data))
        except Exception as error:
            errors.append(error)

    running = [threading.Thread(target=work, args=(index,)) for index in range(len(layers))]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if errors:
        raise errors[0]
    for (each,) in found:
        require_same(each, expected, ', in a thread')


def cuda_graph(device: torch.device) -> None:
    captured_step_is_plain_step(ubn, device)


def synchronized_cuda_graph(device: torch.device) -> None:
    with process_group(device):
        captured_step_is_plain_step(sync_ubn, device)


def captured_step_is_plain_step(make: Callable[[torch.device], UnifiedNorm], device: torch.device) -> None:
    """A whole training step, replayed with new data, as plain steps one after the other."""
    layer, plain = make(device), make(device)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    x, dy = data_on(device)
    x.requires_grad_()
    found: dict[str, Tensor] = {}

    def training_step() -> None:
        with by_backend(device):
            y = layer(x)
            gradients = torch.autograd.grad(y, [x, *layer.parameters()], dy)
        names = ['dx', *(f'd_{name}' for name, _ in layer.named_parameters())]
        found.update(zip(names, gradients, strict=True), y=y.detach())

    replay = captured(training_step, device)
    layer.load_state_dict(state)
    for seed in (1, 2, 3):
        data = data_on(device, seed)
        with torch.no_grad():
            x.copy_(data.x)
            dy.copy_(data.dy)
        replay()
        buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        require_same(found | buffers, step(plain, data), f', replay {seed}')


def second_device(device: torch.device) -> None:
    """On a device that is not the current one."""
    need_gpu(device, 'a second device')
    if torch.cuda.device_count() < 2:
        raise Skip('this machine has one GPU')
    other = torch.device('cuda', (torch.cuda.current_device() + 1) % torch.cuda.device_count())
    data = data_on(device)
    expected = plain_step(device)
    found = step(ubn(device).to(other), Input(data.x.to(other), data.dy.to(other)))
    one, two = torch.cuda.get_device_name(device), torch.cuda.get_device_name(other)
    found = {name: value.to(device) for name, value in found.items()}
    if one == two:
        require_same(found, expected, ' on the other device')
    else:
        compare(found, expected, torch.float32)


def no_waiting(kind: str, backend: str | None, device: torch.device) -> None:
    """The host waits for the device in no forward and no backward, in training and in evaluation."""
    need_gpu(device, 'waiting')
    layer, data = make_layer(kind, shape_on(device)[1], device), data_on(device)
    for training in (True, False):
        layer.train(training)
        step(layer, data, backend)  # what is compiled may wait
        with without_waiting(device):
            for _ in range(3):
                step(layer, data, backend)


def no_memory_left(device: torch.device) -> None:
    """Nothing is kept for a recomputation that cannot come."""
    need_gpu(device, 'the memory of a step')
    layer, data = ubn(device), data_on(device)

    def allocated_after_step() -> int:
        step(layer, data)
        layer.zero_grad(set_to_none=True)
        synchronize(device)
        return torch.cuda.memory_allocated(device)

    for _ in range(3):
        before = allocated_after_step()  # the first ones may keep what all later ones use
    allocated_after_step()
    if (more := allocated_after_step() - before) > 0:
        raise AssertionError(f'{more} bytes more are allocated two steps later')


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """This process alone as a group."""
    if dist.is_initialized():
        dist.destroy_process_group()
    with tempfile.TemporaryDirectory() as folder:
        place = f'file://{Path(folder) / "rendezvous"}'
        name = 'nccl' if is_gpu(device) else 'gloo'
        dist.init_process_group(name, init_method=place, rank=0, world_size=1)
        yield
        # Not after an error, whose traceback may hold a CUDA graph: NCCL would wait for the end of that for ever.
        dist.destroy_process_group()


def sync_ubn(device: torch.device) -> UnifiedNorm:
    """A SyncUBN that takes this process, alone in its group, for one of several, with the parameters of :func:`ubn`."""
    layer = make_layer('SyncUBN', shape_on(device)[1], device)
    assert isinstance(layer, SyncUBN)
    assert layer._processes() is None, 'of itself it would not gather from a group of one'
    layer._processes = lambda: dist.group.WORLD  # type: ignore[method-assign]
    return layer


def synchronized(device: torch.device) -> str:
    """It gives what UBN gives, and waits for the device no more than that."""
    expected, data = plain_step(device), data_on(device)
    with process_group(device):
        step(sync_ubn(device), data)  # NCCL connects at the first collective
        layer = sync_ubn(device)
        with without_waiting(device):
            found = step(layer, data)
        require_near(found, expected, 'beside UBN')
    return f'by {"NCCL" if is_gpu(device) else "gloo"}'


def more_than_2_to_31_values(memory_format: str, device: torch.device) -> None:
    """Two samples, 66 times: the statistics, y and dx are those of the two alone."""
    need_gpu(device, 'such an input')
    need_memory(device, 28)
    samples, channels, *size = MANY
    pair = draw((2, channels, *size), torch.bfloat16, memory_format, device)
    many = Input(*(tensor.repeat(samples // 2, 1, 1, 1) for tensor in pair))
    if memory_format == 'channels_last':
        many = Input(*(tensor.contiguous(memory_format=torch.channels_last) for tensor in many))

    def layer() -> UBN:
        torch.manual_seed(0)
        made = UBN(channels, threshold=-1).to(device)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(torch.randn_like(parameter) / 2)
        return made

    found = step(layer(), many)
    expected = step(layer().double(), pair.double(), 'reference')
    gradients = {name: value for name, value in found.items() if name.startswith('d_')}
    for start in range(0, samples, 2):
        each = {name: found[name][start : start + 2] for name in ('y', 'dx')}
        each |= {name: value / (samples // 2) for name, value in gradients.items()}
        try:
            compare(each, {name: expected[name] for name in each}, torch.bfloat16)
        except AssertionError as error:
            raise AssertionError(f'samples {start} and {start + 1}: {error}') from None
