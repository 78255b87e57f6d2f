"""Settings of all tests."""

import torch

# Small tensors gain nothing from threads, and threads that wait for a busy core cost minutes.
torch.set_num_threads(1)
