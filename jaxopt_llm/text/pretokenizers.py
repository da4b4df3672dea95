"""How byte-level BPE tokenizers cut text before they merge, by the names that GGUF files use.

A GGUF file does not hold its tokenizer's regular expressions, only a name, `tokenizer.ggml.pre`. The names
are those that llama.cpp reads (src/llama-vocab.cpp). Where it approximates an expression, because std::regex
cannot say it, this table holds the expression of the model's own tokenizer.json.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, pre_tokenizers


@dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    """Cuts text with each expression in turn: matches, and what lies between them, are pieces of their own.

    `nfc` marks models whose text is Unicode-normalised first. llama.cpp leaves that out: on text that is not
    in NFC already, this gives the ids that the model was trained on, and llama.cpp others.
    """

    splits: tuple[str, ...]
    ignore_merges: bool = False  # a piece that is a token as a whole is taken before any merge
    add_bos: bool = False  # the default where a GGUF file does not say
    nfc: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        splits = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in self.splits]
        return pre_tokenizers.Sequence(
            [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )


_TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SYMBOLS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
# A word ends where lower case turns to upper case: o200k and its relatives. `%s` is what may follow it.
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
)
_HAN = r"&&[^\p{Han}]]"
_ASCII_WORD = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
# The cased letters that the DeepSeek-LLM tokenizer lists one by one.
_CASED_LETTERS = (
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5"
    "\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b"
    "\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc"
    "\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107"
    "\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134"
    "\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787"
    "\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGITS = (r"\p{N}", GPT2)
_CL100K = _CONTRACTION + "|" + _WORD + r"|\p{N}{1,3}" + _SYMBOLS + _TAIL
_QWEN2 = _CONTRACTION + "|" + _WORD + r"|\p{N}" + _SYMBOLS + _TAIL
_QWEN35 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _TAIL
_O200K = _CASED % ((_CONTRACTION + "?",) * 2) + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _TAIL
_TEKKEN = _CASED % ("", "") + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _TAIL
_KIMI = (
    r"[\p{Han}]+|"
    + (_CASED % ((_CONTRACTION + "?",) * 2)).replace(r"\p{M}]", r"\p{M}" + _HAN)
    + r"|\p{N}{1,3}"
    + _SYMBOLS
    + _TAIL
)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    _CJK,
    _ASCII_WORD + r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*" + _TAIL,
)
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"

_ROWS: dict[str, PreTokenizer] = {
    "gpt-2 phi-2 gigachat a.x-4.0 mellum exaone4 jais trillion granite-docling": PreTokenizer(splits=(GPT2,)),
    "olmo mpt": PreTokenizer(splits=(GPT2,), nfc=True),
    "smollm starcoder refact codeshell exaone minerva-7b mellum2": PreTokenizer(splits=_DIGITS),
    "command-r": PreTokenizer(splits=_DIGITS, nfc=True),
    "falcon": PreTokenizer(splits=(r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2": PreTokenizer(
        splits=(_CL100K,), ignore_merges=True, add_bos=True
    ),
    "dbrx smaug-bpe glm4 chatglm-bpe": PreTokenizer(splits=(_CL100K,)),
    "qwen2": PreTokenizer(splits=(_QWEN2,), nfc=True),
    "stablelm2 deepseek-r1-qwen kormo megrez hunyuan solar-open grok-2": PreTokenizer(splits=(_QWEN2,)),
    "qwen35": PreTokenizer(splits=(_QWEN35,), nfc=True),
    "deepseek-v3 hunyuan-dense joyai-llm": PreTokenizer(splits=_DEEPSEEK_V3),
    "deepseek-llm": PreTokenizer(
        splits=(
            r"[\r\n]",
            rf"\s?[{_CASED_LETTERS}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _DEEPSEEK_CJK,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": PreTokenizer(splits=(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}")),
    "gpt-4o llama4 kanana2 minimax-m2": PreTokenizer(splits=(_O200K,)),
    "tekken": PreTokenizer(splits=(_TEKKEN,), ignore_merges=True, add_bos=True),
    "kimi-k2": PreTokenizer(splits=(_KIMI,)),
    "poro-chat bloom gpt3-finnish": PreTokenizer(splits=(_BLOOM,)),
    "viking": PreTokenizer(splits=(_BLOOM, r"\p{N}")),
    "bailingmoe bailingmoe2 llada-moe": PreTokenizer(
        splits=(
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
            r"|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    "seed-coder": PreTokenizer(
        splits=(_CONTRACTION + "|" + _WORD + r"|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+" + _TAIL,)
    ),
    "default": PreTokenizer(splits=(r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}
_BY_NAME = {name: row for names, row in _ROWS.items() for name in names.split()}


def by_name(name: str) -> PreTokenizer:
    """The pre-tokenizer that GGUF calls `name`; `ValueError` lists the known ones."""
    if not isinstance(name, str) or name not in _BY_NAME:
        raise ValueError(
            f"unknown pre-tokenizer tokenizer.ggml.pre={name!r}; known: {', '.join(sorted(_BY_NAME))}"
        )
    return _BY_NAME[name]


def name_of(tokenizer: Mapping[str, Any]) -> str:
    """The GGUF name of a parsed tokenizer.json's pre-tokenizer; `ValueError` if GGUF has none for it."""
    normalizers = _steps(tokenizer.get("normalizer"), "normalizers")
    splits = [
        split for step in _steps(tokenizer.get("pre_tokenizer"), "pretokenizers") for split in _splits(step)
    ]
    found = PreTokenizer(
        splits=tuple(splits),
        ignore_merges=bool(tokenizer["model"].get("ignore_merges")),
        nfc=normalizers == [{"type": "NFC"}],
    )
    for name, row in _BY_NAME.items():
        same_splits = tuple(map(_canonical, row.splits)) == tuple(map(_canonical, found.splits))
        same_rest = (row.ignore_merges, row.nfc) == (found.ignore_merges, found.nfc)
        if same_splits and same_rest and normalizers in ([], [{"type": "NFC"}]):
            return name
    raise ValueError(
        f"GGUF has no name for this pre-tokenizer ({found}, {normalizers=}), so its readers would get other "
        "ids; keep the Hugging Face or Orbax form"
    )


def _steps(component: Mapping[str, Any] | None, sequence_key: str) -> list[Mapping[str, Any]]:
    """The parts of a normalizer or pre-tokenizer as tokenizer.json writes it: none, one, or a sequence."""
    if component is None:
        return []
    if component["type"] == "Sequence":
        return [step for part in component[sequence_key] for step in _steps(part, sequence_key)]
    return [component]


def _splits(step: Mapping[str, Any]) -> list[str]:
    """The expressions one step of a tokenizer.json's pre-tokenizer splits by."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return [GPT2] if step.get("use_regex", True) else []
        case {"type": "Digits", "individual_digits": individual}:
            return [r"\p{N}" if individual else r"\p{N}+"]
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
            return [regex]
        # Taking only the matches is the same, for an expression that leaves nothing between them.
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Removed", "invert": True}:
            return [regex]
    raise ValueError(f"GGUF has no name for a pre-tokenizer with the step {dict(step)}")


def _canonical(regex: str) -> str:
    """One spelling for expressions that differ only in how they escape characters."""
    for character, escape in (("\r", r"\r"), ("\n", r"\n")):
        regex = regex.replace(character, escape)
    return regex
