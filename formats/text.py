"""Text of tokens that come one by one, up to a stop string."""
from __future__ import annotations

from collections.abc import Sequence

from generate import Tokenizer


class TextStream:
    """Turns ids into text, the same however they are cut into pieces.

    context: the ids before the first ones, so that a leading space is right. stop: strings that
    end the text and are no part of it; the one that is complete first counts. What may still
    become one is held back, and so is a character until its bytes are all there."""

    def __init__(
        self, tokenizer: Tokenizer, context: Sequence[int] = (), stop: Sequence[str] = ()
    ) -> None:
        self.tokenizer = tokenizer
        self.ids = self.tail(list(context))
        self.shown = tokenizer.decode(self.ids)
        self.stop = stop
        self.stopped = False
        self.held = ""  # the start of a stop string, perhaps

    def push(self, ids: list[int], final: bool = False) -> str:
        """The text that new ids complete; final: no more will come."""
        if self.stopped:
            return ""
        text = self.held + self.decode(ids, final)
        self.held = ""

        # a stop string ends the text in front of it
        found = [(text.find(stop) + len(stop), stop) for stop in self.stop if stop in text]
        if found:
            self.stopped = True
            end, stop = min(found, key=lambda each: (each[0], -len(each[1])))
            return text[:end - len(stop)]

        # what may become a stop string waits
        if not final:
            n_held = max((overlap(text, stop) for stop in self.stop), default=0)
            self.held = text[len(text) - n_held:]
        return text[:len(text) - len(self.held)]

    def decode(self, ids: list[int], final: bool) -> str:
        """The text of new ids behind those before; nothing while a character lacks bytes."""
        self.ids += ids
        text = self.tokenizer.decode(self.ids)
        if text.endswith("\ufffd") and not final:
            return ""
        new = text[len(self.shown):]
        if new:
            self.ids = self.tail(self.ids)
            self.shown = self.tokenizer.decode(self.ids)
        return new

    def tail(self, ids: list[int]) -> list[int]:
        """The last ids, enough for a word's leading space: eight, or up to three more where these
        begin inside a character, since some decoders give up all bytes of a run that has half a
        character (ByteFallback of tokenizers)."""
        for n in range(8, 12):
            if not self.tokenizer.decode(ids[-n:]).startswith("\ufffd"):
                return ids[-n:]
        return ids[-8:]


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text are the start of a stop string, not all of it."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
