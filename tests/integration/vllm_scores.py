"""Run by vLLM's own Python: the log-probabilities that it gives to the tokens of texts.

``python -I vllm_scores.py JOBS RESULTS``: JOBS is JSON, token ids of several ``texts``, and by the
paths of ``models`` vLLM's options. A line of JSON for each is written to RESULTS. Each has its own
process, forked from one that has imported vLLM, so that what ends with an error or a signal ends
alone.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # -I leaves it out
from vllm_stand_ins import stand_in

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # As quantkit serves: activations stay as they are.
    "VLLM_CPU_INT4_W4A8": "0",
}
_PATIENCE = 300


def _scores(model: str, options: dict[str, Any], texts: list[list[int]]) -> list[list[float]]:
    """Of each text, the log-probability of every token but the first."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=8,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
        **options,
    )
    asked = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    answers = llm.generate([{"prompt_token_ids": ids} for ids in texts], asked, use_tqdm=False)
    return [
        [
            found[token].logprob
            for token, found in zip(ids[1:], one.prompt_logprobs[1:], strict=True)
        ]
        for ids, one in zip(texts, answers, strict=True)
    ]


def _one(model: str, options: dict[str, Any], texts: list[list[int]], answer: Any) -> None:
    log = Path(model).with_suffix(".log").open("wb")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    try:
        answer.send({"model": model, "scores": _scores(model, options, texts)})
    except BaseException as error:
        traceback.print_exc()
        said = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
        answer.send({"model": model, "error": f"{type(error).__name__}: {said}"})


def _main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text())
    # Once, for all of the children.
    import vllm.entrypoints.llm
    import vllm.v1.engine.llm_engine
    import vllm.v1.worker.cpu_worker  # noqa: F401
    from vllm.model_executor.models import registry

    stand_in()
    # Here, not in a process of its own, where nothing is stood in for.
    registry._LazyRegisteredModel.inspect_model_cls = lambda lazy: (
        registry._ModelInfo.from_model_cls(lazy.load_model_cls())
    )

    forks = multiprocessing.get_context("fork")
    with Path(sys.argv[2]).open("a") as results:
        for model, options in jobs["models"].items():
            ours, theirs = forks.Pipe(duplex=False)
            child = forks.Process(target=_one, args=(model, options, jobs["texts"], theirs))
            child.start()
            theirs.close()
            found = {"model": model, "error": f"not done after {_PATIENCE} seconds"}
            try:
                if ours.poll(_PATIENCE):
                    found = ours.recv()
            except EOFError:
                child.join()
                found["error"] = f"its process ended with {child.exitcode}"
            child.kill()
            child.join()
            results.write(json.dumps(found) + "\n")
            results.flush()


if __name__ == "__main__":
    _main()
