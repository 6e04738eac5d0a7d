"""Says how true a performance was: BLEU and ROUGE-L against the original, and the flaws a judge finds.

    python judge.py out/plays/DIR                                    BLEU and ROUGE-L
    python judge.py out/plays/DIR --judge openai:gpt-4o              and the four dimensions, judged
    python judge.py gpt-4o.simulation.json --scenes test.json        what the CoSER release acted
    python judge.py --rescore gpt-4o.evaluation.json                 scores from recorded verdicts, recomputed

Penalty scoring (coser paper, section 4.3): for each dimension the judge lists flaws with a severity of 1 to 5, and the score is
100 - 5 * (sum of severities - 0.3 * turns), not below 0. It is computed here, from the flaws, never by the judge. A reply that
is no valid verdict is asked for again; one that stays invalid is left out of the means, and counted.
"""

import hashlib
import json
import statistics
from pathlib import Path

import cli
from cli import UsageError
from data import prompts
from data.chats import NEXT_SPEAKER, remove_thoughts
from data.scenes import ENVIRONMENT, Scene, load_scenes, straighten
from generate import SamplingParams
from llm import open_model
from simulate import TRANSCRIPT_KEYS, TRANSCRIPTS

VERDICTS, VERDICT_KEYS = (
    "verdicts.jsonl",
    ("book", "i_p", "i_c", "judge", "seed", "performance", "turns", "dimensions", "score"),
)
TRIES = 3  # for a valid verdict
SEVERITIES = range(1, 6)


# ---- scores -------------------------------------------------------------------------------------------------------------


def score_flaws(flaws, turns, weight=0.3, cap=None):
    """100 - 5 * (sum of severities - weight * turns), not below 0, and not above cap where one is given.

    flaws: dicts with an integer `severity`; turns: simulated messages that are not the Environment's; weight: severity points
    forgiven a message, since longer scenes show more flaws. The paper has no cap; the release of 2025 caps at 100.
    """
    score = max(0.0, 100 - 5 * (sum(flaw["severity"] for flaw in flaws) - weight * turns))
    return score if cap is None else min(score, cap)


def bleu(reference, candidate):
    """Sentence BLEU-4 (Papineni et al. 2002) of two texts, lower-cased, one reference, no smoothing: 0..1.

    Tokens are nltk's, after an untrained sentence splitter, so no data is downloaded.
    """
    import warnings

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
        return _f1(_lcs_table(x, y)[-1][-1], len(y), len(x))
    if variant != "release":
        raise ValueError(f"variant {variant!r} is neither 'lcs' nor 'release'")
    reference, candidate = (
        [" ".join(part.split()).split(" ") for part in text.split(".") if part] for text in (reference, candidate)
    )
    shared = {word for x in reference for y in candidate for word in _lcs_words(x, y)}
    sizes = [len({word for sentence in text for word in sentence}) for text in (candidate, reference)]
    return _f1(len(shared), *sizes, epsilon=1e-8)


def _f1(shared, candidate, reference, epsilon=0.0):
    if not shared:
        return 0.0
    precision, recall = shared / candidate, shared / reference
    return 2 * precision * recall / (precision + recall + epsilon)


def _lcs_table(x, y):
    """table[i][j]: length of the longest common subsequence of x[:i] and y[:j]."""
    table = [[0] * (len(y) + 1)]
    for word in x:
        above, row = table[-1], [0]
        for j, other in enumerate(y):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        table.append(row)
    return table


def _lcs_words(x, y):
    """The words of one longest common subsequence, ties taken as the release takes them."""
    table, i, j, words = _lcs_table(x, y), len(x), len(y), []
    while i and j:
        if x[i - 1] == y[j - 1]:
            i, j = i - 1, j - 1
            words.append(x[i])
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


# ---- performances -------------------------------------------------------------------------------------------------------


