"""Training and evaluation steps by DeepSpeed; the only package that imports it. Others depend on `interface`."""
