"""Makes a book of its plots: safety, the split, names, profiles; and chooses test scenes.

Nothing behind the split decides anything before it: names are settled from the plots before it first, and
profiles are written from those alone.
"""

import random
from collections import Counter

from data.curate.ask import BOOLEAN, TEXT, Question, integer, many, material, record
from data.curate.extract import extract, mentions
from data.curate.fidelity import words_of
from data.scenes import ENVIRONMENT

HELD_OUT = 0.1  # of a book's plots and of the books, the last
LEFT_OUT = "left out by the model"
A_BOOK = 5  # test scenes at most
CATEGORIES = ["sexual", "minors", "violence", "self-harm", "hatred", "instructions", "personal data"]
FLAGS = record(flags=many(category={"enum": CATEGORIES}, severity=integer(1, 3), quote=TEXT))
PROFILE = record(profile=TEXT)


def curate(book, chunks, count, args, write):
    """Yields lists of Questions about a book; returns (the book in the CoSER format, its line of the report).

    write(step, values) keeps what a step made.
    """
    write("chunks", [vars(chunk) | {"text": book.text[chunk.start : chunk.end]} for chunk in chunks])
    plots, failures, notes = yield from extract(book, chunks, count, args.chunk_tokens, args.max_tokens)
    write("plots", plots)
    safety = yield from check_safety(book, plots)
    write("safety", safety)
    dropped = drop(plots, args.min_messages, args.drop_flagged)
    write("dropped", dropped)
    kept = [plot for plot in plots if plot["conversation"]]
    split = int((1 - HELD_OUT) * len(kept))
    before = plots[: plots.index(kept[split])] if kept else plots
    names = yield from unify(book, before, plots[len(before) :], args.max_tokens)
    write("names", list(names.values()))
    people = dict.fromkeys(name["official"] for name in names.values() if name["person"])
    profiles = yield from write_profiles(book, before, people, count, args)
    write("profiles", [{"name": name, "profile": profile} for name, profile in profiles.items()])
    found = [one["safety"] and one["safety"]["severity"] for one in safety]
    notes.update(f"conversations flagged with severity {severity}" for severity in found if severity)
    notes.update(f"conversations dropped, {one['reason']}" for one in dropped)
    notes["conversations not checked for safety"] = found.count(None)
    notes["plots without a conversation, not in the book"] = len(plots) - len(kept)
    notes["names that the model left out"] = sum(name["by"] == LEFT_OUT for name in names.values())
    notes["profiles that the model did not give"] = list(profiles.values()).count("")
    lost = sum(failure["end"] - failure["start"] for failure in failures) / chunks[-1].end
    line = {"title": book.title, "chunks": len(chunks), "failures": failures, "missing": lost}
    line["in_no_plot"] = 1 - covered(plots) / chunks[-1].end
    line["notes"] = {what: n for what, n in notes.items() if n}
    made = {"title": book.title, "author": book.author, "plots": kept, "split_plot_index": split}
    return made | {"character_datasets": datasets(kept, people, profiles)}, line


def covered(plots):
    """How many characters of the text are in plots, in the order of the text."""
    total = end = 0
    for plot in plots:
        total += max(0, plot["end"] - max(plot["start"], end))
        end = max(end, plot["end"])
    return total


# ---- safety ------------------------------------------------------------------------------------------------


def script(talk):
    return "\n".join(f"{turn['character']}: {turn['message']}" for turn in talk["dialogues"])


def check_safety(book, plots):
    """Gives each conversation `safety`: {severity (0: nothing), flags}, or None where no answer can be used;
    returns a line for each."""
    talks = [talk for plot in plots for talk in plot["conversation"]]
    labels = [f"{book.title}: safety of conversation {n}" for n in range(len(talks))]
    asked = [material("safety", script(talk)) for talk in talks]
    questions = [Question(*pair, FLAGS, 1024) for pair in zip(labels, asked, strict=True)]
    yield questions
    for talk, question in zip(talks, questions, strict=True):
        severity = max((flag["severity"] for flag in question.value or ()), default=0)
        talk["safety"] = None if question.value is None else {"severity": severity, "flags": question.value}
    return [{"topic": talk["topic"], "safety": talk["safety"]} for talk in talks]


