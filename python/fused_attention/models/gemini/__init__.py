"""A multimodal transformer, small and whole, on this package's attention: text, images and sound, in and out.

    from fused_attention.models.gemini import GeminiForConditionalGeneration

    model = GeminiForConditionalGeneration.from_pretrained(folder)

Needs `pip install 'fused-attention[gemini]'`. Importing this also tells transformers' Auto classes of the model.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from .cache import GeminiCache
from .configuration import GeminiConfig, student_config, teacher_config
from .generation import GeminiForConditionalGeneration
from .modeling import GeminiModel, GeminiOutput
from .processing import GeminiProcessor
from .tokenization import GeminiTokenizer

AutoConfig.register(GeminiConfig.model_type, GeminiConfig, exist_ok=True)
AutoModel.register(GeminiConfig, GeminiModel, exist_ok=True)
AutoModelForCausalLM.register(GeminiConfig, GeminiForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(GeminiConfig, GeminiForConditionalGeneration, exist_ok=True)
AutoProcessor.register(GeminiConfig, GeminiProcessor, exist_ok=True)
AutoTokenizer.register(GeminiConfig, fast_tokenizer_class=GeminiTokenizer, exist_ok=True)

__all__ = [
    "GeminiCache",
    "GeminiConfig",
    "GeminiForConditionalGeneration",
    "GeminiModel",
    "GeminiOutput",
    "GeminiProcessor",
    "GeminiTokenizer",
    "student_config",
    "teacher_config",
]
