"""The ops: one file each holds its checks, its torch.library registration, its fake kernel and its autograd."""
