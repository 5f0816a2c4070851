"""Where a command's model runs."""

from megatron_bipe.errors import ConfigError


def pick_device(name: str) -> str:
    """`auto` -> a GPU where there is one; other names are checked.

    Raises:
        ConfigError: there is no such device.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r}: {reason}", remedy="Use auto, cpu or cuda", place="--device") from error
    return name
