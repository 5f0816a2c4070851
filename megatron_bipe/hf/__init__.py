"""Registration of `bipe` models with transformers' Auto classes, so that they load without remote code.

After this import the Auto classes run this package's code instead of the code in a model folder.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from megatron_bipe.hf.configuration_bipe import BipeConfig
from megatron_bipe.hf.modeling_bipe import BipeForCausalLM, BipeForSequenceClassification, BipeModel

# A saved model has the `auto_map` and the code with which it loads elsewhere.
BipeConfig.register_for_auto_class()  # type: ignore[no-untyped-call]
BipeModel.register_for_auto_class()  # type: ignore[no-untyped-call]
BipeForCausalLM.register_for_auto_class("AutoModelForCausalLM")  # type: ignore[no-untyped-call]
BipeForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")  # type: ignore[no-untyped-call]
AutoConfig.register(BipeConfig.model_type, BipeConfig, exist_ok=True)
AutoModel.register(BipeConfig, BipeModel, exist_ok=True)
AutoModelForCausalLM.register(BipeConfig, BipeForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(BipeConfig, BipeForSequenceClassification, exist_ok=True)

__all__ = ["BipeConfig", "BipeForCausalLM", "BipeForSequenceClassification", "BipeModel"]
