"""Chat templates: those of every family render as transformers renders them, and none hangs."""
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from formats.templates import MAX_STEPS, render_template
from formats.tokenizer import ChatTokenizer, load_tokenizer

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


@pytest.mark.parametrize("template, message", [
    ("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", "steps"),
    ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ("{% set l = range(3) %}{% for a in l recursive %}{{ loop(l) }}{% endfor %}", "recursion"),
    ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}",
     "steps"),
    ("{% for a in range(99999) %}{{ text }}{% endfor %}", "20000000 characters"),
    ("{{ 'ab' * 1000000000 }}", "characters at once"),
    ("{{ 9 ** 9 ** 9 }}", "power"),
])
def test_a_template_that_never_ends_is_ended(template: str, message: str) -> None:
    with pytest.raises((ValueError, RecursionError), match=message):
        render_template(template, text="x" * 1000)


def test_a_long_conversation_is_no_loop_for_ever() -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    text = render_template(template, messages=[HI] * 10_000)
    assert text.count("\n") == 10_000 < MAX_STEPS


def test_a_template_gets_the_tokens_that_the_settings_name(tokenizer_folder: Path) -> None:
    """Though encode puts no token before a text, and a text may end in several ways."""
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.bos_id = None
    assert tokenizer.eos_ids == {0, 2}
    tokenizer.chat_template = "{{ bos_token }}|{{ eos_token }}"
    assert tokenizer.render([HI]) == "<|endoftext|>|<|im_end|>"
