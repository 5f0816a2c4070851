"""The data format and what training reads from it. Torch-free, except for `collate`, which makes tensors."""
