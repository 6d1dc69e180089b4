"""What a run of an Engine took, and what proposals brought."""
from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Speculation:
    """What proposals brought."""

    checked: int = 0  # rows times steps that checked proposals
    tokens: int = 0  # that answers got from those
    accepted: list[int] = field(default_factory=list)  # how often proposal i was right
    checking_s: list[float] = field(default_factory=list)  # per step that checked some
    plain_s: list[float] = field(default_factory=list)  # per step that checked none

    def add(self, k: int, agreed: list[int], seconds: float) -> None:
        """A step that checked k proposals a row; agreed: how many were right in each."""
        if k == 0:
            self.plain_s.append(seconds)
            return
        self.checking_s.append(seconds)
        self.checked += len(agreed)
        self.accepted += [0] * (k - len(self.accepted))
        for i in range(k):
            self.accepted[i] += sum(right > i for right in agreed)


@dataclass
class Stats:
    """What a run took: seconds and tokens."""

    load_s: float = 0.0
    compile_s: float = 0.0
    prompt_tokens: int = 0
    shared_tokens: int = 0  # of them that a row took from another one
    new_tokens: int = 0
    first_token_s: list[float] = field(default_factory=list)  # per prefill of prompts
    steps_s: list[float] = field(default_factory=list)  # per decode step
    wall_s: float = 0.0  # from a run's first prompt to its last token
    decode_tokens: int = 0  # that requests got from decode steps
    row_steps: int = 0  # rows that decode steps worked on
    useful_row_steps: int = 0  # those whose request got something
    speculation: Speculation = field(default_factory=Speculation)
