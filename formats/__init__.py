"""Reading what others wrote: checkpoints, tokenizers, chat templates."""
from __future__ import annotations

from formats.checkpoint import open_checkpoint
from formats.tokenizer import load_tokenizer, save_tokenizer

__all__ = ["load_tokenizer", "open_checkpoint", "save_tokenizer"]
