"""The other benchmarks: models of known accuracy get it, what the files give away is taken out, what is
missing is counted, and a run that was killed ends with the same table."""

import json
import os
import random
import re
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, usage_error
from test_llm import Script, Server

import benchmark
from evals import benchmarks, cross_mr, in_character, life_choice, multiple_choice
from evals import in_character as rating
from evals.benchmark_prompts import DIMENSIONS, EXPERIMENTER, NO_ANSWER, PARTICIPANT
from evals.in_character import baselines, cells_of, page_items
from llm.local import Local
from llm.reply import Reply

LIFE = ROOT / "tests" / "life_choice.json"
ARGS = dict(profile="gold", seed=0, limit=None, interview=None, labels="pdb", by=None, max_tokens=64)


def args_for(data, **changes):
    return SimpleNamespace(**{**ARGS, "data": data, **changes})


def question(number, right, leak=True):
    """One of the raw file: the right option alone has a space after its letter."""
    options = [f"{x}.{' ' if leak and x == right else ''}Because of motive {number}{x}." for x in "ABCD"]
    texts = {"Scenario": f"Something happens, {number}.", "Question": f"Why does it happen, {number}?"}
    reason = {"Reasons": [f"{right}. Correct."], "id": number}
    return {"Multiple Choice Question": texts | {"Options": options, "Correct Answer": right} | reason}


@pytest.fixture
def cross(tmp_path):
    """A folder in the shape of CroSS: 3 books, 12 questions, one name that differs between the files."""
    folder = tmp_path / "cross"
    folder.mkdir()
    books, profiles = {}, []
    for b in range(3):
        asked = [question(4 * b + i, "ABCD"[(b + i) % 4], leak=i > 0) for i in range(4)]
        books[f"Book {b}"] = {f"Heroine {b}" + "\\" * (b == 2): asked}
        persona = {f"Heroine {b}": {"summary": f"Attributes:\nHeroine {b} likes motives."}}
        profiles.append({"title": f"Book {b}", "persona": persona})
    write(folder / cross_mr.QUESTIONS_FILE, books)
    write(folder / cross_mr.PROFILES_FILE, profiles)
    return folder


@pytest.fixture
def personality(tmp_path):
    """A folder in the shape of InCharacter: 44 items, 3 characters; Gaston's neuroticism is X."""
    folder = tmp_path / "personality"
    folder.mkdir()
    counts = dict(zip(DIMENSIONS, (8, 8, 9, 9, 10), strict=True))
    names = [name for name, count in counts.items() for _ in range(count)]
    questions = {
        str(n): {
            "origin_en": f"Is {n}.",
            "rewritten_en": f"Are you {name}, {n}?",
            "rewritten_zh": f"你{name}吗，{n}？",
            "dimension": name,
            "category": "negative" if n % 3 == 0 else "positive",
        }
        for n, name in enumerate(names, 1)
    }
    types = {"Hermione-en": "HHHLL", "zhongli-zh": "LLHHH", "Gaston-en": "HXLLL"}
    labels = {key: bfi(letters) for key, letters in types.items()}
    other = {key: bfi("XHHHH") for key in types}
    people = {
        "Hermione-en": {"alias": ["Hermione", "Hermione Granger"], "experimenter": "Harry"},
        "zhongli-zh": {"alias": ["钟离", "Zhong Li"], "experimenter": "旅行者"},
        "Gaston-en": {"alias": ["Gaston"], "experimenter": "LeFou"},
    }
    write(folder / "BFI.json", {"questions": questions})
    write(folder / "characters.json", people)
    write(folder / "characters_labels.json", {"pdb": labels, "annotation": other})
    return folder


def bfi(letters):
    return {"BFI": {name: {"type": x, "score": 3} for name, x in zip(DIMENSIONS, letters, strict=True)}}


