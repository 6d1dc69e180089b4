"""Several processes: a model over ranks, and groups of them that share work.

    torchrun --nproc_per_node=4 generate.py --checkpoint_path PATH --prompt "The capital is"
"""
from parallel.ranks import ALONE, Ranks, load_model
from parallel.team import Team

__all__ = ["ALONE", "Ranks", "Team", "load_model"]
