"""Run by test_exactness.py under torchrun: writes what each rank's engine returned to rank<N>.json."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from meshlm import InferenceConfig, InferenceEngine

folder = Path(sys.argv[1])
task = json.loads((folder / "task.json").read_text())
prompts, params = task["prompts"], task["params"]


def report_of(engine: InferenceEngine) -> dict[str, Any]:
    report: dict[str, Any] = {}
    try:
        engine.generate([prompts[0], [task["vocab_size"]]], params, progress=False)
    except ValueError as error:
        report["error"] = str(error)
    report["generated"] = [output.token_ids for output in engine.generate(prompts, params, progress=False)]

    latest = {output.index: output for output in engine.stream(prompts[2:4], params)}
    report["streamed"] = [latest[index].token_ids for index in sorted(latest)]
    for _ in engine.stream(prompts[1], params):
        break  # aborts it

    ids = [engine.add_request(prompt, params) for prompt in prompts[4:6]]
    finished = {}
    while engine.has_unfinished():
        finished |= {output.request_id: output.token_ids for output in engine.step() if output.finished}
        if len(ids) == 2:
            ids.append(engine.add_request(prompts[6], params))
    report["stepped"] = [finished[request_id] for request_id in ids]
    report["ids"] = ids
    report["scored"] = [output.logprob for output in engine.score(prompts[2:6], progress=False)]
    report["embedded"] = [output.embedding for output in engine.embed(prompts[4:6], "last", True, progress=False)]
    try:
        engine.score([prompts[4], []], progress=False)
    except ValueError as error:
        report["score_error"] = str(error)
    engine.check()
    report["replicas"] = [asdict(replica) for replica in engine.stats().replicas]
    report["mesh"] = engine.describe_mesh()
    return report


def more_of(engine: InferenceEngine) -> dict[str, Any]:
    """What is decoded in other ways than step by step, or with a caller's own code."""
    report: dict[str, Any] = {}
    shaped = params | {"logits_processors": [lambda prompt, output, logits: logits + 0.0]}
    report["shaped"] = [output.token_ids for output in engine.generate(prompts[1:3], shaped, progress=False)]
    engine.enable_spec_decoding("ngram")
    report["speculated"] = [output.token_ids for output in engine.generate(prompts[1:4], params, progress=False)]
    engine.enable_spec_decoding(
        {"method": "draft_model", "model": task["model"], "num_speculative_tokens": 2, "adaptive": False}
    )
    report["drafted"] = [output.token_ids for output in engine.generate(prompts[4:6], params, progress=False)]
    report["speculative"] = str(engine.speculative)
    try:
        engine.enable_spec_decoding("eagle")
    except ValueError as error:
        report["refused"] = str(error)
    engine.disable_spec_decoding()
    report["stopped"] = engine.speculative
    report["num_accepted"] = engine.stats().num_accepted
    engine.check()
    return report


reports = []
for number, config in enumerate(task["configs"]):
    with InferenceEngine(task["model"], InferenceConfig(**config)) as engine:
        reports.append(report_of(engine))
        if number == 0:
            more = more_of(engine)

(folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps([*reports, more]))