def read_performances(path, scenes_file=None):
    """(scene, messages) of a directory of ours, a transcripts.jsonl, or a simulation file of the release.

    messages: `{role, content}`; in the release's files most contents begin with the speaker's name.
    """
    path = Path(path)
    file = path / TRANSCRIPTS if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"{path}: no {TRANSCRIPTS} here; python simulate.py --scene NAME --out {path} makes one")
    try:
        if file.suffix == ".jsonl":
            found = [(Scene(**line["scene"]), line["messages"]) for line in cli.read_lines(file, TRANSCRIPT_KEYS)]
        else:
            found = _release_performances(cli.read_json(file, list), file, scenes_file)
        for scene, messages in found:
            scripts(scene, messages)
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{file}: not what simulate.py or the release writes ({type(error).__name__}: {error})") from None
    if not found:
        raise UsageError(f"{file}: no finished scene in it; python simulate.py ... --resume finishes one")
    return found


def _release_performances(data, file, scenes_file):
    if not scenes_file:
        raise UsageError(f"{file}: holds no scenes; give the test file they come from with --scenes FILE")
    scenes = {(scene.book, scene.i_p, scene.i_c): scene for scene in load_scenes(scenes_file)}
    found = []
    for case in data:
        key = (straighten(case["book"]), case["i_p"], case["i_c"])
        if key not in scenes:
            raise UsageError(f"{scenes_file}: no scene {key[0]}, plot {key[1]}, conversation {key[2]}, which {file} plays")
        # where the speaker's name stands anywhere in a content, the release takes it to be named
        messages = [{**message, "named": f"{message['role']}:" in message["content"]} for message in case["simulation"]]
        found.append((scenes[key], messages))
    return found


def count_turns(messages):
    """Simulated messages that are not the Environment's: what the length term counts."""
    return sum(message["role"] not in (ENVIRONMENT, NEXT_SPEAKER) for message in messages)


def script_line(name, text, named=False):
    """`Name: text`, thoughts removed but for the Environment, whose text stays as it is. named: the text says who speaks."""
    shown = text if name == ENVIRONMENT else remove_thoughts(text)
    return shown if named else f"{name}: {shown}"


def scripts(scene, messages):
    """(original, simulated) as one text each, a blank line between messages."""
    original = [script_line(turn["character"], turn["message"]) for turn in scene.dialogues]
    spoken = [message for message in messages if message["role"] != NEXT_SPEAKER]
    simulated = [script_line(m["role"], m["content"], m.get("named", False)) for m in spoken]
    return "\n\n".join(original), "\n\n".join(simulated)


# ---- judging ------------------------------------------------------------------------------------------------------------


def judge_messages(scene, messages, dimension):
    """What the judge is asked about one dimension. The fence depends on both texts, so no character can close it."""
    original, simulated = scripts(scene, messages)
    brief, criteria = prompts.DIMENSIONS[dimension]
    profiles = "\n\n".join(f"{name}: {text}" for name, text in scene.profiles.items() if name in scene.speaking_characters)
    user = prompts.JUDGE_USER.format(
        book=scene.book,
        plot_summary=scene.plot_summary or "(not given)",
        scenario=scene.scenario or "(not given)",
        profiles=profiles or "(not given)",
        major_characters=", ".join(scene.major_characters) or "(none)",
        fence="=====" + hashlib.sha256(f"{original}\0{simulated}".encode()).hexdigest()[:12],
        reference=original,
        simulation=simulated,
        dimension=dimension,
        criteria=criteria,
    )
    system = prompts.JUDGE_SYSTEM.format(dimension=dimension, brief=brief)
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def parse_flaws(text):
    """The flaws of a judge's reply; ValueError says what is wrong with it. An invalid severity is never just left out."""
    first, last = text.find("{"), text.rfind("}")
    if first < 0 or last < first:
        raise ValueError("no JSON object in the reply")
    flaws = json.loads(text[first : last + 1]).get("flaws")
    if not isinstance(flaws, list):
        raise ValueError("no list of flaws in the reply")
    for flaw in flaws:
        if not isinstance(flaw, dict) or not all(isinstance(flaw.get(key), str) for key in ("instance", "type")):
            raise ValueError(f"not a flaw with instance, type and severity: {str(flaw)[:80]}")
        severity = flaw.get("severity")
        if type(severity) is not int or severity not in SEVERITIES:
            raise ValueError(f"severity {severity!r} is not a whole number from 1 to 5")
    return [{key: flaw[key] for key in ("instance", "type", "severity")} for flaw in flaws]


