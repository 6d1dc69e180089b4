"""What only a terminal needs: flags, a conversation, files of prompts, what a run took."""
