from megatron_bipe.hf.register import BipeConfig, BipeForCausalLM, BipeModel

__all__ = ["BipeConfig", "BipeForCausalLM", "BipeModel"]