def write(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


def use(monkeypatch, say, **attributes):
    """Every model of the command line is a script that answers so; returns it."""
    model = Script(say)
    model.identity = "script"
    for name, value in attributes.items():
        setattr(model, name, value)
    monkeypatch.setattr(benchmarks, "open_model", lambda spec, **options: model)
    return model


def results(out):
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def own_rows(out):
    return [row for row in results(out)["rows"] if "(published)" not in row[""]]


def right_letter(questions):
    """say() of a model that always knows the answer."""

    def say(messages, params):
        text = messages[-1]["content"]
        [found] = [q for q in questions if q.text in text and q.scenario in text]
        [letter] = re.findall(rf"(?m)^([A-D])\. {re.escape(found.options[found.right])}$", text)
        return f"The choice is not A or B or so.\n**Answer:** {letter}."

    return say


# ---- multiple choice ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cross-mr", "lifechoice"])
def test_models_of_known_accuracy_get_it(script, cross, tmp_path, monkeypatch, name):
    """Always right: 100; always the first: the share of questions whose right answer came first; never a
    letter: 0 of all questions, not of none; what failed counts as wrong as well."""
    data, module = (cross, cross_mr) if name == "cross-mr" else (LIFE, life_choice)
    questions, left_out = module.load(args_for(data))
    assert len(questions) == (12 if name == "cross-mr" else 4) and not left_out

    def row_of(say, out, error=None):
        model = use(monkeypatch, say)
        if error:
            answer = Reply("", "error", error=error)
            model.chat = lambda c, p, o=None: [
                answer if questions[0].text in m[-1]["content"] else Reply(say(m, p), "stop") for m in c
            ]
        command = [name, "--data", data, "--actor", "m", "--out", tmp_path / out, "--by", "generation"]
        code, screen, err = script("benchmark", *command, "--html", tmp_path / f"{out}.html")
        assert code == 0, err
        return own_rows(tmp_path / out)[0], screen, err

    row, screen, _ = row_of(right_letter(questions), "right")
    assert (row["accuracy"], row["parsed"], row["questions"]) == (100, 100, len(questions))
    assert row["95% interval"] == [100, 100] and "(published)" in screen and "benchmark.py" in screen
    first = sum(q.right == 0 for q in questions)
    row, _, _ = row_of(lambda *_: "Answer: A", "first")
    assert row["accuracy"] == pytest.approx(100 * first / len(questions)) and row["parsed"] == 100
    for letter in "ABCD":
        if row[f"right at {letter}"] is not None:
            assert row[f"right at {letter}"] == (100 if letter == "A" else 0)
    baseline = next(r for r in own_rows(tmp_path / "first") if r[""] == "baseline: the first option")
    assert baseline["accuracy"] == row["accuracy"]
    row, _, _ = row_of(lambda *_: "I would rather not say; A bird is a bird.", "never")
    assert (row["accuracy"], row["parsed"], row["questions"]) == (0, 0, len(questions))
    row, _, err = row_of(right_letter(questions), "failed", error="it is down")
    assert row["accuracy"] == pytest.approx(100 * (1 - 1 / len(questions))) and row["questions"] == len(
        questions
    )
    assert "1 of" in err and "it is down" in err
    page = (tmp_path / "failed.html").read_text()
    titles = re.findall(r'class="where" dir="auto">.*?\((.*?)\)<', page)
    assert titles[0] == questions[0].key and len(titles) == len(questions)
    assert "it is down" in page and "script" not in page.split("</style>")[0].split("<title>")[0]


def test_nothing_shows_which_option_is_right(cross, monkeypatch):
    """The letters' spaces and the reasons of the file reach no model."""
    questions, _ = cross_mr.load(args_for(cross))
    model = Script(lambda *_: "Answer: A")
    args = args_for(cross, by=["generation"])
    multiple_choice.generate(questions, cross_mr.PROMPTS, "gold", model, NoJournal(), args)
    for q, (messages, _) in zip(questions, model.asked, strict=True):
        text = json.dumps(messages)
        lines = re.findall(r"(?m)^[A-D]\..*$", messages[-1]["content"])
        assert len(lines) == 4 and all(re.match(r"[A-D]\. Because", line) for line in lines)
        assert "Correct" not in text and f"{q.character} likes motives" in text
    multiple_choice.generate(questions, cross_mr.PROMPTS, "none", model, NoJournal(), args)
    assert not any("likes motives" in json.dumps(messages) for messages, _ in model.asked[12:])


class NoJournal:
    def take(self, *_):
        return None

    def keep(self, *_):
        pass


def test_the_real_file_gives_nothing_away_any_more(shared):
    """All 445 questions of 126 books load; 263 raw ones have one spaced option, the right one; normalised,
    options have no letter and no odd space; the cheat's row is about 69 percent."""
    folder = shared / "cross_mr"
    questions, left_out = cross_mr.load(args_for(folder))
    assert (len(questions), len({q.book for q in questions}), left_out) == (445, 126, [])
    raw = {int(key): entry for _, key, *_, entry in cross_mr.entries(args_for(folder))}
    leaks = 0
    for q in questions:
        entry = raw[int(q.key)]["Multiple Choice Question"]
        spaced = [option[2] == " " for option in entry["Options"]]
        leaks += sum(spaced) == 1 and spaced["ABCD".index(entry["Correct Answer"])]
        assert (sum(spaced) == 1) == (q.cheat != 0.25) and q.cheat in (0.25, 1)
        assert all(text == text.strip() and "  " not in text for text in q.options)
        assert not any(re.match(r"[A-D][.):]", text) for text in q.options)
        written = entry["Options"]["ABCD".index(entry["Correct Answer"])]
        assert q.options[q.right] == " ".join(written[2:].split())
        assert "\\" not in q.character and q.profile.startswith("Attributes")
    assert leaks == 263
    row = multiple_choice.row("cheat", questions, [q.cheat for q in questions])
    assert row["accuracy"] == pytest.approx(100 * (263 + 182 / 4) / 445) and 69 < row["accuracy"] < 70
    rights = [sum(q.right == i for q in questions) for i in range(4)]
    assert sum(rights) == 445 and min(rights) > 80


def test_shuffling_depends_on_the_seed_alone(cross):
    orders = [[q.options for q in cross_mr.load(args_for(cross, seed=seed))[0]] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert [sorted(o) for o in orders[0]] == [sorted(o) for o in orders[2]]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("She is brave.\nAnswer: B", "B"),
        ("**Answer:** (C)", "C"),
        ("Answer: A. Because of that.", "A"),
        ("At first A; the answer is D.", "D"),
        ("Choice: A ... on reflection:\nAnswer: C", "C"),
        ('{"Reason": "a thing", "Choice": "B"}', "B"),
        (" (D) ", "D"),
        ("B.", "B"),
        ("Answer: option C", "C"),
        ("The answer is option (C).", "C"),
        ("Answer: $\\boxed{B}$", "B"),
        ("Answer: $\\boxed{\\text{B}}$", "B"),
        ("Answer: <D>", "D"),
        ("Answer：C", "C"),
        ("The answer in the text", None),
        ("A bird in the hand", None),
        ("Answer: a matter of taste", None),
        ("Answer: Because", None),
        ("Answer: X", None),
        ("", None),
    ],
)
def test_letters_are_read(text, letter):
    assert multiple_choice.parse_choice(text) == (None if letter is None else "ABCD".index(letter))