def judge_scene(scene, messages, model, seed):
    """{dimension: {flaws, score}}; a dimension without a valid reply in TRIES has {error} instead."""
    dimensions, turns = {}, count_turns(messages)
    left = list(prompts.DIMENSIONS)
    for attempt in range(TRIES):
        params = SamplingParams(temperature=0.0 if attempt == 0 else 1.0, max_tokens=2048, seed=seed + attempt)
        replies = model.chat([judge_messages(scene, messages, dimension) for dimension in left], params)
        for dimension, reply in zip(list(left), replies, strict=True):
            try:
                flaws = parse_flaws(reply.text)
                dimensions[dimension] = {"flaws": flaws, "score": score_flaws(flaws, turns)}
                left.remove(dimension)
            except (ValueError, RecursionError) as error:
                dimensions[dimension] = {"error": str(error)}
        if not left:
            break
    return {dimension: dimensions[dimension] for dimension in prompts.DIMENSIONS}


def judge_performance(scene, messages, model, seed):
    """One line of verdicts.jsonl. Without a model only the metrics."""
    original, simulated = scripts(scene, messages)
    dimensions = judge_scene(scene, messages, model, seed) if model else {}
    complete = dimensions and all("score" in verdict for verdict in dimensions.values())
    return {
        "book": scene.book,
        "i_p": scene.i_p,
        "i_c": scene.i_c,
        "judge": model.name if model else None,
        "seed": seed,
        "performance": digest(scene, messages),
        "turns": count_turns(messages),
        "dimensions": dimensions,
        "score": statistics.mean(verdict["score"] for verdict in dimensions.values()) if complete else None,
        "bleu": bleu(original, simulated),
        "rouge_l": rouge_l(original, simulated),
        "rouge_l_release": rouge_l(original, simulated, "release"),
    }


def digest(scene, messages):
    """What tells a performance from every other."""
    return hashlib.sha256(json.dumps([scene.key, messages], sort_keys=True).encode()).hexdigest()[:16]


# ---- recorded verdicts --------------------------------------------------------------------------------------------------


def rescore(path):
    """Recomputes every score of a recorded evaluation: the release's file, or a verdicts.jsonl of ours.

    Returns verdict lines whose scores are computed anew, and the number of recorded scores that came out the same (to 1e-9)
    of all. Of the release's flaws only those with an integer severity count, as it counted them.
    """
    path = Path(path)
    cli.read_text(path)  # there, and not empty
    try:
        if path.suffix == ".jsonl":
            lines = cli.read_lines(path, VERDICT_KEYS)
        else:
            lines = [_recorded_case(key, case) for key, case in cli.read_json(path)["cases"].items()]
        same = of = 0
        for line in lines:
            for verdict in line["dimensions"].values():
                if "flaws" in verdict:
                    flaws = [flaw for flaw in verdict["flaws"] if type(flaw.get("severity")) is int]
                    score = score_flaws(flaws, line["turns"])
                    same, of = same + (abs(score - verdict["score"]) <= 1e-9), of + 1
                    verdict["score"] = score
            scores = [verdict.get("score") for verdict in line["dimensions"].values()]
            line["score"] = statistics.mean(scores) if scores and None not in scores else None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path}: not a file of recorded verdicts ({type(error).__name__}: {error})") from None
    if not lines:
        raise UsageError(f"{path}: no recorded verdict in it")
    return lines, same, of


def _recorded_case(key, case):
    book, i_p, i_c = key.rsplit("-", 2)
    dimensions = {name: dict(verdict) for name, verdict in case["critique"].items() if isinstance(verdict, dict)}
    turns = count_turns(case["simulation"])
    return {
        "book": straighten(book),
        "i_p": int(i_p),
        "i_c": int(i_c),
        "judge": "recorded",
        "turns": turns,
        "dimensions": dimensions,
    }


