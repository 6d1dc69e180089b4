"""How text is split into words before byte-pair encoding, by the name that GGUF files give it.

The patterns are those of llama.cpp (src/llama-vocab.cpp), so that ids are the same. Its patterns of
gpt-4o and tekken are a little simpler than those that the models were trained with: capitals are
A to Z only, and combining marks are no part of a word."""
from tokenizers import Regex, pre_tokenizers

CONTRACTIONS = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def split(*patterns: str) -> pre_tokenizers.PreTokenizer:
    """Each pattern splits what those before it left, into its matches and what is between them."""
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, as_bytes])


def gpt4(digits: str, letter: str = r"\p{L}") -> str:
    """GPT-4's pattern, but for how many digits stay together, and what a word is made of."""
    return "|".join([
        CONTRACTIONS,
        rf"[^\r\n\p{{L}}\p{{N}}]?[{letter}]+",
        rf"\p{{N}}{{{digits}}}",
        rf" ?[^\s{letter}\p{{N}}]+[\r\n]*",
        SPACES,
    ])


def gpt4o(digits: str, behind_a_word: str) -> str:
    """GPT-4o's pattern, but for how many digits stay together: words split before capitals."""
    upper = r"(?:(?=\p{L})[^a-z])"
    lower = r"(?:(?=\p{L})[^A-Z])"
    return "|".join([
        rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{behind_a_word}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{behind_a_word}",
        rf"\p{{N}}{{{digits}}}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        SPACES,
    ])


RARE = ("[\u0560-\u0588\u10c7-\u10ff\u1c80-\u1c88\u2d00-\u2d2d\ua790-\uab68"
        "\U00010570-\U000105bc\U00016e40-\U0001df1e]")  # letters
CASED = rf"\s?(?:(?!{RARE})[\p{{Lu}}\p{{Ll}}\p{{Lt}}])+"
SIGNS = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3001\u3002]+"
DEEPSEEK_V3 = "|".join([
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
    r" ?[\p{P}\p{S}]+[\r\n]*",
    SPACES,
])
HAN_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
ASIAN = r"(?:(?!\s)[\u0800-\u9fa5\uac00-\ud7ff])+"

# tokenizer.ggml.pre of vocabularies in which a word that is a token is not put together from parts,
# and whose texts begin with a token, but for glm4's, unless the file says otherwise
WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2", "tekken", "glm4"}

WAYS = [
    (split(GPT2), "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 gigachat"),
    (split(r"\p{N}", GPT2), "smollm starcoder refact command-r codeshell exaone minerva-7b"),
    (split(gpt4("1,3")), "llama-bpe llama3 llama-v3 falcon3 pixtral lfm2 dbrx smaug-bpe "
                         "chatglm-bpe glm4"),
    (split(gpt4("1")), "qwen2 deepseek-r1-qwen megrez stablelm2 hunyuan"),
    (split(gpt4("1", r"\p{L}\p{M}")), "qwen35"),
    (split(gpt4o("1,3", f"(?:{CONTRACTIONS})?")), "gpt-4o llama4"),
    (split(gpt4o("1", "")), "tekken"),
    (split(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", ASIAN, r"\p{N}"), "deepseek-coder"),
    (split(r"[\r\n]", CASED, SIGNS, r"\s+$", ASIAN, r"\p{N}+"), "deepseek-llm"),
    (split(r"\p{N}{1,3}", HAN_AND_KANA, DEEPSEEK_V3), "deepseek-v3"),
]
PRE_TOKENIZERS = {name: way for way, names in WAYS for name in names.split()}
