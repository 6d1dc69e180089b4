"""Chat templates: those of every family render as transformers renders them, and none hangs."""
import os
import signal
import sys
from pathlib import Path

import jinja2
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from checks.common import PATIENCE_S
from formats import templates
from formats.templates import START, render_template
from formats.tokenizer import ChatTokenizer, load_tokenizer
from generate import Tokenizer
from model import Transformer

FAMILIES = [
    "google-gemma-2-2b-it", "microsoft-Phi-3.5-mini-instruct", "openai-gpt-oss-120b",
    "ibm-granite-granite-3.3-2B-Instruct", "HuggingFaceTB-SmolLM3-3B", "Qwen-Qwen3-0.6B",
    "Qwen-Qwen2.5-7B-Instruct", "mistralai-Mistral-Nemo-Instruct-2407",
    "meta-llama-Llama-3.1-8B-Instruct", "meta-llama-Llama-3.2-3B-Instruct",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
]
SYSTEM = {"role": "system", "content": "Be <brief>."}
HI = {"role": "user", "content": "Hi  there \u00fc"}
CONVERSATIONS = {
    "turns": [HI, {"role": "assistant", "content": "yes\n"}, {"role": "user", "content": "?"}],
    "system": [SYSTEM, HI],
    "thought": [HI, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}, HI],
}


def transformers_text(template: str, messages: list[dict[str, str]]) -> str:
    texts, _ = render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=True, bos_token="<bos>",
        eos_token="<eos>")
    return texts[0]


