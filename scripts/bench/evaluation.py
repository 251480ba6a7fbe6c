"""lm-evaluation-harness with a local task: its hf model on the exported checkpoint and on the prepared directory, and
its local-completions model through the server, eight requests at a time.

    pip install -c constraints.txt -e '.[transformers,evaluation,serve]'
    python -m scripts.bench.evaluation [--documents 60]

The first task is of the miniature's unseen prompts: which of four answers is the likeliest. Accuracy must be the same,
and log-likelihoods as far apart as rounding makes them, which transformers shows with its products summed in another
order (float32 beside bfloat16). Those through the server must be the runner's own, every digit. The second task has
the same prompts continued: the texts through the server must be the runner's own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import runner
from runner.generation.options import Sampling
from runner.generation.scorer import Text
from scripts.bench.serving import running_server
from scripts.fakehub import checkpoint
from toolkit.commands.convert import convert
from toolkit.commands.export import export

SERVED = "local-completions through the server"
# Requests of lm-evaluation-harness to the server.
AT_A_TIME = 8
MINIATURE = Path(__file__).parents[2] / "miniature"
TASK = """\
task: miniature
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{gold}}}}"
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""

TEXTS = """\
task: miniature_texts
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: {tokens}
  do_sample: false
metric_list:
  - metric: exact_match
"""
# No answer of the miniature has as many tokens.
NEW_TOKENS = 110


def write_tasks(directory: Path, documents: int) -> None:
    """Two tasks of the same prompts: four answers to each, and its continuation."""
    directory.mkdir()
    given = [json.loads(line) for line in (MINIATURE / "unseen.jsonl").read_text().splitlines()]
    chance = random.Random(1)
    lines = []
    for each in chance.sample(given, documents):
        others = [other["answer"] for other in given if other["kind"] == each["kind"] and other != each]
        # Some prompts end with a space, and their answers begin without one.
        space = " " * (not each["prompt"].endswith(" "))
        choices = [each["answer"], *(space + other.lstrip() for other in chance.sample(others, 3))]
        chance.shuffle(choices)
        own = {"prompt": each["prompt"], "answer": each["answer"]}
        lines.append({**own, "choices": choices, "gold": choices.index(each["answer"])})
    data = directory / "data.json"
    data.write_text("\n".join(map(json.dumps, lines)) + "\n")
    (directory / "miniature.yaml").write_text(TASK.format(data=data))
    (directory / "miniature_texts.yaml").write_text(TEXTS.format(data=data, tokens=NEW_TOKENS))


def of_hf(model: Any, tokenizer: Any) -> Any:
    """lm-evaluation-harness's hf model."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, device="cpu")


def of_server(url: str, name: str) -> Any:
    """Its model for a server of completions, which gives the tokenizer, too."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    return LocalCompletionsAPI(
        base_url=f"{url}/v1/completions", model=name, num_concurrent=AT_A_TIME, batch_size=1, timeout=3600
    )


def own_scores(directory: Path, tasks: Path) -> list[float]:
    """The runner's own log-likelihood of every answer, summed as lm-evaluation-harness sums what a server says."""
    model = runner.load(directory)
    texts = []
    for line in (tasks / "data.json").read_text().splitlines():
        document = json.loads(line)
        # A space at the end of a prompt counts to what follows, since tokens begin with it.
        context = model.tokenizer.encode(document["prompt"].rstrip())
        for choice in document["choices"]:
            whole = model.tokenizer.encode(document["prompt"] + choice)
            texts.append(Text(len(texts), whole, len(context)))
    found = sorted(model.scorer(texts).run(), key=lambda each: each.number)
    return [sum(score.logprob for score in each.scores) for each in found]


def own_texts(directory: Path, tasks: Path) -> list[str]:
    """The runner's own continuations, up to the end of a line."""
    model = runner.load(directory)
    prompts = [json.loads(line)["prompt"] for line in (tasks / "data.json").read_text().splitlines()]
    sampling = Sampling(stop=("\n",))
    found = model.generate_all(prompts, max_new_tokens=NEW_TOKENS, sampling=sampling)
    return [model.text(each) for each in sorted(found, key=lambda each: each.index)]


def evaluated(model: Any, tasks: Path) -> tuple[float, list[float], float]:
    """Accuracy, the log-likelihood of every answer, and seconds."""
    start = time.perf_counter()
    results, samples = _run(model, tasks, "miniature")
    scores = [float(answer[0][0]) for each in samples for answer in each["resps"]]
    return results["acc,none"], scores, time.perf_counter() - start


def continued(model: Any, tasks: Path) -> tuple[float, list[str]]:
    """The share of answers that are right, and all of them."""
    results, samples = _run(model, tasks, "miniature_texts")
    return results["exact_match,none"], [each["resps"][0][0] for each in samples]


def _run(model: Any, tasks: Path, name: str) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Results and samples of a task, in the order of its documents."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model,
        tasks=[name],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    return found["results"][name], sorted(found["samples"][name], key=lambda each: each["doc_id"])


def main() -> None:
    """Print accuracies and how far log-likelihoods are apart."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from runner.integrations.transformers import BloomdeskForCausalLM

    parser = argparse.ArgumentParser(description="Evaluate the miniature with lm-evaluation-harness.")
    parser.add_argument("--documents", type=int, default=60, metavar="N")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        checkpoint.miniature(work / "source")
        convert(work / "source", work / "bloom")
        export(work / "bloom", work / "export")
        write_tasks(work / "tasks", given.documents)
        tokenizer = AutoTokenizer.from_pretrained(work / "export")
        models = {
            "hf on the export": AutoModelForCausalLM.from_pretrained(work / "export", dtype="auto"),
            "hf on BloomdeskForCausalLM": BloomdeskForCausalLM.from_prepared(work / "bloom"),
            "hf on the export in float32": AutoModelForCausalLM.from_pretrained(
                work / "export", dtype=torch.float32
            ),
        }
        found = {name: evaluated(of_hf(model, tokenizer), work / "tasks") for name, model in models.items()}
        with running_server(work / "bloom", work) as (url, _):
            found[SERVED] = evaluated(of_server(url, "bloom"), work / "tasks")
            right, texts = continued(of_server(url, "bloom"), work / "tasks")
        own, own_continued = (
            own_scores(work / "bloom", work / "tasks"),
            own_texts(work / "bloom", work / "tasks"),
        )
    reference = next(iter(found.values()))[1]
    for name, (accuracy, scores, seconds) in found.items():
        apart = sorted(abs(one - other) for one, other in zip(scores, reference, strict=True))
        print(
            f"{name}: accuracy {accuracy:.4f}, {len(scores)} log-likelihoods, {apart[len(apart) // 2]:.4f} from the "
            f"first in the median, {apart[-1]:.4f} at most; {seconds:.1f} s"
        )
    different = sum(one != other for one, other in zip(found[SERVED][1], own, strict=True))
    print(
        f"of {len(own)} log-likelihoods through the server, {different} are not the runner's own, digit for digit"
    )
    different = sum(one != other for one, other in zip(texts, own_continued, strict=True))
    print(
        f"of {len(texts)} texts through the server, {right:.1%} right, {different} are not the runner's own"
    )


if __name__ == "__main__":
    main()