def test_bad_questions_are_named_and_left_out(script, cross, tmp_path, monkeypatch):
    """A right answer that is no option, equal options, a missing one, an unknown book, an empty profile."""
    file = cross / cross_mr.QUESTIONS_FILE
    books = json.loads(file.read_text())
    entries = books["Book 0"]["Heroine 0"]
    entries[0]["Multiple Choice Question"]["Correct Answer"] = "E"
    entries[1]["Multiple Choice Question"]["Options"][1] = "B. because  of motive 1A."
    entries[2]["Multiple Choice Question"]["Options"].pop()
    entries[3] = {"Multiple Choice Question": 7}
    books["Book 2"]["Heroine 2\\"][0]["Multiple Choice Question"]["Scenario"] = "\ud800"
    books["Unknown"] = {"Nobody": [question(99, "A")]}
    write(file, books)
    profiles = json.loads((cross / cross_mr.PROFILES_FILE).read_text())
    profiles[1]["persona"]["Heroine 1"]["summary"] = " "
    write(cross / cross_mr.PROFILES_FILE, profiles)
    use(monkeypatch, lambda *_: "Answer: A")
    command = ["cross-mr", "--data", cross, "--actor", "m", "--by", "generation", "--out", tmp_path / "o"]
    code, _, err = script("benchmark", *command)
    assert code == 0 and "10 of 13 questions left out" in err and "not among its options" in err
    reasons = " ".join(reason for _, reason in results(tmp_path / "o")["left_out"])
    for words in (
        "'E'",
        "equal options",
        "3 options",
        "7 where",
        "unknown character",
        "empty profile",
        "surrogates",
    ):
        assert words in reasons, words
    assert own_rows(tmp_path / "o")[0]["questions"] == 3
    command[-1] = tmp_path / "n"
    code, _, err = script("benchmark", *command, "--profile", "none")
    assert code == 0 and "5 of 13 questions left out" in err


