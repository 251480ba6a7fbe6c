"""lm-evaluation-harness with a local task: its hf model on the exported checkpoint and on the prepared directory, and
its local-completions model through the server, eight requests at a time.

    pip install -c constraints.txt -e '.[transformers,evaluation,serve]'
    python -m scripts.bench.evaluation [--documents 60]

The task is of the miniature's unseen prompts: which of four answers is the likeliest. Accuracy must be the same, and
log-likelihoods as far apart as rounding makes them, which transformers shows with its products summed in another
order (float32 beside bfloat16). Those through the server must be the runner's own, every digit.
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


def write_task(directory: Path, documents: int) -> None:
    """A task of prompts with four answers each."""
    directory.mkdir()
    given = [json.loads(line) for line in (MINIATURE / "unseen.jsonl").read_text().splitlines()]
    chance = random.Random(1)
    lines = []
    for each in chance.sample(given, documents):
        others = [other["answer"] for other in given if other["kind"] == each["kind"] and other != each]
        choices = [each["answer"], *chance.sample(others, 3)]
        chance.shuffle(choices)
        lines.append({"prompt": each["prompt"], "choices": choices, "gold": choices.index(each["answer"])})
    data = directory / "data.json"
    data.write_text("\n".join(map(json.dumps, lines)) + "\n")
    (directory / "miniature.yaml").write_text(TASK.format(data=data))


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
        context = model.tokenizer.encode(document["prompt"])
        for choice in document["choices"]:
            whole = model.tokenizer.encode(document["prompt"] + choice)
            texts.append(Text(len(texts), whole, len(context)))
    found = sorted(model.scorer(texts).run(), key=lambda each: each.number)
    return [sum(score.logprob for score in each.scores) for each in found]


def evaluated(model: Any, tasks: Path) -> tuple[float, list[float], float]:
    """Accuracy, the log-likelihood of every answer, and seconds."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    start = time.perf_counter()
    found = simple_evaluate(
        model,
        tasks=["miniature"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = sorted(found["samples"]["miniature"], key=lambda each: each["doc_id"])
    scores = [float(answer[0][0]) for each in samples for answer in each["resps"]]
    return found["results"]["miniature"]["acc,none"], scores, time.perf_counter() - start


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
        write_task(work / "tasks", given.documents)
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
        own = own_scores(work / "bloom", work / "tasks")
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


if __name__ == "__main__":
    main()
