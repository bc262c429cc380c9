"""What no task of lmms-eval scores: likelihoods, and how far a student is from its LM on text.

    python measure.py real/measured real/pair/lm STUDENT OUT.json

writes task → document → score, all in nats a token and negative, so that more is better:

    answer_likelihood    of the right answers to held-out lines and crops, with their pictures
    wikitext             of paragraphs of WikiText-2's test part (its perplexity is exp(-mean))
    nearness_to_lm       minus KL(LM ‖ student) at every position of these paragraphs
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from ldistill.evaluation.items import load_items
from ldistill.evaluation.scorer import load_scorer

MOST = 256  # tokens of a paragraph


@torch.no_grad()
def main(data: Path, lm_folder: str, student: str, out: Path) -> None:
    scorer = load_scorer(student, device=torch.device("cpu"))
    lm = AutoModelForCausalLM.from_pretrained(lm_folder, dtype=torch.float32).eval()
    decoder = scorer.model.causal_lm()
    scores: dict[str, dict[str, float]] = {}
    for number, item in enumerate(load_items(data / "answers.jsonl")):
        [(total, _)] = scorer.log_likelihoods([(item.question(), item.answer)])
        count = len(scorer.tokenizer(item.answer, add_special_tokens=False)["input_ids"])
        scores.setdefault("answer_likelihood", {})[str(number)] = total / count
    for number, text in enumerate(json.loads((data / "texts.json").read_text(encoding="utf-8"))):
        ids = torch.tensor([scorer.tokenizer(text)["input_ids"][:MOST]])
        own = decoder(ids).logits[0, :-1, : lm.config.vocab_size].float().log_softmax(-1)
        theirs = lm(ids).logits[0, :-1].float().log_softmax(-1)
        likelihood = own.gather(1, ids[0, 1:, None]).mean()
        kl = (theirs.exp() * (theirs - own)).sum(-1).mean()
        scores.setdefault("wikitext", {})[str(number)] = float(likelihood)
        scores.setdefault("nearness_to_lm", {})[str(number)] = -float(kl)
    out.write_text(json.dumps(scores), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]))
