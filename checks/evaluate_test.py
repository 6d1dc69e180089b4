"""examples/evaluate.py: log-likelihoods beside transformers', and, where lm_eval is installed, what
its harness prints beside what its own Hugging Face backend gives. (It takes half a minute and 600
MB to install, so that it is not among the tests' requirements.)"""
import json
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checks  # before Triton is imported: it says whether Triton interprets

import pytest
import torch
import transformers

from checks.common import HERE
from generate import load_tokenizer
from model import load_model

sys.path.insert(0, str(HERE / "examples"))
import evaluate
from evaluate import GptFlash

needs_harness = pytest.mark.skipif(not find_spec("lm_eval"), reason="lm_eval is not installed")
Evaluated = Callable[..., GptFlash]


@pytest.fixture(scope="module")
def hf(tiny: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


@pytest.fixture
def ours(tiny: Path) -> Evaluated:
    """ours(batch_size, ...) -> a GptFlash of the small checkpoint in float32."""

    def make(*args: Any, **options: Any) -> GptFlash:
        model = load_model(tiny, dtype=torch.float32)
        return GptFlash(model, load_tokenizer(tiny), *args, **options)

    return make


def ids(n: int, seed: int) -> list[int]:
    return torch.randint(3, 600, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def expected_score(
    hf: transformers.PreTrainedModel, context: list[int], continuation: list[int]
) -> tuple[float, bool]:
    text = torch.tensor([context + continuation])
    logp = hf(text[:, :-1]).logits[0, len(context) - 1:].log_softmax(-1)
    targets = text[0, len(context):]
    likeliest = bool((logp.argmax(-1) == targets).all())
    return logp.gather(1, targets[:, None]).sum().item(), likeliest

# --- log-likelihoods, without the harness ---


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_scores_are_those_of_whole_texts(
    ours: Evaluated, hf: transformers.PreTrainedModel, batch_size: int
) -> None:
    """Of one token or many, of contexts that are alike, begin alike, are short, or one token."""
    examples, seven = ids(50, 0), ids(7, 1)
    asked = ours(batch_size)
    contexts = [seven, examples + seven, examples + ids(9, 2), examples, ids(33, 3), [5], seven]
    pairs = [(context, ids(n, n)) for context in contexts for n in (1, 1, 2, 5, 40)]
    best = hf.generate(torch.tensor([seven]), max_new_tokens=3, do_sample=False)[0, 7:].tolist()
    pairs += [(seven, best), ([asked.prefix_token_id], [9, 9]), ([], [9, 9])]
    found = dict(asked.scores(pairs))
    assert found.keys() == set(range(len(pairs)))
    for number, pair in enumerate(pairs[:-1]):
        logp, likeliest = expected_score(hf, *pair)
        assert found[number][0] == pytest.approx(logp, abs=2e-4)
        assert found[number][1] == likeliest
    assert found[len(pairs) - 3][1]
    assert found[len(pairs) - 1] == pytest.approx(found[len(pairs) - 2])


def test_of_too_long_texts_the_end_counts(
    ours: Evaluated, hf: transformers.PreTrainedModel, capsys: pytest.CaptureFixture
) -> None:
    pairs = [(ids(40, 1), ids(10, 2)), (ids(33, 3), ids(1, 4)), (ids(9, 5), ids(32, 6))]
    found = dict(ours(2, max_length=32).scores(pairs))
    for number, (context, continuation) in enumerate(pairs):
        kept = (context + continuation)[-33:-len(continuation)]
        score, _ = expected_score(hf, kept, continuation)
        assert found[number][0] == pytest.approx(score, abs=2e-4)
    assert "3 texts are cut to their last 32 tokens" in capsys.readouterr().err
    for pair in ([5], ids(33, 1)), ([5], []):
        with pytest.raises(ValueError, match="cannot be scored in a context of 32"):
            dict(ours(2, max_length=32).scores([pair]))


def test_what_is_shared_is_read_once(ours: Evaluated, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ours(8)
    rows_read: list[tuple[int, ...]] = []
    embed = asked.model.embed

    def counted(tokens: torch.Tensor) -> torch.Tensor:
        rows_read.append(tuple(tokens.shape))
        return embed(tokens)

    monkeypatch.setattr(asked.model, "embed", counted)
    examples = ids(64, 0)
    questions = [examples + ids(10, 1 + i) for i in range(4)]
    pairs = [(question, [7 + n]) for question in questions for n in range(4)]
    dict(asked.scores(pairs))
    # of a context the last token is read with choices, which are of one token here
    assert rows_read == [(1, 64), (4, 9), (4, 1)]
    rows_read.clear()
    dict(asked.scores([(question, [7, 8 + n]) for question in questions for n in range(4)]))
    assert rows_read == [(1, 64), (4, 9), (4, 2)]
    rows_read.clear()
    dict(asked.scores([(question, [7 + n, 8]) for question in questions for n in range(4)]))
    assert rows_read == [(1, 64), (4, 9), (8, 2), (8, 2)]


def test_int8_caches_are_seen_as_in_decoding(ours: Evaluated) -> None:
    pairs = [(ids(40, 1), ids(40, 2)), ([5], ids(40, 3))]
    plain = dict(ours(2).scores(pairs))
    quantized = dict(ours(2, kv_dtype=torch.int8).scores(pairs))
    for number in plain:
        assert 1e-5 < abs(plain[number][0] - quantized[number][0]) < 0.5


def test_without_the_harness_a_sentence_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(evaluate, "cli_evaluate", None)
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["--tasks", "hellaswag"])
    assert "requirements-evaluate.txt" in capsys.readouterr().err

# --- beside the harness's own backend ---

TEXT = (HERE / "CONTRIBUTING.md").read_text()
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_text: "{text}"
"""
CHOICES = """
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: 0
metric_list:
  - metric: acc
  - metric: acc_norm
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_target: "{{line}}"
metric_list:
  - metric: bits_per_byte
"""
ANSWER = """
output_type: generate_until
doc_to_target: "{{stop}}"
generation_kwargs:
  until: ["\\n", "the", "ing"]
  max_gen_toks: 24
metric_list:
  - metric: exact_match
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Files of three tasks: choices, whole texts, answers up to a stop string."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = [line for line in TEXT.splitlines() if len(line) > 60]
    questions = [
        {"context": line[:40], "choices": [line[40:], *(other[40 + i:] for other in lines[:3])],
         "line": line, "stop": "the"} for i, line in enumerate(lines)
    ]
    data = folder / "questions.jsonl"
    data.write_text("".join(f"{json.dumps(question)}\n" for question in questions))
    files = []
    for name, text, kind in ("choices", "{{context}}", CHOICES), ("texts", "", ROLLING), (
            "answers", "{{context}}", ANSWER):
        file = folder / f"{name}.yaml"
        file.write_text(TASK.format(name=name, data=data, text=text) + kind)
        files.append(str(file))
    return files


@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness's own tasks are left out: to read their ten thousand files takes ten seconds."""
    import lm_eval.tasks
    manager = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", manager)
    monkeypatch.setattr("lm_eval.evaluator.TaskManager", manager)


@pytest.fixture(scope="module")
def backend(tiny: Path) -> Callable[..., Any]:
    """backend(**options) -> the harness's own model of the small checkpoint."""
    from lm_eval.models.huggingface import HFLM

    def make(**options: Any) -> Any:
        return HFLM(str(tiny), device="cpu", dtype="float32", **options)

    return make


@needs_harness
def test_tables_are_those_of_the_hugging_face_backend(
    ours: Evaluated, backend: Callable[..., Any], tasks: list[str], no_index: None
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.utils import make_table
    tables, answers = [], []
    for asked in ours(4, max_length=48), backend(batch_size=4, max_length=48):
        results = simple_evaluate(asked, tasks=tasks, bootstrap_iters=100)
        tables.append(make_table(results))
        answers.append([sample["resps"] for sample in results["samples"]["answers"]])
    assert tables[0] == tables[1]
    assert answers[0] == answers[1]
    assert len({str(answer) for answer in answers[0]}) > 3


@needs_harness
def test_edge_cases_are_those_of_the_hugging_face_backend(
    ours: Evaluated, backend: Callable[..., Any]
) -> None:
    """No context, spaces and tokens on the border, special tokens, too long a context."""
    pairs = [("", "word"), ("", "a"), ("The quick brown ", "fox"), ("The qu", "ick brown"),
             ("th", "e end"), ("a\n", "\n\n"), (TEXT[:300], " end"), (TEXT[:301], TEXT[301:340]),
             ("caf\u00e9 \U0001f600", " \U0001f600"), ("x" * 70, "y"), ("a b c", " d e f")]
    requests = [SimpleNamespace(args=pair, task_name="") for pair in pairs]
    texts = [SimpleNamespace(args=(text,)) for text in (TEXT[:1000], "one", "", TEXT[:41], "\n")]
    settings = [{"until": ["\n"], "max_gen_toks": 9}, {}, {"until": "e", "max_new_tokens": 31}]
    generated = [SimpleNamespace(args=(text, settings[n % 3]), task_name="")
                 for n, text in enumerate((TEXT[:60], "a", TEXT[:500], "\n", TEXT[9:90], "x y"))]
    theirs = backend(batch_size=4, max_length=64)
    mine = ours(4, max_length=64)
    settings[1] |= {"max_gen_toks": 20, "do_sample": False}
    for (logp, likeliest), other in zip(
            mine.loglikelihood(requests), theirs.loglikelihood(requests), strict=True):
        assert logp == pytest.approx(other[0], abs=2e-4)
        assert likeliest == other[1]
    for logp, other in zip(
            mine.loglikelihood_rolling(texts), theirs.loglikelihood_rolling(texts), strict=True):
        assert logp == pytest.approx(other, rel=1e-6, abs=1e-4)
    assert mine.generate_until(generated) == theirs.generate_until(generated)


@needs_harness
def test_impossible_answers_are_refused(ours: Evaluated) -> None:
    for settings in ({"max_gen_toks": 64}, {"num_beams": 4}, {"do_sample": True, "top_k": 0}):
        request = SimpleNamespace(args=("text", settings))
        with pytest.raises(ValueError):
            ours(4, max_length=64).generate_until([request])
    request = SimpleNamespace(args=("text", {"num_beams": 1, "max_gen_toks": 63}))
    ours(4, max_length=64).generate_until([request])
    with pytest.raises(ValueError, match="^0 tokens"):  # both are one token, which is the context's
        ours(4).loglikelihood([SimpleNamespace(args=("th", "e"))])


@needs_harness
def test_a_run_goes_on_where_it_was_killed(ours: Evaluated, tmp_path: Path) -> None:
    from lm_eval.api.model import CachingLM
    file = str(tmp_path / "answers.db")
    requests = [SimpleNamespace(args=(TEXT[i:i + 9], TEXT[i + 9:i + 14])) for i in range(40)]
    whole = ours(4).loglikelihood(requests)
    asked = ours(4)
    judge = asked.score
    batches = []

    def killed(rows: list[Any], *others: Any) -> list[Any]:
        batches.append(len(rows))
        if len(batches) == 4:
            raise KeyboardInterrupt
        return judge(rows, *others)

    asked.score = killed
    with pytest.raises(KeyboardInterrupt):
        CachingLM(asked, file).loglikelihood(requests)
    found = CachingLM(asked, file).loglikelihood(requests)
    assert [score[0] for score in found] == pytest.approx([score[0] for score in whole])
    assert sum(batches[4:]) == 40 - sum(batches[:3])


@needs_harness
def test_the_command_prints_and_stores_what_the_harness_does(
    tiny: Path, tasks: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, no_index: None
) -> None:
    words = ["--checkpoint_path", str(tiny), "--quantize", "int4", "--kv_dtype", "int8"]
    words += ["--device", "cpu", "--limit", "3", "--use_cache", str(tmp_path / "cache")]
    evaluate.main([*words, "--tasks", ",".join(tasks), "--output_path", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert all(f"|{name}" in out for name in ("choices", "texts", "answers", "acc"))
    [file] = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(file.read_text())["results"]["choices"]["acc,none"] >= 0
    assert len(list(tmp_path.glob("cache_*.db"))) == 1
    broken = tmp_path / "broken.yaml"
    broken.write_text("task: [\nx: y")
    for more, said in [
        (["--tasks", "no_such_task"], "Tasks not found: no_such_task"),
        (["--tasks", tasks[0], "--limit", "some"], "invalid float value: 'some'"),
        (["--tasks", tasks[2], "--max_length", "24"], "no text can be made with"),
        (["--tasks", tasks[0], "--apply_chat_template"], "chat template"),
        (["--tasks", str(broken)], "while parsing"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            evaluate.main([*words, *more])
        assert said in capsys.readouterr().err.splitlines()[-1]
