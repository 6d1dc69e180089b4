"""What changes logits before a token is drawn, and log probabilities: Extras, for Decoder."""
from __future__ import annotations

from processors.extras import PROCESSORS, Extras, Processor, Texts
from processors.functions import BadWords, Grammar, LogitBias, MinNewTokens, NoRepeatNgram

__all__ = [
    "PROCESSORS", "BadWords", "Extras", "Grammar", "LogitBias", "MinNewTokens", "NoRepeatNgram",
    "Processor", "Texts",
]
