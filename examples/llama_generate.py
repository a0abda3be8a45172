"""Answers chat prompts with a Llama-family model whose layers and weights are divided over processes.

python examples/llama_generate.py --tp-size 2 --prompt "Why is the sky blue?"
torchrun --nproc-per-node 4 examples/llama_generate.py --tp-size 2 --pp-size 2
"""

import argparse
import os
import sys
import time
from typing import NoReturn

import meshlm
from meshlm.serving.demo_model import DemoModelError, demo_model_path

PROMPTS = ["Why is the sky blue?", "Write a haiku about the sea.", "Give me three uses for a brick."]
RANK = int(os.environ.get("RANK", "0"))  # torchrun runs this file on every rank: all get the same, rank 0 prints it


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer chat prompts with a model sharded over processes.")
    parser.error = fail  # type: ignore[method-assign]
    parser.add_argument("--model", help="directory of safetensors, or a GGUF file (default: a small demo model)")
    parser.add_argument("--tp-size", type=int, default=1, help="ranks that share each layer")
    parser.add_argument("--pp-size", type=int, default=1, help="stages that the layers are divided into")
    parser.add_argument("--dp-size", type=int, default=1, help="copies of the model")
    parser.add_argument("--dtype", default="auto", help="auto (the model's own), float32, bfloat16 or float16")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--prompt", action="append", help="a question; can be given several times")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="tokens of an answer, at most")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw among the likeliest that make up this share")
    parser.add_argument("--seed", type=int, default=0, help="of the draws, where the temperature is above 0")
    args = parser.parse_args()

    sizes = {"dp_size": args.dp_size, "pp_size": args.pp_size, "tp_size": args.tp_size}
    config = meshlm.InferenceConfig(**sizes, dtype=args.dtype, device=args.device, seed=args.seed)
    params = meshlm.SamplingParams(max_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p)
    model = args.model or demo_model_path()  # fetched once, however many ranks ask
    questions = args.prompt or PROMPTS
    print(f"loading {model} ...", flush=True)
    with meshlm.InferenceEngine(model, config) as engine:
        latest, turn, shown = {}, 0, 0
        print(f"\n> {questions[0]}", flush=True)
        # The model works on all answers at once; printed is the one whose turn it is, as it grows.
        for output in engine.stream([[{"role": "user", "content": question}] for question in questions], params):
            latest[output.index] = output
            while answer := latest.get(turn):
                print(answer.text[shown:], end="", flush=True)
                shown = len(answer.text)
                if not answer.finished:
                    break
                turn, shown = turn + 1, 0
                print(f"\n\n> {questions[turn]}" if turn < len(questions) else "\n", flush=True)
        print(engine.describe_mesh())
    print("\nanswer  prompt tokens  new tokens  TTFT (s)  tokens/s")
    for index, answer in sorted(latest.items()):
        num_new, times = len(answer.token_ids), answer.timings
        speed = f"{times.ttft_s:>8.2f}  {num_new / times.total_s:>8.1f}"
        print(f"{index + 1:>6}  {answer.num_prompt_tokens:>13}  {num_new:>10}  {speed}")
    speed = sum(len(answer.token_ids) for answer in latest.values()) / max(a.timings.total_s for a in latest.values())
    print(f"   all {speed:>43.1f}")


def fail(message: object) -> NoReturn:
    time.sleep(3 if RANK else 0)  # the mistake is every rank's: rank 0 tells, then torchrun ends the others
    print(f"llama_generate: error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    if RANK:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        main()
    except (ValueError, DemoModelError) as error:  # what a user can mend
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)
