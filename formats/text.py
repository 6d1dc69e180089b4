"""Text of tokens that come one by one, up to a stop string; of gpt-oss only its final channel."""
from __future__ import annotations

import time
from collections.abc import Sequence

from generate import Printer, Tokenizer


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
        self.held = ""  # the start of a stop string, perhaps
        special = getattr(tokenizer, "special", {})
        self.named = {i: token for token, i in special.items() if any(token in s for s in stop)}
        self.channels = Channels(tokenizer, special)
        self.channels.visible(context)

    def push(self, ids: Sequence[int], final: bool = False) -> str:
        """The text that new ids complete; final: no more will come."""
        if self.stopped:
            return ""
        text = self.held + self.text(ids, final)
        end = len(text)

        # a stop string ends the text in front of it
        found = [(text.find(stop) + len(stop), stop) for stop in self.stop if stop in text]
        if found:
            self.stopped = True
            end, stop = min(found, key=lambda each: (each[0], -len(each[1])))
            end -= len(stop)
        elif not final:  # what may become a stop string waits
            end -= max((overlap(text, stop) for stop in self.stop), default=0)
        self.held = text[end:]
        text = text[:end]
        for token in self.named.values():
            text = text.replace(token, "")
        return text

    def ends(self, ids: Sequence[int]) -> bool:
        """Whether new ids complete a stop string: Request.ends."""
        self.push(ids)
        return self.stopped

    def text(self, ids: Sequence[int], final: bool) -> str:
        """That of new ids, with the control tokens that a stop string names."""
        text, begin = "", 0
        for n, i in enumerate(ids):
            if i in self.named:
                text += self.decode(ids[begin:n], final=False) + self.named[i]
                begin = n
        return text + self.decode(ids[begin:], final)

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
        tails = [ids[-n:] for n in range(8, 12)]
        whole = (each for each in tails if not self.tokenizer.decode(each).startswith("\ufffd"))
        return next(whole, tails[0])


class StreamPrinter(Printer):
    """A Printer that leaves out what is not for the user."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]):
        super().__init__(tokenizer, prompt)
        self.stream = TextStream(tokenizer, prompt)

    def __call__(self, number: int, ids: list[int], final: bool = False) -> None:
        self.times.append(time.perf_counter())
        print(self.stream.push(ids, final), end="", flush=True)


class Channels:
    """What gpt-oss says is in channels, <|channel|>NAME<|message|>TEXT, of which the one named
    final is for the user. Other models have none."""

    def __init__(self, tokenizer: Tokenizer, special: dict[str, int]) -> None:
        self.tokenizer = tokenizer
        self.marks = [special.get(f"<|{name}|>") for name in ("start", "channel", "message")]
        self.header: list[int] = []  # of a message, from the mark that begins it; none in its text
        self.is_shown = True

    def visible(self, ids: Sequence[int]) -> Sequence[int]:
        """Those of the next ids that are for the user."""
        start, channel, message = self.marks
        if None in self.marks:
            return ids
        visible = []
        for i in ids:
            if i in (start, channel):
                self.header = [i]
            elif i == message:
                name = self.tokenizer.decode(self.header).split()[:1]
                self.is_shown = name == ["final"] or channel not in self.header
                self.header = []
            elif self.header:
                self.header.append(i)
            elif self.is_shown:
                visible.append(i)
        return visible


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text are the start of a stop string, not all of it."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