def drop(plots, fewest, severity):
    """Takes out conversations of fewer than `fewest` messages, and those flagged with this severity or more,
    or not checked (severity None: neither); returns them, each with the reason."""
    dropped = []
    for plot in plots:
        for talk in list(plot["conversation"]):
            safety, reason = talk["safety"], ""
            if len(talk["dialogues"]) < fewest:
                reason = f"fewer than {fewest} messages"
            elif severity and (safety is None or safety["severity"] >= severity):
                reason = f"flagged with severity {safety['severity']}" if safety else "safety not checked"
            if reason:
                plot["conversation"].remove(talk)
                dropped.append({"reason": reason, "plot": plot["summary"], "conversation": talk})
    return dropped


# ---- names -------------------------------------------------------------------------------------------------


def names_of(*owners):
    """The names in plots, without their conversations, or in conversations, each once, in order."""
    names = [entry[key] for owner in owners for entry, key in mentions(owner)]
    return [name for name in dict.fromkeys(names) if name != ENVIRONMENT]


def parts_of(plots):
    return [part for plot in plots for part in (plot, *plot["conversation"])]


def unify(book, before, after, max_tokens):
    """Gives all characters official names, in place; returns {name: {name, official, person, by}}.

    Names before the split are settled first, without the others; later ones may join them and change none.
    """
    decisions = {}
    for plots in (before, after):
        names = [name for name in names_of(*parts_of(plots)) if name not in decisions]
        settled = list(dict.fromkeys(d["official"] for d in decisions.values() if d["person"]))
        described = {k["name"]: f": {k['description']}" for plot in plots for k in plot["key_characters"]}
        listed = "\n".join(f"- {name}{described.get(name, '')}" for name in names)
        messages = material("names", listed, title=book.title, settled=", ".join(settled) or "none")
        official = {"enum": list(dict.fromkeys([*settled, *names]))}
        schema = record(names=many(name={"enum": names}, official=official, person=BOOLEAN))
        question = Question(f"{book.title}: {len(names)} names", messages, schema, max_tokens)
        yield [question] if names else []
        decide(decisions, names, {entry["name"]: entry for entry in question.value or ()}, plots)
    for part in parts_of([*before, *after]):
        for entry, key in mentions(part):
            entry[key] = decisions.get(entry[key], {"official": entry[key]})["official"]
        entries = {entry["name"]: entry for entry in reversed(part["key_characters"])}
        part["key_characters"] = list(entries.values())[::-1]  # of two that became one the first stays
    return decisions


def decide(decisions, names, entries, plots):
    """Adds the decision on each name. One that the model left out stands for a person of its own, and so does
    one that speaks in a conversation with a bearer of its official name, unless one is part of the other."""

    def is_part(name, other):
        return set(words_of(name)) <= set(words_of(other))

    talks = [talk for plot in plots for talk in plot["conversation"]]
    casts = [{turn["character"] for turn in talk["dialogues"]} for talk in talks]
    for name in names:
        entry = entries.get(name, {"official": name, "person": True})
        official, by = entry["official"], "model" if name in entries else LEFT_OUT
        official = entries.get(official, {"official": official})["official"]  # an alias of an alias
        bearers = {d["name"] for d in decisions.values() if d["official"] == official} | {official}
        bearers = {other for other in bearers if not (is_part(name, other) or is_part(other, name))}
        if any(name in cast and bearers & cast for cast in casts):
            official, by = name, f"speaks with {official}, so it is another"
        official = official if entry["person"] else name
        decisions[name] = {"name": name, "official": official, "person": entry["person"], "by": by}


