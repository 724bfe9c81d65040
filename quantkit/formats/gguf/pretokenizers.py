"""Which of llama.cpp's pre-tokenizers splits text as a byte-level BPE's own rules do.

llama.cpp has the splitting rules compiled in, under names; a GGUF only names them
(``tokenizer.ggml.pre``), and the wrong name silently gives other tokens.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import ConversionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n"
    "🚀 (normal) 😶\u200d🌫\ufe0f (multiple emojis concatenated) "
    "✅ 🦙🦙 "
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 "
    "កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天\uff5e "
    "------======= нещо на Български "
    "''''''```````\"\"\"\"......!!!!!!?????? "
    "I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, "
    "'D you like some tea? We'Ve a'lL"
)
"""The text by whose token ids llama.cpp's converter recognizes a tokenizer."""

_BY_PROBE = {
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",
    "0fe1cf6eda062318a1af7270f3331a85c539a01778ff948e24388e949c5282f4": "gpt-2",
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",
    "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e": "tekken",
    "049ecf7629871e3041641907f3de7c733e4dbfdc736f57d882ba0b0845599754": "deepseek-llm",
    "347715f544604f9118bb75ed199f68779f423cabb20db6de6f31b908d04d7821": "deepseek-coder",
    "877081d19cf6996e2c4ff0e1236341e9b7bde288f5311a56a937f0afbbb3aeb5": "deepseek-v3",
    "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",
    "9d032fcbd5501f4a38150912590928bfb36091efb5df11b8e2124b0390e3fb1e": "falcon3",
    "35d91631860c815f952d711435f48d356ebac988362536bed955d43bfa436e34": "starcoder",
    "6221ad2852e85ce96f791f476e0b390cf9b474c9e3d1362f53a24a06dc8220ff": "refact",
    "c136ed14d01c2745d4f60a9596ae66800e2b61fa45643e72436041855ad4089d": "smaug-bpe",
    "c7ea5862a53e4272c035c8238367063e2b270d51faa48c0f09e9d5b54746c360": "poro-chat",
    "7fc505bd3104ca1083b150b17d088b59534ede9bde81f0dd2090967d7fe52cee": "viking",
    "32d85c31273f8019248f2559fed492d929ea28b17e51d81d3bb36fff23ca72b3": "stablelm2",
    "1431a23e583c97432bc230bff598d103ddb5a1f89960c8f1d1051aaa944d0b35": "minerva-7b",
    "ad851be1dba641f2e3711822f816db2c265f788b37c63b4e1aeacb9ee92de8eb": "gigachat",
    "d4c8f286ea6b520b3d495c4455483cfa2302c0cfcd4be05d781b6a8a0a7cdaf1": "megrez",
    "ccc2ef013c104be7bae2965776d611e1d7a8a2a9c547dd93a682c9a9fc80352e": "gpt-4o",
    "d353350c764d8c3b39c763113960e4fb4919bea5fbf208a0e3b22e8469dc7406": "llama4",
    "d5f1dd6f980fec569fb218a81a7658ac45fc56b38c5a0adeb1c232fbe04ef5ec": "seed-coder",
    "a1e163ecab2e718a4c829d1148b6e86824ec36163bb71941c3dca9cd5ac25756": "mellum",
    "1994ffd01900cfb37395608534236ecd63f2bd5995d6cb1004dda1af50240f15": "trillion",
    "b0a6b1c0bd5998ebd9df08611efde34a4ff03faed45ae09c43e6b31ebd4b94cf": "a.x-4.0",
    "f6791d196f87ce6b56a7d234be618e0d58f8cda3549416635b2bebcd22cd95c4": "midm-2.0",
    "4a2e2abae11ca2b86d570fc5b44be4d5eb5e72cc8f22dd136a94b37da83ab665": "kormo",
    "36f3066e97b7f3994b379aaacde306c1444c6ae84e81a5ae3cd2b7ed3b8c42d4": "minicpm5",
    "9c2227e4dd922002fb81bde4fc02b0483ca4f12911410dee2255e4987644e3f8": "command-r",
}
"""sha256 of the probe's ids, of tokenizers that models of our architectures use: the answers of
llama.cpp's convert_hf_to_gguf.py (``get_vocab_base_pre``)."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA_3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN_2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_GPT_2 = "ByteLevel"
_DIGITS = "Digits"

_BY_RULES = {
    (_GPT_2,): "gpt-2",
    (_DIGITS, _GPT_2): "smollm",
    (_QWEN_2,): "qwen2",
    (_LLAMA_3,): "smaug-bpe",
    (_LLAMA_3, "ignore_merges"): "llama-bpe",
}
"""The same for a tokenizer trained anew with well-known rules, which no probe can know."""


def detect(tokenizer: PreTrainedTokenizerBase, description: dict[str, Any], where: Path) -> str:
    """llama.cpp's name for the rules of ``tokenizer``; ``description`` is its tokenizer.json.

    Raise ConversionError where llama.cpp has no such rules, as far as is known here.
    """
    ids = tokenizer.encode(_PROBE)
    known = _BY_PROBE.get(hashlib.sha256(str(ids).encode()).hexdigest())
    name = known or _BY_RULES.get(_rules(description))
    if name is None:
        raise ConversionError(
            f"gguf: {where}: llama.cpp has no known pre-tokenizer that splits text as this one "
            f"does ({description.get('pre_tokenizer')}); known are "
            f"{', '.join(sorted({*_BY_PROBE.values(), *_BY_RULES.values()}))}"
        )
    return name


def _rules(description: dict[str, Any]) -> tuple[str, ...]:
    """The steps of a tokenizer.json's pre-tokenizer, each as one comparable string."""
    top = description.get("pre_tokenizer") or {}
    steps = [_rule(step) for step in top.get("pretokenizers", [top])]
    if description["model"].get("ignore_merges"):
        steps.append("ignore_merges")
    return tuple(step for step in steps if step)


def _rule(step: dict[str, Any]) -> str:
    kind = step.get("type")
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return str(step["pattern"].get("Regex"))
    if kind == "Digits" and step["individual_digits"]:
        return _DIGITS
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return _GPT_2 if step.get("use_regex", True) else ""
    return f"unknown: {kind}"