def test_what_cannot_be_done_is_one_line(script, cross, personality, tmp_path, monkeypatch):
    use(monkeypatch, lambda *_: "Answer: A")
    base = ["cross-mr", "--data", cross, "--actor", "m", "--out", tmp_path / "o"]
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "text.json").write_text("{")
    for wrong in (
        ["cross-mr", "--data", tmp_path / "absent", "--actor", "m", "--out", tmp_path / "o"],
        ["lifechoice", "--data", tmp_path / "list.json", "--actor", "m", "--out", tmp_path / "o"],
        ["lifechoice", "--data", tmp_path / "empty.json", "--actor", "m", "--out", tmp_path / "o"],
        ["lifechoice", "--data", tmp_path / "text.json", "--actor", "m", "--out", tmp_path / "o"],
        [*base, "--judge", "j"],
        [*base, "--limit", "0"],
        ["incharacter", "--data", personality, "--out", tmp_path / "o"],
        ["incharacter", "--data", personality, "--interview", "i", "--out", tmp_path / "o"],
        ["incharacter", "--data", cross, "--actor", "m", "--out", tmp_path / "o"],
        ["nonsense", "--data", cross, "--actor", "m", "--out", tmp_path / "o"],
    ):
        usage_error(script("benchmark", *wrong))
    assert not (tmp_path / "o").exists()
    use(monkeypatch, lambda *_: "", chat=lambda c, p, o=None: [Reply("", "error", error="no room")] * len(c))
    assert "no room" in usage_error(script("benchmark", *base, "--by", "generation"))
    assert "--resume" in usage_error(script("benchmark", *base, "--by", "generation"))
    changed = [*base, "--by", "generation", "--resume", "--seed", 1]
    assert "seed" in usage_error(script("benchmark", *changed))


def test_an_endpoint_is_asked_to_generate_only(script, cross, tmp_path, monkeypatch):
    """And the command says so; --by likelihood is refused."""
    command = ["cross-mr", "--data", cross, "--actor", "openai:m", "--out", tmp_path / "o"]
    with Server(lambda *_: "Answer: B") as server:
        server.use(monkeypatch)
        assert "local model" in usage_error(script("benchmark", *command, "--by", "likelihood"))
        code, _, err = script("benchmark", *command, "--limit", 4)
        assert code == 0 and len(server.requests) == 4
        code, _, err = script("benchmark", *command, "--resume")
        assert code == 0 and len(server.requests) == 12 and "likelihoods need a local model" in err
        code, _, err = script("benchmark", *command, "--resume", "--profile", "both", "--by", "generation")
        assert code == 0 and len(server.requests) == 24 and "likelihoods" not in err
    rows = own_rows(tmp_path / "o")
    assert [row["parsed"] for row in rows if "generation" in row[""]] == [100, 100]
    assert not any("likelihood" in row[""] for row in rows)


