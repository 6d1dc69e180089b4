"""Text of tokens that come one by one, up to a stop string; of gpt-oss only its final channel."""
from __future__ import annotations

from collections.abc import Sequence

from generate import Tokenizer


class TextStream:
    """Turns ids into text, the same however they are cut into pieces.

    context: the ids before the first ones, so that a leading space is right. stop: strings that
    end the text and are no part of it; the one that is complete first counts. What may still
    become one is held back, and so is a character until its bytes are all there. Control tokens
    have no text, but a stop string may name them."""

    def __init__(
        self, tokenizer: Tokenizer, context: Sequence[int] = (), stop: Sequence[str] = ()
    ) -> None:
        self.tokenizer = tokenizer
        self.ids = self.tail(list(context))
        self.shown = tokenizer.decode(self.ids)
        self.stop = stop
        self.stopped = False
        self.held: list[tuple[str, bool]] = []  # the start of a stop string, perhaps
        special = getattr(tokenizer, "special", {})
        self.named = {i: token for token, i in special.items() if any(token in s for s in stop)}
        self.channels = Channels(tokenizer, special)
        self.channels.visible(context)

    def push(self, ids: Sequence[int], final: bool = False) -> str:
        """The text that new ids complete; final: no more will come."""
        if self.stopped:
            return ""
        characters = self.held + self.characters(ids, final)
        text = "".join(character for character, _ in characters)
        end = len(text)

        # a stop string ends the text in front of it
        found = [(text.find(stop) + len(stop), stop) for stop in self.stop if stop in text]
        if found:
            self.stopped = True
            end, stop = min(found, key=lambda each: (each[0], -len(each[1])))
            end -= len(stop)
        elif not final:  # what may become a stop string waits
            end -= max((overlap(text, stop) for stop in self.stop), default=0)
        self.held = characters[end:]
        return "".join(character for character, is_text in characters[:end] if is_text)

    def characters(self, ids: Sequence[int], final: bool) -> list[tuple[str, bool]]:
        """Those of new ids, and whether each is text: a control token that a stop string names is
        not."""
        characters = []
        begin = 0
        for n, i in enumerate(ids):
            if i in self.named:
                text = self.decode(ids[begin:n], final=False)
                characters += [(character, True) for character in text]
                characters += [(character, False) for character in self.named[i]]
                begin = n
        text = self.decode(ids[begin:], final)
        return characters + [(character, True) for character in text]

    def decode(self, ids: Sequence[int], final: bool) -> str:
        """The text of new ids behind those before; nothing while a character lacks bytes."""
        self.ids += self.channels.visible(ids)
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


class Channels:
    """What gpt-oss says is in channels, <|channel|>NAME<|message|>TEXT, of which the one named
    final is for the user. Other models have none."""

    def __init__(self, tokenizer: Tokenizer, special: dict[str, int]) -> None:
        self.tokenizer = tokenizer
        names = ("<|start|>", "<|channel|>", "<|message|>")
        self.start, self.channel, self.message = (special.get(name) for name in names)
        self.header: list[int] | None = None  # of a message; None: its text has begun
        self.in_channel = False
        self.is_shown = True

    def visible(self, ids: Sequence[int]) -> Sequence[int]:
        """Those of the next ids that are for the user."""
        if None in (self.start, self.channel, self.message):
            return ids
        visible = []
        for i in ids:
            if i in (self.start, self.channel):
                self.header = []
                self.in_channel = i == self.channel
            elif i == self.message:
                name = self.tokenizer.decode(self.header or []).split()[:1]
                self.is_shown = not self.in_channel or name == ["final"]
                self.header = None
            elif self.header is not None:
                self.header.append(i)
            elif self.is_shown:
                visible.append(i)
        return visible


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text are the start of a stop string, not all of it."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
