"""Scores and statistics: penalty scores, BLEU, ROUGE-L, bootstrap intervals, rank correlation."""

import statistics
import warnings

import numpy as np

LENGTH_WEIGHT = 0.3  # severity points forgiven per message
METRICS = {  # label in tables: key in verdicts.jsonl
    "BLEU": "bleu",
    "BLEU without names": "bleu_without_names",
    "ROUGE-L": "rouge_l",
    "ROUGE-L (release)": "rouge_l_release",
}


def score_flaws(flaws, turns, weight=LENGTH_WEIGHT, cap=None):
    """100 - 5 * (sum of severities - weight * turns), at least 0 (CoSER paper, section 4.3).

    turns: simulated messages that are not the Environment's. cap: the highest score; none in the paper, 100
    in the 2025 release.
    """
    score = max(0.0, 100 - 5 * (sum(flaw["severity"] for flaw in flaws) - weight * turns))
    return score if cap is None else min(score, cap)


def with_scores(line, weight=LENGTH_WEIGHT):
    """A copy of a verdict line with every score computed from its flaws.

    A dimension's score is the mean over its valid repeats (None in `scores` marks an invalid one), the
    scene's score the mean over dimensions, or None where a dimension has none.
    """

    def rescored(verdict):
        scores = []
        for repeat, recorded in enumerate(verdict["scores"]):
            flaws = [flaw for flaw in verdict["flaws"] if flaw.get("repeat", 0) == repeat]
            scores.append(None if recorded is None else score_flaws(flaws, line["turns"], weight))
        return verdict | {"scores": scores, "score": mean([score for score in scores if score is not None])}

    dimensions = {name: rescored(verdict) for name, verdict in line["dimensions"].items()}
    scores = [verdict["score"] for verdict in dimensions.values()]
    score = None if None in scores else mean(scores)
    return line | {"dimensions": dimensions, "length_weight": weight, "score": score}


def mean(values):
    """The mean of a list, or None if it is empty."""
    return statistics.mean(values) if values else None


def bleu(reference, candidate):
    """Sentence BLEU-4 (Papineni et al. 2002), lower-cased, one reference, no smoothing: two texts -> 0..1.

    Tokens are nltk's, after its untrained sentence splitter, so that no data has to be downloaded.
    """
    from nltk.tokenize import NLTKWordTokenizer
    from nltk.tokenize.punkt import PunktSentenceTokenizer
    from nltk.translate.bleu_score import sentence_bleu

    sentences, words = PunktSentenceTokenizer().tokenize, NLTKWordTokenizer().tokenize
    texts = [[w for s in sentences(text.lower()) for w in words(s)] for text in (reference, candidate)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nltk warns where no n-gram is shared; the score is then 0
        return float(sentence_bleu(texts[:1], texts[1]))


def rouge_l(reference, candidate, variant="lcs"):
    """ROUGE-L (Lin 2004), an F1: two texts -> 0..1.

    "lcs": longest common subsequence (LCS) of whitespace tokens, case kept (the published table). "release":
    as the release records it, summary level over sentences split at full stops, each distinct word once.
    """
    if variant == "lcs":
        x, y = reference.split(), candidate.split()
        return _f1(_lcs_rows(x, y)[-1].bit_count(), len(y), len(x))
    if variant != "release":
        raise ValueError(f"variant {variant!r} is neither 'lcs' nor 'release'")
    x, y = (
        [" ".join(sentence.split()).split(" ") for sentence in text.split(".") if sentence]
        for text in (reference, candidate)
    )
    shared = {word for own in x for other in y for word in _lcs_words(own, other)}
    return _f1(len(shared), len(set().union(*y)), len(set().union(*x)), epsilon=1e-8)


def _f1(shared, candidate, reference, epsilon=0.0):
    if not shared:
        return 0.0
    precision, recall = shared / candidate, shared / reference
    return 2 * precision * recall / (precision + recall + epsilon)


def _lcs_rows(x, y):
    """The rows of the LCS table, each as the bits of an int (Hyyro 2004), in O(len(x) * len(y) / 64).

    Bit j of rows[i] is set where the LCS of x[:i] and y[:j + 1] is longer than that of x[:i] and y[:j]; the
    number of bits set in a row is therefore the length of the LCS of x[:i] and y.
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
    """The words of one longest common subsequence; ties are broken as in the release."""
    rows, i, j, words = _lcs_rows(x, y), len(x), len(y), []
    while i and j:
        if x[i - 1] == y[j - 1]:
            i, j = i - 1, j - 1
            words.append(x[i])
        elif rows[i] >> (j - 1) & 1:  # dropping y[j - 1] would shorten the subsequence, so drop x[i - 1]
            i -= 1
        else:
            j -= 1
    return words


def bootstrap(values, resamples=10_000, seed=0, scenes=None):
    """(mean, low, high): a mean over scenes, its 95% percentile interval (Efron 1979; None below two scenes).

    scenes: the scene of each value, where a scene has several; scenes are resampled with all their values.
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
    """Both means, their difference with its interval, wins (a tie is half) of two runs on the same scenes."""
    differences = np.subtract(ours, theirs)
    difference, low, high = bootstrap(differences)
    columns = {"wins": (np.sign(differences) + 1) / 2, "ours": ours, "theirs": theirs}
    means = {name: float(np.mean(column)) for name, column in columns.items()}
    return {"difference": difference, "low": low, "high": high, "scenes": len(differences)} | means


def spearman(x, y):
    """Spearman's rank correlation, ties at their mean rank; None where a side has fewer than two values."""
    ranks = []
    for values in (x, y):
        _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[where])
    if len(x) < 2 or any(np.ptp(side) == 0 for side in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1])
