import torch

torch.set_num_threads(1)  # the Traces are small: a second thread costs more than it brings
