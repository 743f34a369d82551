"""The scores of the tasks, in per cent: accuracy, ROUGE (rouge-score), BLEU (sacrebleu)."""

from collections.abc import Sequence

from .romanian import normalise


def _need(package: str):
    raise RuntimeError(f"{package} is missing: pip install 'pelt_fast[train]'") from None


def accuracy(predicted: Sequence[int], labels: Sequence[int]) -> float:
    """Share of equal entries."""
    right = sum(int(p) == int(y) for p, y in zip(predicted, labels, strict=True))
    return 100 * right / len(labels)


def rouge(predicted: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L with stemming, means over rows; each summary is one
    sentence, so ROUGE-L and ROUGE-LSum are one number."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        _need("rouge-score")
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(kinds, use_stemmer=True)
    rows = [scorer.score(y, p) for p, y in zip(predicted, references, strict=True)]
    return {kind: 100 * sum(row[kind].fmeasure for row in rows) / len(rows) for kind in kinds}


def bleu(predicted: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """sacreBLEU, and the same on normalised Romanian without diacritics (``romanian``)."""
    try:
        import sacrebleu
    except ImportError:
        _need("sacrebleu")
    plain = sacrebleu.corpus_bleu(list(predicted), [list(references)]).score
    bare = [[normalise(text) for text in texts] for texts in (predicted, references)]
    return {"bleu": plain, "bleu_normalised": sacrebleu.corpus_bleu(bare[0], [bare[1]]).score}