# ---- profiles ----------------------------------------------------------------------------------------------


def write_profiles(book, plots, people, count, args):
    """{name: profile} of the people in these plots, those before the split; "" where the model gave none."""
    names, questions = [name for name in names_of(*parts_of(plots)) if name in people], []
    for name in names:
        known = material("profile", story(name, plots, count, args.chunk_tokens), name=name, title=book.title)
        questions.append(Question(f"{book.title}: profile of {name}", known, PROFILE, args.max_tokens))
    yield questions
    told = ((question.value or [""])[0].strip() for question in questions)
    return dict(zip(names, told, strict=True))


def story(name, plots, count, size):
    """What a character lived through, in at most `size` tokens: summaries and experiences first, then the
    conversations with it, whether it speaks or not, of the most prominent plots first."""
    told, talks = [], []
    for plot in plots:
        own = [k for k in plot["key_characters"] if k["name"] == name]
        experience = "".join(f" {name}: {k['description']} {k['experience']}" for k in own)
        own_talks = [talk for talk in plot["conversation"] if name in names_of(talk)]
        told += [plot["summary"] + experience] if own or own_talks else []
        talks += [(-plot["prominence"], f"{talk['scenario']}\n{script(talk)}") for talk in own_talks]
    parts, left = [], size
    for text in (*told, *(text for _, text in sorted(talks, key=lambda talk: talk[0]))):
        if (tokens := count(text)) <= left:
            parts, left = [*parts, text], left - tokens
    return "\n\n".join(parts)


def datasets(plots, people, profiles):
    """{name: {profile, plots, conversations, utterances}} of the people of a book, entries with indices."""
    kinds = ("plots", "conversations", "utterances")
    made = {name: {"profile": profiles.get(name, "")} | {kind: [] for kind in kinds} for name in people}

    def add(name, kind, entry, **place):
        if name in made:
            made[name][kind].append(entry | place)

    for i_p, plot in enumerate(plots):
        for character in plot["key_characters"]:
            add(character["name"], "plots", character, i_p=i_p)
        for i_c, talk in enumerate(plot["conversation"]):
            motivations = {k["name"]: k["motivation"] for k in talk["key_characters"]}
            for name in names_of(talk):
                entry = {"name": name, "motivation": motivations.get(name, "")}
                add(name, "conversations", entry, i_p=i_p, i_c=i_c)
            for i_u, turn in enumerate(talk["dialogues"]):
                add(turn["character"], "utterances", turn, i_p=i_p, i_c=i_c, i_u=i_u)
    return {name: own for name, own in made.items() if any(own[kind] for kind in kinds)}


# ---- test scenes -------------------------------------------------------------------------------------------


def choose_scenes(books, scenes, n, seed):
    """At most n of the held-out scenes of {title: book}, at most A_BOOK of a book (CoSER paper, section 4).

    A character weighs max(1, sqrt(number of its plots)), a scene the mean of its characters; scenes are drawn
    by weight from the heavier half, or from the n heaviest.
    """

    def weight(scene):
        known = books[scene.book]["character_datasets"]
        cast = [name for name in scene.speaking_characters if name != ENVIRONMENT]
        weights = [max(1, len(known[name]["plots"]) ** 0.5) if name in known else 1 for name in cast]
        return sum(weights) / len(weights) if weights else 1

    rng, taken, chosen = random.Random(seed), Counter(), []
    heaviest = sorted(scenes, key=weight, reverse=True)[: max(n, len(scenes) // 2)]
    # Efraimidis and Spirakis 2006
    drawn = {scene.key: rng.random() ** (1 / weight(scene)) for scene in heaviest}
    for scene in sorted(heaviest, key=lambda scene: drawn[scene.key], reverse=True):
        if len(chosen) < n and taken[scene.book] < A_BOOK:
            taken[scene.book] += 1
            chosen.append(scene)
    return chosen
