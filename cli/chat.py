"""A conversation in the terminal that keeps the KV cache between turns."""
import sys
from collections.abc import Callable, Sequence

from cli.arguments import say
from formats.tokenizer import TextStream, Tokenizer

Show = Callable[[int, list[int]], None]
Reply = Callable[[list[int], int, Show], list[int]]


def chat(tokenizer: Tokenizer, reply: Reply, room: int, stop: Sequence[str] = ()) -> None:
    """Answer the lines of stdin, one turn each, until it ends; only what is new is prefilled.

    reply(ids, cached, show) generates behind the first `cached` tokens of the cache, which it
    leaves as they are: it prefills ids, calls show(row, ids) as tokens come, and returns them.
    room: the tokens that the cache holds. stop: strings that end a reply, and that reply stops at;
    they are neither printed nor part of the conversation. /clear starts a new conversation.
    ValueError where the model has no chat template or it refuses the messages."""
    full = f"the context of {room} tokens is full; /clear starts a new conversation"
    messages = []
    held = []  # the ids whose keys and values are in the cache
    say("> ", end="")
    for line in map(str.strip, sys.stdin):
        if line == "/clear":
            messages = []
            held = []
        elif line:
            turn = [*messages, {"role": "user", "content": line}]
            ids = tokenizer.chat(turn)
            left = room - len(ids)
            if left < 1:
                say(full)
            else:
                # at least one token is fed, for its logits
                cached = min(common_prefix(ids, held), len(ids) - 1)
                answer = show_reply(tokenizer, reply, ids, cached, stop)
                content = TextStream(tokenizer, stop=stop).push(answer, final=True)
                messages = [*turn, {"role": "assistant", "content": content}]
                held = ids + answer[:-1]  # the last token was never fed back
                if len(answer) == left and answer[-1] not in tokenizer.eos_ids:
                    say(full)
        say("> ", end="")


def show_reply(
    tokenizer: Tokenizer, reply: Reply, ids: list[int], cached: int, stop: Sequence[str]
) -> list[int]:
    """Print the reply to a conversation's ids as it comes -> its tokens."""
    text = TextStream(tokenizer, ids, stop)

    def show(row: int, new: list[int]) -> None:
        print(text.push(new), end="", flush=True)

    answer = reply(ids[cached:], cached, show)
    print(text.push([], final=True))
    return answer


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many ids two lists have in common at the start."""
    length = 0
    for x, y in zip(a, b):
        if x != y:
            break
        length += 1
    return length
