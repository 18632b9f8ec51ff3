r"""P-ALIGN on one problem, in one page of plain transformers (arXiv 2601.10064).

    python -m kit.walkthrough

goes from a teacher's trace to a training step and prints what every step makes, on a CPU, without a
network. Read `main` from top to bottom; the functions below it are the details of its steps.

No module imports this page. It leaves out what makes the kit longer: a KV cache that all
verdicts of a trace share, batches, other backends, resuming, and answers that would hang a grader.
Each step names the module that has all of that; tests/test_walkthrough.py compares the two.
"""

import json
import re
from typing import Any

import torch
from math_verify import parse, verify
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from kit.models import hf_folder
from kit.synthetic import generate, wander

# The log-odds from which a prefix counts as sufficient: 0 by default. At 0 this small student
# finds everything sufficient and would keep one sentence. The threshold here and the problem were
# chosen so that both labels occur: they show the search, not that so small a judge is any good.
THRESHOLD = 1.45

INSTRUCTION = """\
Solve the problem in a sentence or two and end with the answer in a box. For example: \
Tom has 3 apples and buys 4. He then has 3 + 4 = 7 apples. The answer is \\boxed{7}."""

JUDGE = """\
Below are a problem and the first part of a worked solution. Decide whether this part already \
holds every idea and intermediate result that is needed, so that what is left to reach the final \
answer is routine. Reply [ENOUGH] if it does and [NOT_ENOUGH] if an essential step is still \
missing. Reply with the label only.

Problem:
{question}

First part of the solution:
{prefix}"""

DRAFT = """\
{instruction}
{question}

Here is the beginning of a solution. Take up the thread where it stops, do not repeat it, and \
carry it through to the final answer inside \\boxed{{}}.

{prefix}"""


