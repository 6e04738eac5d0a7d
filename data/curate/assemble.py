"""Makes a book of its plots: safety, the split, names, profiles; and chooses test scenes.

Nothing behind the split decides anything before it: names are settled from the plots before it first, profiles
are written from those alone.
"""

import random
from collections import Counter

from data.curate.ask import BOOLEAN, TEXT, Question, integer, many, material, record
from data.curate.extract import extract
from data.curate.fidelity import words_of
from data.scenes import ENVIRONMENT

HELD_OUT = 0.1  # of a book's plots and of the books, the last
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
    yield from check_safety(book, plots)
    dropped = drop(plots, args.min_messages, args.drop_flagged)
    write("dropped", dropped)
    kept = [plot for plot in plots if plot["conversation"]]
    split = int((1 - HELD_OUT) * len(kept))
    before = plots[: plots.index(kept[split])] if kept else plots
    decisions = yield from unify(book, before, plots[len(before) :], args.max_tokens)
    write("names", list(decisions.values()))
    people = dict.fromkeys(d["official"] for d in decisions.values() if d["person"])
    profiles = yield from write_profiles(book, before, people, count, args)
    write("profiles", [{"name": name, "profile": profile} for name, profile in profiles.items()])
    notes.update(f"conversations dropped, {line['reason']}" for line in dropped)
    safety = [talk["safety"] for plot in kept for talk in plot["conversation"]]
    notes.update(f"conversations flagged with severity {one['severity']}" for one in safety if one and one["severity"])
    notes["conversations not checked for safety"] = safety.count(None)
    notes["plots without a conversation, not in the book"] = len(plots) - len(kept)
    notes["profiles that the model did not give"] = list(profiles.values()).count("")
    head = {"title": book.title, "author": book.author, "plots": kept, "split_plot_index": split}
    lost = sum(failure["end"] - failure["start"] for failure in failures) / len(book.text)
    line = {"title": book.title, "chunks": len(chunks), "failures": failures, "missing": lost}
    line["notes"] = {what: n for what, n in notes.items() if n}
    return head | {"character_datasets": datasets(kept, people, profiles)}, line


# ---- safety ------------------------------------------------------------------------------------------------


def script(talk):
    return "\n".join(f"{turn['character']}: {turn['message']}" for turn in talk["dialogues"])


def check_safety(book, plots):
    """Gives each conversation `safety`: {severity (0: nothing), flags}; None where no answer can be used."""
    talks, questions = [talk for plot in plots for talk in plot["conversation"]], []
    for n, talk in enumerate(talks):
        label = f"{book.title}: safety of conversation {n}"
        questions.append(Question(label, material("safety", script(talk)), FLAGS, 1024))
    yield questions
    for talk, question in zip(talks, questions, strict=True):
        severities = [flag["severity"] for flag in question.value or ()]
        known = {"severity": max(severities, default=0), "flags": question.value}
        talk["safety"] = known if question.value is not None else None


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


def unify(book, before, after, max_tokens):
    """Gives all characters official names, in place; returns the decisions {name: {name, official, person, by}}.

    The names before the split are settled first, without the others; later ones may join them and change none.
    """
    decisions = {}
    for part in (before, after):
        names = [name for name in dict.fromkeys(names_of(part)) if name not in decisions]
        settled = list(dict.fromkeys(d["official"] for d in decisions.values() if d["person"]))
        described = {k["name"]: f": {k['description']}" for plot in part for k in plot["key_characters"]}
        listed = "\n".join(f"- {name}{described.get(name, '')}" for name in names)
        messages = material("names", listed, title=book.title, settled=", ".join(settled) or "none")
        official = {"enum": list(dict.fromkeys([*settled, *names]))}
        schema = record(names=many(name={"enum": names}, official=official, person=BOOLEAN))
        question = Question(f"{book.title}: {len(names)} names", messages, schema, max_tokens)
        yield [question] if names else []
        decide(decisions, names, {entry["name"]: entry for entry in question.value or ()}, part)
    for plot in (*before, *after):
        rename(plot, decisions)
    return decisions


def names_of(plots):
    """Every mention of a character but the Environment."""
    for owner in (owner for plot in plots for owner in (plot, *plot["conversation"])):
        yield from (k["name"] for k in owner["key_characters"])
        yield from (t["character"] for t in owner.get("dialogues", ()) if t["character"] != ENVIRONMENT)


def decide(decisions, names, entries, plots):
    """Adds the decision on each name. One that the model left out stands for a person of its own, and so does
    one that speaks in a conversation with a bearer of its official name, unless one is part of the other."""
    casts = [{turn["character"] for turn in talk["dialogues"]} for plot in plots for talk in plot["conversation"]]
    for name in names:
        entry = entries.get(name, {"official": name, "person": True})
        official, by = entry["official"], "model" if name in entries else "left out by the model"
        official = entries.get(official, {"official": official})["official"]  # an alias of an alias
        bearers = {d["name"] for d in decisions.values() if d["official"] == official} | {official}
        bearers = {other for other in bearers if not (is_part(name, other) or is_part(other, name))}
        if any(name in cast and bearers & cast for cast in casts):
            official, by = name, f"speaks with {official}, so it is another"
        official = official if entry["person"] else name
        decisions[name] = {"name": name, "official": official, "person": entry["person"], "by": by}