# ---- summary ------------------------------------------------------------------------------------------------------------


def summarise(lines, judge):
    """The means over scenes as a table on stdout."""
    rows = []
    for dimension in prompts.DIMENSIONS:
        scores = [v["score"] for line in lines if "score" in (v := line["dimensions"].get(dimension, {}))]
        if scores:
            rows.append((dimension, scores, ".2f"))
    scores = [line["score"] for line in lines if line["score"] is not None]
    if scores:
        rows.append(("Average", scores, ".2f"))
    for name, label in (("bleu", "BLEU"), ("rouge_l", "ROUGE-L"), ("rouge_l_release", "ROUGE-L (release)")):
        if name in lines[0]:
            rows.append((label, [100 * line[name] for line in lines], ".2f"))
    cli.stdout.print(f"{len(lines)} scene(s), judge: {judge or 'none'}", style="bold", markup=False)
    for label, values, form in rows:
        style = "bold" if label == "Average" else None
        cli.stdout.print(f"{label:24}{statistics.mean(values):>9{form}}   over {len(values)}", style=style, markup=False)
    failed = sum("error" in v for line in lines for v in line["dimensions"].values())
    if failed:
        cli.note(f"{failed} verdict(s) never became valid in {TRIES} tries and are in no mean; judge again to retry them")


def parse_args():
    parser = cli.Parser(__doc__, "python judge.py out/plays/the-last-ferry-1.1")
    add = parser.add_argument
    add("performances", nargs="?", metavar="DIR", help="directory of simulate.py, or a simulation file of the release")
    add("--judge", help="checkpoint directory or openai:MODEL; without one there are no flaw scores")
    add("--scenes", help="test file with the originals, for a simulation file of the release")
    add("--rescore", metavar="FILE", help="recompute the scores of recorded verdicts")
    add("--out", help=f"file for the verdicts (default: {VERDICTS} beside the transcripts)")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    if bool(args.performances) == bool(args.rescore):
        raise UsageError("give a directory of performances, or --rescore FILE")
    return args


def main():
    args = parse_args()
    if args.rescore:
        lines, same, of = rescore(args.rescore)
        summarise(lines, lines[0]["judge"])
        cli.stdout.print(f"{same} of {of} recorded dimension scores recomputed exactly (to 1e-9)", markup=False)
        return
    performances = read_performances(args.performances, args.scenes)
    path = Path(args.performances)
    out = Path(args.out) if args.out else path / VERDICTS if path.is_dir() else cli.OUT / "verdicts" / f"{path.stem}.jsonl"
    recorded = {line["performance"]: line for line in cli.read_lines(out, VERDICT_KEYS)}
    for line in recorded.values():
        if line["judge"] and (line["judge"], line["seed"]) != (args.judge, args.seed):
            raise UsageError(f"{out}: holds verdicts of {line['judge']}, seed {line['seed']}; name another file with --out")
    wanted = [digest(*performance) for performance in performances]
    done = {key for key in wanted if key in recorded and args.judge and recorded[key]["score"] is not None}
    model = open_model(args.judge) if args.judge else None
    cli.make_dir(out.parent)
    with cli.progress() as bar:
        task = bar.add_task("judging", total=len(performances), completed=len(done))
        try:
            for key, (scene, messages) in zip(wanted, performances, strict=True):
                if key in done:
                    continue
                recorded[key] = judge_performance(scene, messages, model, args.seed)
                cli.write_lines(out, recorded.values())  # whole: it may take the place of an incomplete line
                done.add(key)
                bar.update(task, completed=len(done))
        except (KeyboardInterrupt, UsageError) as error:
            why = str(error) + ". " if str(error) else ""
            raise type(error)(f"{why}{len(done)} verdicts are in {out}; the same command goes on from there") from None
    lines = [recorded[key] for key in wanted]
    summarise(lines, args.judge)
    cli.note(f"verdicts are in {out}")
    if not args.judge:
        cli.note("flaw scores need a judge: add --judge openai:MODEL or --judge DIR")


if __name__ == "__main__":
    cli.run(main)