def main() -> None:
    """Take one problem through the method and print every step."""
    # The packaged GGUF is dequantized once into a folder that transformers reads: the one thing
    # borrowed from the kit besides its data. Any instruct model's folder works here.
    folder = hf_folder("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    # 1. A problem with its gold answer, and a teacher's long trace. (kit/pipeline/teach.py)
    problem = generate(1, seed=10, steps=(1, 1), largest=10)[0]
    trace = wander(problem, wordiness=0.5, seed=0)
    print("\n=== 1. A problem and a teacher's trace ===\n")
    print(problem.question, f"Gold answer: {problem.answer}", trace, sep="\n\n")

    # 2. Its sentences, without losing a character, so that a prefix is an exact slice.
    #    Boundary k comes after the first k of m sentences. (kit/judging/sentences.py)
    sentences = re.findall(r'(?s).+?[.?!]"?(?:\s+|$)', trace)
    assert "".join(sentences) == trace
    print("\n=== 2. Its sentences ===\n")
    for k, sentence in enumerate(sentences, 1):
        print(f"{k:3}  {sentence.strip()}")

    # 3. The student, untrained, judges prefixes. Binary search for the shortest sufficient one:
    #    ENOUGH moves left, NOT_ENOUGH moves right. (kit/judging/search.py, judge.py)
    print("\n=== 3. Verdicts ===\n")
    kept = search(student, tokenizer, problem.question, sentences)

    # 4. The cut. Had no prefix been sufficient, the whole trace would stay.
    prefix = "".join(sentences[:kept])
    print(f"\n=== 4. The kept prefix: {kept} of {len(sentences)} sentences ===\n")
    print(prefix)

    # 5. The student continues. The prefix is a draft inside the user turn, not the beginning of
    #    the student's own answer. (kit/pipeline/align.py)
    print("\n=== 5. What the student is asked to continue ===\n")
    draft = DRAFT.format(instruction=INSTRUCTION, question=problem.question, prefix=prefix)
    print(draft)

    # 6. Only a right continuation becomes training data (Eq. 9): it must box an answer, and
    #    math-verify must find it equal to the gold answer. (kit/grading/answers.py)
    print("\n=== 6. Its continuations, graded ===\n")
    right = grade(sample(student, tokenizer, draft), problem.answer)
    if not right:
        print("None is correct: the problem is dropped from the training data.")
        return

    # 7. The training row. The tags around the prefix are plain text. (kit/prompts.py)
    print("\n=== 7. The training row ===\n")
    target = f"<Begin_of_Prefix>{prefix}<End_of_Prefix>\n{right[0]}"
    row = {"instruction": INSTRUCTION, "input": problem.question, "output": target}
    print(json.dumps(row, indent=2))

    # 8. One LoRA step on that row. (kit/training)
    print("\n=== 8. One step of LoRA ===\n")
    train(student, tokenizer, row)


def search(student: Any, tokenizer: Any, question: str, sentences: list[str]) -> int:
    """How many sentences the shortest prefix has that a binary search finds sufficient."""
    low = 1
    high = len(sentences)
    kept = high
    while low <= high:
        k = (low + high) // 2
        prompt = JUDGE.format(question=question, prefix="".join(sentences[:k]))
        margin = log_odds(student, tokenizer, prompt)
        if margin >= THRESHOLD:
            label = "ENOUGH"
            kept = k
            high = k - 1
        else:
            label = "NOT_ENOUGH"
            low = k + 1
        print(f"first {k} of {len(sentences)} sentences: log-odds {margin:+.4f} -> {label}")
    return kept


def prompt_ids(tokenizer: Any, user: str) -> list[int]:
    """A user turn in the model's chat template, up to where the assistant begins."""
    turns = [{"role": "user", "content": user}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]


def log_odds(student: Any, tokenizer: Any, prompt: str) -> float:
    """A verdict's margin: log-odds of [ENOUGH] against [NOT_ENOUGH] where their tokens part.

    Paper: up to 256 tokens are generated and searched for a label. Here: one forward pass.
    """
    enough = tokenizer.encode("[ENOUGH]")
    not_enough = tokenizer.encode("[NOT_ENOUGH]")

    # Both begin with "[". The first token that differs decides.
    common = 0
    while enough[common] == not_enough[common]:
        common += 1
    ids = prompt_ids(tokenizer, prompt) + enough[:common]
    with torch.no_grad():
        logits = student(torch.tensor([ids])).logits[0, -1]
    return (logits[enough[common]] - logits[not_enough[common]]).item()


def sample(student: Any, tokenizer: Any, prompt: str) -> list[str]:
    """Continuations, with the paper's temperature, top-p and penalty; it allows 32,768 tokens."""
    ids = prompt_ids(tokenizer, prompt)
    torch.manual_seed(0)
    sequences = student.generate(
        torch.tensor([ids]),
        num_return_sequences=8,
        do_sample=True,
        temperature=0.6,
        top_p=0.9,
        repetition_penalty=1.05,
        max_new_tokens=64,
    )
    return tokenizer.batch_decode(sequences[:, len(ids) :], skip_special_tokens=True)


def grade(texts: list[str], gold: str) -> list[str]:
    """The texts whose boxed answer is the gold answer."""
    right = []
    for text in texts:
        is_right = "\\boxed" in text and verify(parse(gold), parse(text))
        print("correct:" if is_right else "wrong:  ", repr(text))
        if is_right:
            right.append(text)
    return right


def train(student: Any, tokenizer: Any, row: dict[str, str]) -> None:
    """One optimizer step on one row, with its loss before and after."""
    lora = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(student, lora)
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-3, weight_decay=0)
    before = target_loss(adapted, tokenizer, row)
    before.backward()
    optimizer.step()
    after = target_loss(adapted, tokenizer, row)
    print(f"loss before {before:.4f}, after {after:.4f}")


def target_loss(model: Any, tokenizer: Any, row: dict[str, str]) -> torch.Tensor:
    """Eq. 2: mean negative log-likelihood of the target's tokens; -100 masks the prompt's."""
    prompt = prompt_ids(tokenizer, f"{row['instruction']}\n{row['input']}")
    target = [*tokenizer.encode(row["output"]), tokenizer.eos_token_id]
    labels = [-100] * len(prompt) + target
    return model(torch.tensor([prompt + target]), labels=torch.tensor([labels])).loss


if __name__ == "__main__":
    main()
