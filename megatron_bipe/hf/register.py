"""Makes `bipe` models known to transformers' Auto classes, so that they load without remote code.

Once this is imported, the Auto classes run this package's code, and no longer that of a model's folder.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from megatron_bipe.hf.configuration_bipe import BipeConfig
from megatron_bipe.hf.modeling_bipe import BipeForCausalLM, BipeModel

AutoConfig.register(BipeConfig.model_type, BipeConfig, exist_ok=True)
AutoModel.register(BipeConfig, BipeModel, exist_ok=True)
AutoModelForCausalLM.register(BipeConfig, BipeForCausalLM, exist_ok=True)
