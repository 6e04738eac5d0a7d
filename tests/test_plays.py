"""Figures of whole plays: hand-computed values, properties on drawn plays, the recorded simulations."""

import random

import pytest

import judge
from data.scenes import ENVIRONMENT, Scene
from evals import plays
from evals.metrics import bootstrap
from evals.verdicts import read_performances

PLAY = [
    ("Ann", "[Is he late?] (looks up) You are late again, Bob."),
    ("Bob", "The road was long and the night was long."),
    ("Environment", "The road was long (and wet)."),
    ("Ann", "Ann: [So.] [He lies.] (sits) (sighs) You are late again, Bob."),
    ("Bob", "The road was long and the night was long."),
    ("Ann", "[Enough"),
]


def test_figures_by_hand():
    """Six turns, counted on paper.

    Ann 1: 10 words, 7 4-grams, none said before. Bob 1: 9 words, 6, none. Environment: 6 words, 3, two of
    them Bob's (`the road was long`, `road was long and`). Ann 2: 10 words, 7, two of them her own (`you are
    late again`, `are late again bob`). Bob 2: 6, all his own, and two of the Environment's. Ann 3: none.
    """
    found = plays.figures(PLAY, ["Ann", "Bob", "Cy"])
    assert found["repeats_self"] == pytest.approx(100 * (0 + 0 + 0 + 2 / 7 + 1) / 5)
    assert found["repeats_others"] == pytest.approx(100 * (0 + 0 + 2 / 3 + 0 + 2 / 6) / 5)
    assert found["equal_turns"] == pytest.approx(100 / 6)  # Bob's second
    assert found["speaking"] == pytest.approx(100 * 2 / 3)  # not Cy
    assert found["alternation"] == 3  # Ann, Bob, Ann at the end
    assert found["thoughts"] == pytest.approx((1 + 0 + 2 + 0 + 1) / 5)  # not of the Environment
    assert found["actions"] == pytest.approx((1 + 0 + 2 + 0 + 0) / 5)
    assert found["words"] == pytest.approx((10 + 9 + 6 + 10 + 9 + 1) / 6)
    assert found["in_form"] == pytest.approx(100 * 5 / 6)  # all but `[Enough`
    assert found["turns"] == 6


def test_what_is_repeated_within_a_turn_is_said_before_by_oneself():
    assert plays.said_before([("Ann", "go on and on go on and on")]) == (1 / 5, 0)
    assert plays.said_before([("Ann", "Yes."), ("Bob", "No.")]) == (None, None)


def test_words_are_letters_and_digits():
    """Underscores, which mark what is stressed in many texts, belong to no word."""
    assert plays.words_of("_Never_ say Gru\u00df 12, don't.") == ["never", "say", "gruss", "12", "don", "t"]


@pytest.mark.parametrize(
    ("names", "longest"),
    [("", 0), ("A", 1), ("AAA", 1), ("AB", 2), ("ABAB", 4), ("ABCA", 2), ("ABCBCBA", 5), ("ABBABA", 4)],
)
def test_longest_alternation(names, longest):
    assert plays.longest_alternation(names) == longest


@pytest.mark.parametrize(
    ("text", "counted"),
    [
        ("[a [b] (c)] (d (e) f) g", (1, 1, True)),  # nested ones are part of the outer
        ("[a][b](c)(d)", (2, 2, True)),
        ("(a [b] c)", (1, 1, True)),
        ("a) b]", (0, 0, True)),  # text
        ("(a", (0, 1, False)),
        ("[a", (1, 0, False)),
    ],
)
def test_brackets_are_counted(text, counted):
    assert plays.count_brackets(text) == counted


LOOP = " ".join(["round and round it goes"] * 6) + "."


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("Stay.", True),
        ("(nods)", True),
        ("[Why?] Well \u2014", True),
        ("", False),
        ("!!!!!", False),  # no word
        ("I was about to", False),
        ("I was, truly,", False),
        ("(walks in. Good day.", False),
        ("Stay.\nBob: Why?", False),  # another's line
        ("Stay.\nAnn: Go.", False),  # begun anew
        (LOOP, False),
    ],
)
def test_form_of_a_turn(text, good):
    assert plays.in_form("Ann", text, ["Ann", "Bob", ENVIRONMENT]) is good


