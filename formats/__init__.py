"""Reading what others wrote: checkpoints and tokenizers. Nothing here knows a model."""
