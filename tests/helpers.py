"""What tests share: random layers and batches, and how far rounding may take a result."""

import torch

# Rounding of one forward and backward pass: statistics and stencil in float32, then one rounding to the dtype of x.
TOLERANCES = {
    torch.float64: dict(rtol=1e-9, atol=1e-9),
    torch.float32: dict(rtol=1e-4, atol=1e-5),
    torch.bfloat16: dict(rtol=2e-2, atol=2e-2),
    torch.float16: dict(rtol=2e-3, atol=2e-3),
}
LAYOUTS = {'nchw': torch.contiguous_format, 'channels_last': torch.channels_last}


def randomize(module, scale=0.5, seed=0):
    """Move parameters and running statistics away from their initial values, so that every term counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        for name, buffer in module.named_buffers():
            if name.endswith('running_mean'):
                buffer.add_(0.3 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith('running_var'):
                buffer.mul_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return module


def batch(shape=(4, 3, 6, 5), seed=0, shared=0.0, dtype=torch.float32):
    """Random samples; ``shared`` adds one pattern to all of them, which makes them similar."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    pattern = torch.randn(shape[1:], generator=generator, dtype=torch.float64)
    return (x + shared * pattern).to(dtype)


def is_third_norm(path):
    """Whether a config has a norm of ours in the third place of each bottleneck alone, as its name then says."""
    return 'bnet3' in path.stem or 'ubn3' in path.stem