def a_play(rng):
    names = ["Ann", "Bob", "Cy", ENVIRONMENT][: rng.randint(2, 4)]
    parts = ["go", "on", "[so]", "(nods)", "now.", "then,", "[", ")", "\n", ""]
    texts = [" ".join(rng.choices(parts, k=rng.randrange(12))) for _ in range(rng.randrange(9))]
    return [(rng.choice(names), text) for text in texts]


@pytest.mark.parametrize("seed", range(300))
def test_properties_of_drawn_plays(seed):
    rng, cast = random.Random(seed), ["Ann", "Bob", "Cy"]
    turns = a_play(rng)
    found = plays.figures(turns, cast)
    shares = ("repeats_self", "repeats_others", "equal_turns", "speaking", "in_form")
    assert set(found) == set(plays.FIGURES.values())
    assert all(found[key] is None or 0 <= found[key] <= 100 for key in shares)
    assert found["alternation"] <= found["turns"] == len(turns)
    # names in front, letter case and new names of the characters change nothing
    named = [(name, f"{name}: {text}") for name, text in turns]
    assert plays.figures(named, cast) == found
    capitals = plays.figures([(name, text.upper()) for name, text in turns], cast)
    assert {**capitals, "in_form": None} == {**found, "in_form": None}
    other = {"Ann": "Dora", "Bob": "Eve", "Cy": "Fay", ENVIRONMENT: ENVIRONMENT}
    assert plays.figures([(other[name], text) for name, text in turns], [other[n] for n in cast]) == found
    # a play said twice by the same people: the second half is all said before
    twice = plays.said_before(turns + turns)[0]
    assert twice is None or twice >= 0.5
    # texts of which no two share a word repeat nothing
    fresh = [(name, " ".join(f"w{i}x{j}" for j in range(6))) for i, (name, _) in enumerate(turns)]
    assert plays.said_before(fresh) == ((0, 0) if turns else (None, None))


def test_the_original_is_read_as_far_as_it_was_played(stage):
    scene = Scene(**stage["the-last-ferry/1"].to_dict())
    played = [{"role": t["character"], "content": t["message"]} for t in scene.dialogues[:3]]
    between = [{"role": "NSP", "content": scene.speaking_characters[0]}]
    found = plays.play_figures([(scene, played[:1] + between + played[1:], {})])
    assert list(found) == list(plays.FIGURES)
    for sides in found.values():
        assert sides["played"] == sides["original"]
    assert found["turns"]["played"]["mean"] == 3


def test_recorded_simulations_beside_their_originals(shared):
    """Means over the scenes, an interval from the same bootstrap as every table; GPT-4o repeats itself as
    little as the books do, LLaMA ten times as much, and six plays of CoSER-8B are `!!!!!` throughout."""
    folder = shared / "coser"
    runs = {
        name: read_performances(folder / "gca" / f"{name}.simulation.json", folder / "test" / "id.json")
        for name in ("gpt-4o", "llama-3.1-8b-instruct", "coser-8b")
    }
    found = {name: plays.play_figures(run) for name, run in runs.items()}
    label = "4-grams said before, by oneself (%)"
    gpt, llama = (found[name][label] for name in ("gpt-4o", "llama-3.1-8b-instruct"))
    assert gpt["played"]["high"] < 0.5 < llama["played"]["low"]
    assert llama["original"]["high"] < 1
    assert found["coser-8b"][label]["played"]["scenes"] == 94  # the others have no 4-gram
    scenes = runs["gpt-4o"]
    words = []
    for _, messages, _ in scenes:
        texts = [m["content"].removeprefix(f"{m['role']}:") for m in messages if m["role"] != "NSP"]
        words.append(sum(len(plays.words_of(text)) for text in texts) / len(texts))
    mean, low, high = bootstrap(words)
    row = found["gpt-4o"]["words a turn"]["played"]
    assert (row["mean"], row["low"], row["high"]) == pytest.approx((mean, low, high), rel=1e-3)


def test_the_summary_and_the_page_show_the_figures(shared, tmp_path, monkeypatch, capsys):
    folder = shared / "coser"
    simulation = str(folder / "gca" / "gpt-4o.simulation.json")
    arguments = [simulation, "--scenes", str(folder / "test" / "id.json"), "--limit", "3"]
    arguments += ["--out", str(tmp_path / "v.jsonl"), "--html", str(tmp_path / "r.html")]
    monkeypatch.setattr("sys.argv", ["judge.py", *arguments])
    assert judge.main() == 0
    printed, page = capsys.readouterr().out, (tmp_path / "r.html").read_text(encoding="utf-8")
    for label in plays.FIGURES:
        assert label in printed and f">{label}<" in page