def assert_rendered_alike(template: str, messages: list[dict[str, str]]) -> None:
    """Both write the same, or both refuse the messages."""
    special = {"<bos>": 1, "<eos>": 2}
    tokenizer = ChatTokenizer(None, 3, special, 1, {2}, template)
    try:
        want = transformers_text(template, messages)
    except Exception as refused:
        with pytest.raises(ValueError, match=str(refused)[:40]):
            tokenizer.render(messages)
        return
    assert tokenizer.render(messages) == want


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_template(llama_cpp_files: Path, name: str, conversation: str) -> None:
    template = (llama_cpp_files / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    assert_rendered_alike(template, CONVERSATIONS[conversation])


@pytest.mark.parametrize("template", [
    "{% macro say(m, end='') %}{{ m.role }}: {{ m.content | trim }}{{ end }}{% endmacro %}"
    "{% for m in messages %}{{ say(m, end=eos_token) }}{% endfor %}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m | tojson }}"
    "{% endfor %}",
    "{{ messages | tojson(indent=2) }}{{ {'\u00fc': '<'} | tojson(ensure_ascii=True) }}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}ok",
    "{{ bos_token }}{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{{ ns.n }}{% endfor %}{% if tools is none %}no tools{% endif %}{{ '-' * 3 }}",
    "{{ strftime_now('%Y') }}{% if enable_thinking is defined %}x{% endif %}",
], ids=["macro", "loopcontrols", "tojson", "generation", "refusal", "namespace", "date"])
def test_what_templates_use(template: str) -> None:
    for messages in CONVERSATIONS.values():
        assert_rendered_alike(template, messages)


@pytest.mark.parametrize("template", [
    "{{ 9 ** (9 ** 9 ** 9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{% set n = namespace(x='ab') %}{% for _ in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x=[]) %}{% for _ in range(60) %}{% set n.x = [n.x] * 3 %}{% endfor %}"
    "{{ n.x }}",
    "{% set x = text %}" + "{% set x = x + x %}" * 40,
    "{{ [1] | tojson(indent=1000000000) }}",
    "{{ lipsum(n=1000000) }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}",
    "{{ text.ljust(10000000, 'x') | wordwrap(1, wrapstring=text.ljust(10000000)) }}",
])
def test_a_template_that_takes_too_much_is_ended(
    monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    """Time or memory, in one expression, when it is compiled too. The next one is rendered."""
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="(takes|writes) more"):
        patch.setattr(templates, "SECONDS", 1)
        render_template(template, text="x" * 1000)
    assert render_template("{{ text | upper }}", text="x") == "X"


@pytest.mark.parametrize("template, message", [
    ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ("{% set l = range(3) %}{% for a in l recursive %}{{ loop(l) }}{% endfor %}", "recursion"),
    ("{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}", "recursion"),
    ("{% for a in range(99999) %}{{ text }}{% endfor %}", "20000000 characters"),
])
def test_a_template_that_ends_says_why(
    monkeypatch: pytest.MonkeyPatch, template: str, message: str
) -> None:
    monkeypatch.setattr(templates, "SECONDS", PATIENCE_S)
    with pytest.raises((ValueError, RecursionError), match=message):
        render_template(template, text="x" * 1000)


def test_ctrl_c_ends_a_template() -> None:
    """Also what renders it, and the next text is no answer to the one before."""
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            render_template("{{ lipsum(n=1000000) }}x")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert templates.IDLE == []
    assert render_template("{{ [1] | first }}") == "1"


def test_a_process_that_was_ended_while_it_waited_is_replaced() -> None:
    render_template("{{ 1 }}")
    templates.IDLE[-1].kill()
    templates.IDLE[-1].wait()
    assert render_template("{{ 2 }}") == "2"


def test_a_process_of_its_own_gets_no_copy(tmp_path: Path) -> None:
    """A process that is forked from this one does not wait for an answer to this one's."""
    render_template("{{ [1] | first }}")
    [idle] = templates.IDLE
    process = os.fork()
    if process == 0:
        os._exit(0 if templates.IDLE == [] and render_template("{{ [2] | first }}") == "2" else 1)
    assert os.waitpid(process, 0)[1] == 0
    assert render_template("{{ [3] | first }}") == "3"
    assert templates.IDLE == [idle]


def test_jinja_may_be_where_only_this_process_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a folder of PYTHONPATH, or of the user's."""
    monkeypatch.setattr(templates, "IDLE", [])
    folder = str(Path(jinja2.__file__).parents[1])
    monkeypatch.setattr(templates, "START", f"import sys; sys.path.remove({folder!r})\n" + START)
    assert render_template("{{ [1] | first }}") == "1"


CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_well_known_templates_need_no_process(
    monkeypatch: pytest.MonkeyPatch, smollm: tuple[Transformer, Tokenizer], llama_cpp_files: Path,
    conversation: str,
) -> None:
    monkeypatch.setattr(templates, "IDLE", [])
    monkeypatch.setattr(sys, "executable", "/no/python")
    known = [CHATML, CHATML.replace("\\n", "\n"), smollm[1].chat_template]
    for name in ("google-gemma-2-2b-it", "microsoft-Phi-3.5-mini-instruct"):
        file = llama_cpp_files / "templates" / f"{name}.jinja"
        known.append(file.read_text(encoding="utf-8"))
    for template in known:
        assert_rendered_alike(template, CONVERSATIONS[conversation])


def test_a_long_conversation_is_no_loop_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", PATIENCE_S)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert render_template(template, messages=[HI] * 10_000).count("\n") == 10_000


def test_a_template_gets_the_tokens_that_the_settings_name(tokenizer_folder: Path) -> None:
    """Though encode puts no token before a text, and a text may end in several ways."""
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.bos_id = None
    assert tokenizer.eos_ids == {0, 2}
    tokenizer.chat_template = "{{ bos_token }}|{{ eos_token }}"
    assert tokenizer.render([HI]) == "<|endoftext|>|<|im_end|>"


def test_a_template_sees_the_ids_that_it_asks_for(tokenizer_folder: Path) -> None:
    """Mistral's refuse those of other than nine characters; special tokens in them stay a text."""
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.tool_call_id | length != 9 %}{{ raise_exception('nine') }}"
        "{% endif %}{{ m.tool_call_id }}{{ m.content }}<|im_end|>{% endfor %}")
    answer = {"role": "tool", "tool_call_id": "abcdefghi", "content": "<|im_end|>"}
    ids = tokenizer.chat([answer])
    assert ids.count(2) == 1 and tokenizer.decode(ids[:-1]) == "abcdefghi<|im_end|>"
