"""What a judged scene is worth, and how sure that is: penalty scores, BLEU, ROUGE-L, intervals, rank correlations.

score_flaws([{"severity": 3}], turns=12)        # 100 - 5 * (3 - 0.3 * 12) = 103
bootstrap(scores)                               # (mean, low, high): 95% over scenes
paired([a1, a2, ...], [b1, b2, ...])            # two runs on the same scenes
"""

import statistics
import warnings
from collections import defaultdict

import numpy as np

LENGTH_WEIGHT = 0.3  # severity points forgiven a message


def score_flaws(flaws, turns, weight=LENGTH_WEIGHT, cap=None):
    """100 - 5 * (sum of severities - weight * turns), not below 0, and not above cap where one is given.

    flaws: dicts with an integer `severity`; turns: simulated messages that are not the Environment's; weight: severity points
    forgiven a message, since longer scenes show more flaws. The paper has no cap; the release of 2025 caps at 100.
    """
    score = max(0.0, 100 - 5 * (sum(flaw["severity"] for flaw in flaws) - weight * turns))
    return score if cap is None else min(score, cap)


def weigh(line, weight=LENGTH_WEIGHT):
    """A line of verdicts.jsonl with every score computed from its flaws.

    A dimension's score is the mean over its valid repeats, the scene's that over dimensions; without a valid verdict, None.
    """
    for verdict in line["dimensions"].values():
        parts = defaultdict(list)
        for flaw in verdict.get("flaws", ()):
            parts[flaw.get("repeat", 0)].append(flaw)
        old = verdict.get("scores", [0.0] if "flaws" in verdict else [None])
        verdict["scores"] = [
            None if s is None else score_flaws(parts[r], line["turns"], weight) for r, s in enumerate(old)
        ]
        valid = [score for score in verdict["scores"] if score is not None]
        verdict["score"] = statistics.mean(valid) if valid else None
    scores = [verdict["score"] for verdict in line["dimensions"].values()]
    return line | {
        "length_weight": weight,
        "score": statistics.mean(scores) if scores and None not in scores else None,
    }


def bleu(reference, candidate):
    """Sentence BLEU-4 (Papineni et al. 2002) of two texts, lower-cased, one reference, no smoothing: 0..1.

    Tokens are nltk's, after an untrained sentence splitter, so no data is downloaded.
    """
    from nltk.translate.bleu_score import sentence_bleu

    with warnings.catch_warnings():  # no 4-gram in common is a score, not a mishap
        warnings.simplefilter("ignore")
        return float(sentence_bleu([_word_tokens(reference)], _word_tokens(candidate)))


def _word_tokens(text):
    from nltk.tokenize import NLTKWordTokenizer
    from nltk.tokenize.punkt import PunktSentenceTokenizer

    sentences = PunktSentenceTokenizer().tokenize(text.lower())
    return [token for sentence in sentences for token in NLTKWordTokenizer().tokenize(sentence)]


def rouge_l(reference, candidate, variant="lcs"):
    """ROUGE-L (Lin 2004) of two texts, an F1 in 0..1.

    "lcs": over the longest common subsequence of whitespace tokens, case kept (the published table). "release": as the release
    records it, which is summary-level over sentences split at full stops, counting each distinct word once.
    """
    if variant == "lcs":
        x, y = reference.split(), candidate.split()
        return _f1(_lcs_rows(x, y)[-1].bit_count(), len(y), len(x))
    if variant != "release":
        raise ValueError(f"variant {variant!r} is neither 'lcs' nor 'release'")
    reference, candidate = (
        [" ".join(part.split()).split(" ") for part in text.split(".") if part]
        for text in (reference, candidate)
    )
    shared = {word for x in reference for y in candidate for word in _lcs_words(x, y)}
    sizes = [len({word for sentence in text for word in sentence}) for text in (candidate, reference)]
    return _f1(len(shared), *sizes, epsilon=1e-8)


def _f1(shared, candidate, reference, epsilon=0.0):
    if not shared:
        return 0.0
    precision, recall = shared / candidate, shared / reference
    return 2 * precision * recall / (precision + recall + epsilon)


def _lcs_rows(x, y):
    """Longest common subsequences, a row of the table as the bits of one int (Hyyro 2004): O(len(x) * len(y) / 64).

    Bit j of rows[i] is set where x[:i] has a longer one with y[: j + 1] than with y[:j], so a row's bits add up to the length.
    """
    places, full = {}, (1 << len(y)) - 1
    for j, word in enumerate(y):
        places[word] = places.get(word, 0) | 1 << j
    rows, flat = [0], full
    for word in x:
        hits = flat & places.get(word, 0)
        flat = (flat + hits | flat - hits) & full
        rows.append(full ^ flat)
    return rows


def _lcs_words(x, y):
    """The words of one longest common subsequence, ties taken as the release takes them."""
    rows, i, j, words = _lcs_rows(x, y), len(x), len(y), []
    while i and j:
        if x[i - 1] == y[j - 1]:
            i, j = i - 1, j - 1
            words.append(x[i])
        elif rows[i] >> (j - 1) & 1:  # without y[j - 1] it is shorter, so without x[i - 1] it is not
            i -= 1
        else:
            j -= 1
    return words


def bootstrap(values, resamples=10_000, seed=0, scenes=None):
    """(mean, low, high): the 95% percentile interval (Efron 1979) of a mean over scenes; without one (None) below two.

    scenes: which each value is of, where a scene has several: scenes are then drawn with all their values.
    """
    if not len(values):
        return None, None, None
    _, scene = np.unique(range(len(values)) if scenes is None else scenes, return_inverse=True)
    sums, counts = np.bincount(scene, values), np.bincount(scene)
    mean = float(sums.sum() / len(values))
    if len(sums) < 2:
        return mean, None, None
    drawn = np.random.default_rng(seed).integers(0, len(sums), (resamples, len(sums)))
    low, high = np.percentile(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1), [2.5, 97.5])
    return mean, float(low), float(high)


def paired(ours, theirs):
    """Two runs on the same scenes, in the same order: {difference, low, high, wins, scenes}; a tie is half a win."""
    difference = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    mean, low, high = bootstrap(difference)
    wins = float(np.mean((np.sign(difference) + 1) / 2)) if len(difference) else None
    return {"difference": mean, "low": low, "high": high, "wins": wins, "scenes": len(difference)}


def spearman(x, y):
    """Rank correlation, ties with their mean rank; None where one side is constant or there are fewer than two."""
    ranks = []
    for values in (x, y):
        _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[where])
    if len(x) < 2 or any(np.ptp(side) == 0 for side in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1])