def test_likelihoods_are_those_of_transformers(script, cross, tiny_actor, tmp_path):
    """By sum, by mean and against the prompt without the question; the table has the accuracy they give."""
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tiny_actor, dtype=torch.float32).eval()
    command = [
        "cross-mr",
        "--data",
        cross,
        "--actor",
        tiny_actor,
        "--out",
        tmp_path / "o",
        "--dtype",
        "float32",
    ]
    assert script("benchmark", *command, "--by", "likelihood", "--limit", 6)[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "o" / "replies.jsonl").read_text().splitlines()]
    kept = {k.split("|")[0]: json.loads(reply["text"]) for line in lines for k, (_, reply) in line.items()}
    questions, tokenizer = cross_mr.load(args_for(cross))[0][:6], Local(tiny_actor).tokenizer
    right = dict.fromkeys(("sum", "mean", "PMI", "blind"), 0)

    def score(q, template, option):
        messages = multiple_choice.conversation(q, cross_mr.PROMPTS, "gold", template)
        prompt, _ = tokenizer.render(messages, add_generation_prompt=True)
        ids = tokenizer.encode(option)
        with torch.inference_mode():
            logprobs = peer(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
        return sum(logprobs[len(prompt) + i - 1, token].item() for i, token in enumerate(ids)), len(ids)

    for q in questions:
        asked = [score(q, multiple_choice.ANSWER, option) for option in q.options]
        alone = [score(q, cross_mr.PROMPTS["alone"], option) for option in q.options]
        expected = {
            "sum": [total for total, _ in asked],
            "mean": [total / n for total, n in asked],
            "PMI": [total - base for (total, _), (base, _) in zip(asked, alone, strict=True)],
            "blind": [base for base, _ in alone],
        }
        assert any(abs(value) > 1e-2 for value in expected["PMI"])
        for name, values in expected.items():
            assert kept[q.key][name] == pytest.approx(values, abs=2e-3)
            right[name] += values.index(max(values)) == q.right
    for row, (name, count) in zip(own_rows(tmp_path / "o"), right.items(), strict=False):
        assert f"({name})" in row[""] and row["accuracy"] == pytest.approx(100 * count / 6)


def test_a_prompt_that_is_too_long_counts_as_wrong(script, cross, tiny_actor, tmp_path):
    """In both ways, named, and the other questions are answered."""
    profiles = json.loads((cross / cross_mr.PROFILES_FILE).read_text())
    profiles[0]["persona"]["Heroine 0"]["summary"] = "never again " * 9000
    write(cross / cross_mr.PROFILES_FILE, profiles)
    command = ["cross-mr", "--data", cross, "--actor", tiny_actor, "--out", tmp_path / "o", "--max-tokens", 4]
    code, _, err = script("benchmark", *command, "--limit", 6)
    assert code == 0 and "4 of 6 likelihoods failed" in err and "4 of 6 answers failed" in err
    assert {row["questions"] for row in own_rows(tmp_path / "o")} == {6}
    lines = [json.loads(line) for line in (tmp_path / "o" / "questions.jsonl").read_text().splitlines()]
    assert [[a["verdict"] for a in line["answers"][:3]] == ["no choice"] * 3 for line in lines] == (
        [True] * 4 + [False] * 2
    )


# ---- InCharacter -------------------------------------------------------------------------------------------


def test_groups_are_those_of_the_original():
    """8 items are 4 + 4, 9 are 3 + 3 + 3, 10 are 3 + 4 + 3: 13 calls a character."""
    sizes = {n: [len(group) for group in rating.groups_of(list(range(n)))] for n in (3, 5, 6, 8, 9, 10)}
    assert sizes == {3: [3], 5: [5], 6: [3, 3], 8: [4, 4], 9: [3, 3, 3], 10: [3, 4, 3]}
    for n in (6, 8, 9, 10, 44):
        assert sorted(sum(rating.groups_of(list(range(n))), [])) == list(range(n))


def person(**changes):
    fields = dict(key="x", aliases=["Harry", "Harry Potter"], experimenter="Hermione", language="en")
    return SimpleNamespace(**fields | changes)


def test_answers_are_anonymous_and_clean():
    text = "Harry Potter: I am Harry. Hermione knows Harrys.\nHermione: And more?\nHarry: Yes."
    shown = rating.anonymous(rating.clean(text, person()), person())
    assert shown == f"I am {PARTICIPANT}. {EXPERIMENTER} knows Harrys."
    assert rating.clean("word " * 600, person()).split() == ["word"] * 500
    chinese = person(aliases=["钟离", "Zhong Li"], experimenter="旅行者", language="zh")
    assert rating.anonymous("钟离：我是钟离，旅行者。", chinese).count(PARTICIPANT) == 2
    assert len(rating.clean("字" * 600, chinese)) == 500


def test_the_baselines_of_the_real_labels(shared):
    """Always high 49.7, always low 50.3, majority 57.3 percent of 157 cells; annotation has its own mask."""
    folder = shared / "incharacter"
    subjects, left_out = in_character.load(args_for(folder))
    rows = list(baselines(subjects))
    assert [round(row["Dim"], 1) for row in rows] == [49.7, 50.3, 57.3] and not left_out
    assert {row["cells"] for row in rows} == {157} and {row["characters"] for row in rows} == {32}
    items = in_character.load_items(args_for(folder))
    assert len(items) == 44 and sum(item.negative for item in items) == 16
    calls = sum(len(rating.groups_of([i for i in items if i.dimension == name])) for name in DIMENSIONS)
    assert calls == 13
    other = list(baselines(in_character.load(args_for(folder, labels="annotation"))[0]))
    assert 160 - 26 < other[0]["cells"] < 157
    assert other[0]["Dim"] + other[1]["Dim"] == pytest.approx(100)
    for subject in subjects:
        assert 100 <= len(subject.profile.split()) <= 200 or subject.language == "zh"


def test_the_page_says_which_answer_is_missing(personality):
    """Not "None": an answer that failed or is empty, beside one that came."""
    args = args_for(personality)
    [subject, *_], items = in_character.load(args)[0], in_character.load_items(args)[:3]
    answers = {subject.key: {"1": "I am.", "2": None, "3": ""}}
    rated = rating.make_rating(subject, "Extraversion", items, answers[subject.key], "groups")
    rated.values = [4.0]
    cells = list(cells_of([subject], [rated], as_published=False))[:1]
    [item] = page_items(cells, [rated], answers, "pdb")
    assert "I am." in item["answers"][0]["text"] and "None" not in item["answers"][0]["text"]
    everything = rating.make_rating(subject, "Extraversion", items, {}, "groups")
    everything.values = [None]
    [item] = page_items(cells, [everything], answers | {subject.key: {}}, "pdb")
    assert item["answers"][0]["text"].count(NO_ANSWER) == 3


def judge_of(levels):
    """say() of actor and judge: the judge gives each dimension the level of the character's name."""

    def say(messages, params):
        text = messages[-1]["content"]
        if "You assess personalities" not in text:
            who = re.search(r"You are (\w+)\.|你是(\S+?)。", messages[0]["content"])
            return f"I am {next(filter(None, who.groups()))}, marker {levels[who[1] or who[2]]}."
        assert not re.search("Hermione|Harry|Gaston|LeFou|钟离|旅行者", text)
        level = re.search(r"marker (\S+)\.", text)[1]
        if params.json_schema["required"][0] == "analysis":
            return f'Well: {{"analysis": "{{so}}", "result": {level}}}'
        return json.dumps(dict.fromkeys(params.json_schema["required"], level))

    return say


LEVELS = {"Hermione": "4.5", "钟离": "3", "Gaston": "2"}  # H, L (a tie), L


def test_a_judge_of_known_accuracy(script, personality, tmp_path, monkeypatch):
    """Hermione is HHHLL and rated H: 3 of 5; Zhongli LLHHH, 3 is L: 2 of 5; Gaston HXLLL, L: 3 of 4."""
    model = use(monkeypatch, judge_of(LEVELS))
    command = ["incharacter", "--data", personality, "--actor", "m", "--out", tmp_path / "o"]
    code, screen, err = script("benchmark", *command)
    assert code == 0 and "--judge" in err and not screen and len(model.asked) == 132
    assert all(len(messages) == 2 for messages, _ in model.asked)
    assert model.asked[44][0][1]["content"].startswith("旅行者: 你")
    code, screen, _ = script("benchmark", *command, "--resume", "--judge", "j", "--html", tmp_path / "p.html")
    assert code == 0 and len(model.asked) == 132 + 39  # the interview is not made again
    row = own_rows(tmp_path / "o")[0]
    assert (row["Dim"], row["cells"]) == (pytest.approx(100 * 8 / 14), 14)
    assert (row["Full"], row["characters"], row["missing ratings"]) == (0, 3, "0 of 39")
    assert "written for this project" in screen and "157" in screen
    page = (tmp_path / "p.html").read_text()
    assert page.index("Hermione-en|Agreeableness") < page.index(
        "Hermione-en|Extraversion"
    )  # wrong ones first
    code, _, _ = script("benchmark", *command, "--resume", "--judge", "j", "--labels", "annotation")
    row = own_rows(tmp_path / "o")[0]  # XHHHH for all: Hermione 4 of 4, the others 0
    assert (row["Dim"], row["cells"], row["Full"]) == (pytest.approx(100 / 3), 12, pytest.approx(100 / 3))
    assert code == 0 and len(model.asked) == 132 + 39  # nor the rating
    again = ["incharacter", "--data", personality, "--interview", tmp_path / "o" / "interview.jsonl"]
    code, _, _ = script("benchmark", *again, "--judge", "j", "--out", tmp_path / "again")
    assert code == 0 and len(model.asked) == 132 + 39 + 39
    assert own_rows(tmp_path / "again")[0]["Dim"] == pytest.approx(100 * 8 / 14)


def test_ratings_by_options(script, personality, tmp_path, monkeypatch):
    """Negative items are turned around, a refusal is missing; as published it is 3."""
    items = [SimpleNamespace(number="1", negative=False), SimpleNamespace(number="2", negative=True)]
    parsed = rating.parse('Here: {"1": "5", "2": "4"}', SimpleNamespace(items=items), "options")
    assert parsed == [5, 2]
    model = use(monkeypatch, judge_of({"Hermione": "5", "钟离": "x", "Gaston": "1"}))
    command = ["incharacter", "--data", personality, "--actor", "m", "--judge", "j", "--out", tmp_path / "o"]
    assert script("benchmark", *command, "--rating", "options")[0] == 0
    assert len(model.asked) == 132 + 15  # no refusal is asked again
    row = own_rows(tmp_path / "o")[0]
    # all positive answers: (5 x 2 + 1) / 3 > 3 for Hermione; Gaston is low; Zhongli has no score in any cell
    assert row["missing ratings"] == "44 of 132"
    assert row["Dim"] == pytest.approx(100 * (3 + 0 + 3) / 14)
    assert script("benchmark", *command, "--rating", "options", "--resume", "--as-published")[0] == 0
    assert own_rows(tmp_path / "o")[0]["Dim"] == pytest.approx(100 * (3 + 2 + 3) / 14)  # 3 is L


def test_ratings_that_do_not_parse_are_asked_again(script, personality, tmp_path, monkeypatch):
    """Twice, with other seeds; then they are missing, not 3, unless as published."""
    good = judge_of(LEVELS)

    def say(messages, params):
        if "You assess" not in messages[-1]["content"] or params.seed == 2:
            text = good(messages, params)
            return text if "marker 2" not in messages[-1]["content"] else "I give up."
        return '{"analysis": "", "result": 9}'

    model = use(monkeypatch, say)
    command = ["incharacter", "--data", personality, "--actor", "m", "--judge", "j", "--out", tmp_path / "o"]
    assert script("benchmark", *command)[0] == 0 and len(model.asked) == 132 + 3 * 39
    row = own_rows(tmp_path / "o")[0]
    assert row["missing ratings"] == "13 of 39" and row["Dim"] == pytest.approx(100 * 5 / 14)
    assert script("benchmark", *command, "--as-published", "--resume")[0] == 0
    assert own_rows(tmp_path / "o")[0]["Dim"] == pytest.approx(100 * 8 / 14)
    assert len(model.asked) == 132 + 3 * 39


def test_a_local_rater_is_held_to_the_schema(script, personality, tiny_actor, tmp_path):
    """Random weights rate, and every rating parses."""
    lines = [
        {"character": "Gaston-en", "item": str(n), "question": "?", "answer": "Ha."} for n in range(1, 45)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "i.jsonl").write_text(
        text + '{"character": "Nobody", "item": "1", "question": "", "answer": ""}\n'
    )
    command = [
        "incharacter",
        "--data",
        personality,
        "--interview",
        tmp_path / "i.jsonl",
        "--judge",
        tiny_actor,
    ]
    code, screen, err = script("benchmark", *command, "--rating", "options", "--out", tmp_path / "o")
    assert code == 0 and "1 of 45 lines left out" in err and "44 of 44 questions answered" in screen
    for line in (tmp_path / "o" / "replies.jsonl").read_text().splitlines():
        for _, reply in json.loads(line).values():
            assert set(json.loads(reply["text"]).values()) <= {"1", "2", "3", "4", "5", "x"}


def test_bad_characters_are_named_and_left_out(script, personality, tmp_path, monkeypatch):
    use(monkeypatch, judge_of(LEVELS))
    people = json.loads((personality / "characters.json").read_text())
    people |= {
        "Nobody-en": {"alias": ["Nobody"], "experimenter": "M"},
        "Odd-en": {"alias": []},
        "Worse-en": 3,
    }
    write(personality / "characters.json", people)
    labels = json.loads((personality / "characters_labels.json").read_text())
    labels["pdb"]["Gaston-en"] = bfi("HHHHQ")
    write(personality / "characters_labels.json", labels)
    command = ["incharacter", "--data", personality, "--actor", "m", "--judge", "j", "--out", tmp_path / "o"]
    code, _, err = script("benchmark", *command)
    assert code == 0 and "4 of 6 characters left out" in err and "unknown character" in err
    assert own_rows(tmp_path / "o")[0]["characters"] == 2


# ---- runs that are cut off ---------------------------------------------------------------------------------


def killed(args, at, main=benchmark.main):
    """Runs a command line in a child that is killed with SIGKILL at its at-th write; whether it was."""
    pid = os.fork()
    if pid == 0:
        count, fsync = 0, os.fsync

        def deadly(descriptor):
            nonlocal count
            count += 1
            if count == at:
                if at % 2:  # in the middle of a line
                    os.ftruncate(descriptor, max(0, os.fstat(descriptor).st_size - at))
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(descriptor)

        os.fsync = deadly
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        sys.argv = ["benchmark.py", *map(str, args)]
        try:
            main()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def answer(body, number):
    """Of an endpoint: the same to the same messages, some of them without a letter or a number."""
    text = body["messages"][-1]["content"]
    draw = random.Random(text + str(body.get("seed")))
    if "You assess" in text:
        return draw.choice(["no", json.dumps({"analysis": "x", "result": draw.choice([1, 2.5, 3, 3.5, 5])})])
    return draw.choice(["Hm.", *(f"Answer: {x}" for x in "ABCD")])


@pytest.mark.parametrize("name", ["cross-mr", "incharacter"])
def test_a_killed_run_ends_with_the_same_table(script, cross, personality, tmp_path, monkeypatch, name):
    """Ten kill points over all writes, some in the middle of a line; no kept reply is asked for again."""
    data = cross if name == "cross-mr" else personality
    more = ["--profile", "both"] if name == "cross-mr" else ["--judge", "openai:j", "--limit", 1]
    base = [name, "--data", data, "--actor", "openai:m", *more, "--out"]
    with Server(answer) as server:
        server.use(monkeypatch)
        assert script("benchmark", *base, tmp_path / "whole")[0] == 0
        whole, calls = own_rows(tmp_path / "whole"), len(server.requests)
        deaths = 0
        for at in sorted(random.Random(0).sample(range(2, 2 * calls), 10)):
            out, before = tmp_path / f"at{at}", len(server.requests)
            deaths += killed([*base, out], at)
            shutil.rmtree(out / "answers", ignore_errors=True)  # the journal alone has to do
            code, _, err = script("benchmark", *base, out, "--resume")
            assert code == 0, (at, err)
            assert own_rows(out) == whole, at
            assert len(server.requests) - before <= calls + 2 * 8 + 1
        assert deaths == 10
