"""Answers to prompts behind a made-up ledger."""

from __future__ import annotations

from quantkit.ledger.prompt_drift import AnswerPair, PromptDrift, PromptGroup

PROMPTS = 40
PROTOCOL = {
    "prompts": PROMPTS,
    "prompts_sha256": "ef" * 32,
    "chat_template_sha256": "12" * 32,
    "decoding": "greedy",
    "max_answer_tokens": 128,
    "end_ids": [2],
    "metrics_version": 2,
}


def drift(kld: float) -> PromptDrift:
    """Two categories; the less alike, the more the variant diverges."""
    shares = (("support", 26, 1 - 2.2 * kld**0.5), ("code", 14, 1 - 1.4 * kld**0.5))
    groups = [_group(name, n, round(share * n) / n, kld) for name, n, share in shares]
    same = sum(one.exact_match * one.n for one in groups) / PROMPTS
    pairs = [
        AnswerPair(
            id="refund-7", category="support", kld=kld * 6,
            prompt="A customer wants their money back after 40 days. What do you say?",
            common="I am sorry to hear that. Our policy allows returns within ",
            reference="30 days, so I can't refund this order.\n\nWhat I can do is to offer a "
            "repair, or a voucher over the price.",
            answer="60 days, so you will have the money back in a week.",
            first_difference=14, reference_tokens=41, tokens=27,
        ),
        AnswerPair(
            id="12", category="code", kld=kld * 3,
            prompt="Write a function that returns the n-th prime.", common="def prime(n):\n    ",
            reference="", answer="return sympy.prime(n)", first_difference=7,
            reference_tokens=7, tokens=14,
        ),
    ]  # fmt: skip
    return PromptDrift(
        overall=_group(None, PROMPTS, same, kld), categories=groups, most_different=pairs
    )


def _group(category: str | None, n: int, share: float, kld: float) -> PromptGroup:
    error = (share * (1 - share) / (n - 1)) ** 0.5
    differs = share < 1
    return PromptGroup(
        category=category, n=n, exact_match=share, exact_match_stderr=error, text_match=share,
        text_match_stderr=error, first_difference_mean=18.4 if differs else None,
        first_difference_median=11.5 if differs else None, kld_mean=kld * 0.8,
        kld_stderr=kld * 0.12, reference_tokens=64.3, tokens=63.8, reference_cut=3, cut=n // 8,
    )  # fmt: skip