def is_part(name, other):
    return set(words_of(name)) <= set(words_of(other))


def rename(plot, decisions):
    """Gives a plot's characters their official names; of two entries that become one the first stays."""
    for owner in (plot, *plot["conversation"]):
        entries = {}
        for one in (*owner["key_characters"], *owner.get("dialogues", ())):
            key = "name" if "name" in one else "character"
            one[key] = decisions.get(one[key], {"official": one[key]})["official"]
            if key == "name":
                entries.setdefault(one[key], one)
        owner["key_characters"] = list(entries.values())


# ---- profiles ----------------------------------------------------------------------------------------------


def write_profiles(book, plots, people, count, args):
    """{name: profile} of the people in these plots, those before the split; "" where the model gave none."""
    names, questions = [name for name in dict.fromkeys(names_of(plots)) if name in people], []
    for name in names:
        known = material("profile", story(name, plots, count, args.chunk_tokens), name=name, title=book.title)
        questions.append(Question(f"{book.title}: profile of {name}", known, PROFILE, args.max_tokens))
    yield questions
    return {name: (question.value or [""])[0].strip() for name, question in zip(names, questions, strict=True)}


def story(name, plots, count, size):
    """What a character lived through, in at most `size` tokens: summaries and experiences first, then the
    conversations with it, spoken part or not, of the most prominent plots first."""
    told, talks = [], []
    for plot in (plot for plot in plots if name in names_of([plot])):
        own = [f"{k['description']} {k['experience']}" for k in plot["key_characters"] if k["name"] == name]
        told.append(" ".join([plot["summary"], f"{name}:", *own] if own else [plot["summary"]]))
        own_talks = [talk for talk in plot["conversation"] if name in names_of([talk | {"conversation": []}])]
        talks += [(plot["prominence"], f"{talk['scenario']}\n{script(talk)}") for talk in own_talks]
    parts, left = [], size
    for text in (*told, *(text for _, text in sorted(talks, key=lambda talk: -talk[0]))):
        if (tokens := count(text)) <= left:
            parts, left = [*parts, text], left - tokens
    return "\n\n".join(parts)


def datasets(plots, people, profiles):
    """{name: {profile, plots, conversations, utterances}} of the people of a book, each entry with its indices."""
    lists = {name: {"plots": [], "conversations": [], "utterances": []} for name in people}
    for i_p, plot in enumerate(plots):
        mentions = [(k["name"], "plots", k | {"i_p": i_p}) for k in plot["key_characters"]]
        for i_c, talk in enumerate(plot["conversation"]):
            motivations = {k["name"]: k["motivation"] for k in talk["key_characters"]}
            for name in dict.fromkeys(names_of([talk | {"conversation": []}])):
                entry = {"name": name, "motivation": motivations.get(name, ""), "i_p": i_p, "i_c": i_c}
                mentions.append((name, "conversations", entry))
            for i_u, turn in enumerate(talk["dialogues"]):
                mentions.append((turn["character"], "utterances", turn | {"i_p": i_p, "i_c": i_c, "i_u": i_u}))
        for name, kind, entry in mentions:
            if name in lists:
                lists[name][kind].append(entry)
    return {name: {"profile": profiles.get(name, "")} | own for name, own in lists.items() if any(own.values())}


# ---- test scenes -------------------------------------------------------------------------------------------


def choose_scenes(books, scenes, n, seed):
    """At most n of the held-out scenes of {title: book}, at most A_BOOK of a book (CoSER paper, section 4).

    A character weighs max(1, sqrt(number of its plots)), a scene the mean of its characters; scenes are drawn
    by weight from the heavier half, or from the n heaviest.
    """

    def weight(scene):
        known = books[scene.book]["character_datasets"]
        cast = [name for name in scene.speaking_characters if name != ENVIRONMENT]
        weights = [max(1, len(known.get(name, {"plots": []})["plots"]) ** 0.5) for name in cast]
        return sum(weights) / len(weights) if weights else 1

    rng, taken, chosen = random.Random(seed), Counter(), []
    heaviest = sorted(scenes, key=weight, reverse=True)[: max(n, len(scenes) // 2)]
    drawn = {scene.key: rng.random() ** (1 / weight(scene)) for scene in heaviest}  # Efraimidis, Spirakis 2006
    for scene in sorted(heaviest, key=lambda scene: drawn[scene.key], reverse=True):
        if len(chosen) < n and taken[scene.book] < A_BOOK:
            taken[scene.book] += 1
            chosen.append(scene)
    return chosen
